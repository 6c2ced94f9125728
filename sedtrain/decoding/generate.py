"""Texts of a batch: written by the decoder (greedy, beam search, sampling), by CTC, or by both together.

B batch, P prompt.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from sedtrain.batch import Batch
from sedtrain.decoding.alignment import checked_by_ctc, texts_of
from sedtrain.decoding.ctc import best_path, frames_of, lattice_of, prefix_beam
from sedtrain.decoding.fusion import Fusion, language_model, word_beginnings
from sedtrain.decoding.hotwords import HotWords, tree_of
from sedtrain.decoding.hypotheses import Hypotheses, end_tokens
from sedtrain.decoding.joint import rescored
from sedtrain.decoding.options import DecodingOptions
from sedtrain.decoding.searches import SearchInputs, by_decoder
from sedtrain.errors import UserError
from sedtrain.models.encoder import EncodedSpeech
from sedtrain.models.positions import most_new_tokens
from sedtrain.models.saved import MOST_TOKENS, most_tokens
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.models.whole import with_heard_languages


@torch.inference_mode()
def decode_batch(
    model: SpeechEncoderDecoder,
    tokenizer: PreTrainedTokenizerBase,
    batch: Batch,
    options: DecodingOptions,
    with_confidence: bool = False,
    with_words: bool = False,
    encoded: EncodedSpeech | None = None,
) -> list[Hypotheses]:
    """The best `num_return_sequences` hypotheses of each of the B utterances, without prompts, in the order of the batch.

    encoded: the batch as `model.encode` returns it in evaluation mode, if the caller has it
    with_confidence: ask CTC how sure it is of each best hypothesis; with_words: and where its words are. Both need a CTC head
    The model keeps its training or evaluation mode. Raises UserError for a search whose CTC head the model lacks.
    """
    refuse_impossible(model, tokenizer, options)
    was_training = model.training
    if was_training:  # each change of the mode visits all modules
        model.eval()
    if encoded is None:
        encoded = model.encode(batch.inputs, batch.padding_mask)
    prompts = with_heard_languages(model, encoded, prompts_of(model, batch))
    limits = token_limits(model, encoded, batch.durations, prompts.shape[1], options)
    lattice = None if options.search == "attention" else lattice_of(model, encoded)
    inputs = SearchInputs(encoded, prompts, limits, options, lattice)
    if options.search in ("ctc", "rescore"):
        found = by_ctc(model, inputs)
    else:
        found = by_decoder(model, replace(inputs, added=added_scores(model, tokenizer, prompts, options)))
    found = [
        replace(each, texts=tuple(texts_of(tokenizer, each.ids)), limit=limit)
        for each, limit in zip(found, limits.tolist(), strict=True)
    ]
    if (with_confidence or with_words) and model.ctc_head is not None:
        found = checked_by_ctc(tokenizer, lattice or lattice_of(model, encoded), found, with_words)
    if was_training:
        model.train()
    return found


def refuse_impossible(
    model: SpeechEncoderDecoder, tokenizer: PreTrainedTokenizerBase, options: DecodingOptions
) -> None:
    """Raises UserError for a missing CTC head or language model, and for hot words that the tokenizer cannot write."""
    if options.search != "attention" and model.ctc_head is None:
        wrong = "it needs the CTC head of the model, which was trained without one"
        write = "write decoding=greedy or decoding=beam, or train with loss=joint loss.ctc_weight=0.3"
        python = "write search='attention', or load a model that was trained with CTC"
        raise UserError("decoding.search", options.search, wrong, write, python)
    if options.lm:
        language_model(options.lm)
    if options.hotwords:
        tree_of(tokenizer, tuple(options.hotwords))


def prompts_of(model: SpeechEncoderDecoder, batch: Batch) -> Tensor:
    """(B, P) tokens in front of each text: those of the batch, or the start token alone."""
    if batch.prompts is not None:
        return batch.prompts
    return torch.full((len(batch), 1), model.config.decoder_start_token_id, device=batch.inputs.device)


def token_limits(
    model: SpeechEncoderDecoder,
    encoded: EncodedSpeech,
    durations: Sequence[float],
    num_given: int,
    options: DecodingOptions,
) -> Tensor:
    """(B,) most tokens of each text after its prompt; the rest of the batch does not change it.

    durations: seconds of each utterance; empty where unknown
    num_given: tokens of the prompt
    """
    frames, most = encoded.last_hidden_state, options.max_new_tokens
    by_seconds = [most_tokens(model.config, seconds) for seconds in durations] if most is None else []
    limits = torch.tensor(by_seconds or [most or MOST_TOKENS] * len(frames), device=frames.device)
    if model.ctc_head is not None:
        by_frames = frames_of(encoded) + 1  # one token per frame, and the end
        limits = by_frames if most is None and options.search in ("ctc", "rescore") else limits.minimum(by_frames)
    if (rooms := model.rooms(encoded)) is not None:
        num_given += options.search == "rescore"  # which also reads the last token
        rows = zip(limits.tolist(), rooms, strict=True)
        limits = limits.new_tensor([most_new_tokens(limit, room, num_given) for limit, room in rows])
    return limits


def by_ctc(model: SpeechEncoderDecoder, inputs: SearchInputs) -> list[Hypotheses]:
    """Texts that CTC finds, in its own order; with search=rescore, in the order of their joint scores."""
    options, lattice, limits = inputs.options, inputs.lattice, inputs.limits
    assert lattice is not None
    num_beams, num_best = options.num_beams, options.num_return_sequences
    if options.search == "rescore":
        found = prefix_beam(lattice, num_beams, num_beams, limits)
        return rescored(model, inputs.encoded, inputs.prompts, found, options.ctc_weight, num_best)
    if num_beams == 1:
        return best_path(lattice, limits.tolist())
    return prefix_beam(lattice, num_beams, num_best, limits)


def added_scores(
    model: SpeechEncoderDecoder, tokenizer: PreTrainedTokenizerBase, prompts: Tensor, options: DecodingOptions
) -> list[LogitsProcessor]:
    """Processors of scores for the language model and the hot words in the options."""
    if not (options.lm or options.hotwords):
        return []
    begins = word_beginnings(tokenizer, model.decoder.config.vocab_size, prompts.device)
    shared, added = (begins, end_tokens(model.generation_config), prompts.shape[1]), list[LogitsProcessor]()
    if options.lm:
        loaded = language_model(options.lm)
        loaded.model.to(prompts.device)
        added.append(Fusion(loaded, options.lm_weight, tokenizer, *shared))
    if options.hotwords:
        added.append(HotWords(tree_of(tokenizer, tuple(options.hotwords)), options.hotword_bonus, *shared))
    return added
