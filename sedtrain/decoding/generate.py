"""Text from audio: greedy, beam search or sampling by `generate`, with CTC beside it, before it or instead of it.

B batch, P prompt, U generated tokens.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from sedtrain.annotations import refuse_misfits
from sedtrain.batch import Batch
from sedtrain.decoding.alignment import confidences
from sedtrain.decoding.ctc import Lattice, best_path, frames_of, lattice_of, prefix_beam
from sedtrain.decoding.fusion import Fusion, language_model, word_beginnings
from sedtrain.decoding.hotwords import HotWords, tree_of
from sedtrain.decoding.hypotheses import Hypotheses, end_tokens
from sedtrain.decoding.joint import JointScores, rescored
from sedtrain.decoding.pauses import Pauses, activity_of
from sedtrain.decoding.speculative import Speculative
from sedtrain.decoding.timestamps import heard_words
from sedtrain.errors import UserError
from sedtrain.models.decoder import most_new_tokens
from sedtrain.models.encoder import EncodedSpeech
from sedtrain.models.saved import MOST_TOKENS, most_tokens
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.ranges import Count, CountOrZero, Exponent, Fraction, NonNegative, Positive, PositiveFraction

Search = Literal["attention", "joint", "ctc", "rescore", "speculative"]
OURS = {
    "search",
    "ctc_weight",
    "num_return_sequences",
    "lm",
    "lm_weight",
    "hotwords",
    "hotword_bonus",
    "window",
    "pauses",
}  # the options that `generate` does not get as they are


@dataclass(frozen=True)
class DecodingOptions:
    """Settings of the search for hypotheses; most names are those of `transformers.GenerationConfig`.

    search: attention: the decoder alone; ctc: CTC alone; joint: both in each step of a beam; rescore: the best texts of CTC by
        their joint score; speculative: CTC drafts, the decoder verifies, with the ids of greedy search
    ctc_weight: of CTC in a joint score, (1 - w) · decoder + w · CTC
    num_return_sequences: texts of each utterance in `decode_batch`
    max_new_tokens: null: four times the tokens that training texts have in that time, and 16; 200 where the model does not say.
        With a CTC head, never more than an utterance has frames.
    top_k, no_repeat_ngram_size: 0 is off; top_p: 1 is off
    lm: folder or Hub id of a causal language model, whose log-probabilities of words are added with `lm_weight`
    hotwords: words and terms that get `hotword_bonus` for each of their tokens, in nats
    window: seconds that are decoded at once; longer recordings are cut at pauses. None: the longest utterance in training,
        30 s where that is not known. Never more than the encoder takes
    pauses: found by `energy`, or by `silero`, silero-vad; auto: that where it is installed
    """

    search: Search = "attention"
    num_beams: Count = 1
    num_return_sequences: Count = 1
    ctc_weight: Fraction = 0.5
    do_sample: bool = False
    max_new_tokens: Count | None = None
    length_penalty: Exponent = 1.0
    temperature: Positive = 1.0
    top_k: CountOrZero = 50
    top_p: PositiveFraction = 1.0
    no_repeat_ngram_size: CountOrZero = 0
    lm: str | None = None
    lm_weight: NonNegative = 0.3
    hotwords: Sequence[str] = ()
    hotword_bonus: NonNegative = 2.0
    window: Positive | None = None
    pauses: Pauses = "auto"

    def __post_init__(self) -> None:
        """Raises UserError for values out of range, options that do not go together, and a missing silero-vad."""
        refuse_misfits("decoding.", type(self), vars(self))
        for option in filter(lambda option: getattr(self, option), ("lm", "hotwords")):
            if self.search not in ("attention", "joint"):
                write, python = "write decoding=beam or decoding=joint", "write search='joint', or no search"
                wrong = f"search={self.search} does not take it"
                raise UserError(f"decoding.{option}", getattr(self, option), wrong, write, python)
        if self.do_sample and self.search != "attention":
            write, python = "write decoding=sample, or decoding.do_sample=false", "write do_sample=False, or no search"
            raise UserError("decoding.do_sample", True, f"search={self.search} does not sample", write, python)
        if self.search == "speculative" and self.num_beams > 1:
            write, python = "write decoding.num_beams=1, or decoding=joint for a beam", "write num_beams=1"
            raise UserError("decoding.num_beams", self.num_beams, "search=speculative is greedy search", write, python)
        if self.num_return_sequences > self.num_beams and not self.do_sample:
            write = f"write decoding.num_beams={self.num_return_sequences} or more"
            wrong = f"num_beams={self.num_beams} beams end in no more texts than that"
            raise UserError("decoding.num_return_sequences", self.num_return_sequences, wrong, write)
        activity_of(self.pauses)

    def generation_kwargs(self) -> dict[str, Any]:
        """The options that matter for this search: `generate` warns of the others."""
        sampling = {"temperature", "top_k", "top_p"} if not self.do_sample else set()
        beams = {"length_penalty"} if self.num_beams == 1 else set()
        return {name: value for name, value in asdict(self).items() if name not in sampling | beams | OURS}

    def refuse_without_ctc(self, model: SpeechEncoderDecoder) -> None:
        """Raises UserError for a search that needs a CTC head which the model lacks."""
        if self.search != "attention" and model.ctc_head is None:
            wrong = "it needs the CTC head of the model, which was trained without one"
            write = "write decoding=greedy or decoding=beam, or train with loss=joint loss.ctc_weight=0.3"
            python = "write search='attention', or load a model that was trained with CTC"
            raise UserError("decoding.search", self.search, wrong, write, python)


@torch.inference_mode()
def decode_batch(
    model: SpeechEncoderDecoder,
    tokenizer: PreTrainedTokenizerBase,
    batch: Batch,
    options: DecodingOptions,
    with_confidence: bool = False,
    with_words: bool = False,
) -> list[Hypotheses]:
    """The best `num_return_sequences` hypotheses for each of the B utterances, in their order, without prompts.

    with_confidence, with_words: ask CTC how sure it is of the best ones, and where their words are, where there is a head
    The model keeps its mode. Raises UserError for a search that needs a CTC head which the model lacks.
    """
    options.refuse_without_ctc(model)
    was_training = model.training
    if was_training:  # each change of the mode visits all modules
        model.eval()
    prompts = batch.prompts
    if prompts is None:
        prompts = torch.full((len(batch), 1), model.config.decoder_start_token_id, device=batch.inputs.device)
    encoded = model.encode(batch.inputs, batch.attention_mask)
    limits = token_limits(model, encoded, batch.durations, prompts.shape[1], options)
    lattice = None if options.search == "attention" else lattice_of(model, encoded)
    if lattice is not None and options.search in ("ctc", "rescore"):
        found = by_ctc(model, encoded, prompts, options, lattice, int(limits.max()))
    else:
        found = generated(model, tokenizer, encoded, prompts, options, lattice, limits)
    if with_confidence and model.ctc_head is not None:
        sure = confidences(lattice or lattice_of(model, encoded), [each.ids[0] for each in found])
        found = [replace(each, confidence=confidence) for each, confidence in zip(found, sure, strict=True)]
    if was_training:
        model.train()
    found = [
        replace(each, texts=texts_of(tokenizer, each.ids), limit=limit)
        for each, limit in zip(found, limits.tolist(), strict=True)
    ]
    if with_words and model.ctc_head is not None:
        heard = heard_words(model, tokenizer, encoded, found)
        found = [replace(each, words=words) for each, words in zip(found, heard, strict=True)]
    return found


def token_limits(
    model: SpeechEncoderDecoder,
    encoded: EncodedSpeech,
    durations: Sequence[float],
    num_given: int,
    options: DecodingOptions,
) -> Tensor:
    """(B,) tokens that each text may have behind `num_given` of a prompt: a bound of its own utterance alone.

    durations: seconds of each utterance; empty where unknown
    """
    frames, most = encoded.last_hidden_state, options.max_new_tokens
    by_seconds = [most_tokens(model.config, seconds) for seconds in durations] if most is None else []
    limits = torch.tensor(by_seconds or [most or MOST_TOKENS] * len(frames), device=frames.device)
    if model.ctc_head is not None:
        by_frames = frames_of(encoded) + 1  # a token a frame, and the end
        limits = by_frames if most is None and options.search in ("ctc", "rescore") else limits.minimum(by_frames)
    return limits.clamp(max=most_new_tokens(int(limits.max()), model.max_tokens, num_given))


def texts_of(tokenizer: PreTrainedTokenizerBase, ids: list[list[int]]) -> tuple[str, ...]:
    return tuple(text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True))


def by_ctc(
    model: SpeechEncoderDecoder,
    encoded: EncodedSpeech,
    prompts: Tensor,
    options: DecodingOptions,
    lattice: Lattice,
    most: int,
) -> list[Hypotheses]:
    """Texts of CTC of at most so many tokens, as it ranks them or as both do."""
    num_beams, num_best = options.num_beams, options.num_return_sequences
    if options.search == "rescore":
        found = prefix_beam(lattice, num_beams, num_beams, most)
        return rescored(model, encoded, prompts, found, options.ctc_weight, num_best)
    if num_beams == 1:
        return best_path(lattice, most)
    return prefix_beam(lattice, num_beams, num_best, most)


def generated(
    model: SpeechEncoderDecoder,
    tokenizer: PreTrainedTokenizerBase,
    encoded: EncodedSpeech,
    prompts: Tensor,
    options: DecodingOptions,
    lattice: Lattice | None,
    limits: Tensor,
) -> list[Hypotheses]:
    """Texts that `generate` writes; the scores of n-best beams are those of the beams."""
    model.settle_generation_config()
    ends, num_best = end_tokens(model.generation_config), options.num_return_sequences
    most = int(limits.max())
    kwargs = {
        **options.generation_kwargs(),
        "num_return_sequences": num_best,
        "max_new_tokens": most + 1,  # never reached: BART is forced to end its text there, which a batch would decide
        "stopping_criteria": StoppingCriteriaList([InTime(prompts.shape[1] + limits)]),
    }
    processors: list[LogitsProcessor] = []
    if lattice is not None and options.search == "speculative":
        drafts = [found.ids[0] for found in best_path(lattice, most)]
        kwargs["custom_generate"] = Speculative(drafts, limits.tolist())
    elif lattice is not None and options.ctc_weight:
        processors.append(JointScores(lattice, options.ctc_weight, ends))
    processors += added_scores(options, tokenizer, prompts, model.decoder.config.vocab_size, ends)
    kwargs["logits_processor"] = LogitsProcessorList(processors)
    if is_scored := num_best > 1 and options.num_beams > 1:
        kwargs |= {"return_dict_in_generate": True, "output_scores": True}
    output = model.generate(
        encoder_outputs=encoded,
        decoder_input_ids=prompts,
        synced_gpus=False,  # where weights lie in pieces on several ranks, the validation has gathered them
        **kwargs,
    )
    rows = (output.sequences if is_scored else output)[:, prompts.shape[1] :].unflatten(0, (len(prompts), num_best))
    scores = output.sequences_scores.unflatten(0, rows.shape[:2]).tolist() if is_scored else [None] * len(prompts)
    pad = model.config.pad_token_id
    return [Hypotheses.of_rows(*each, ends, pad) for each in zip(rows.tolist(), scores, strict=True)]


def added_scores(
    options: DecodingOptions, tokenizer: PreTrainedTokenizerBase, prompts: Tensor, size: int, ends: list[int]
) -> list[LogitsProcessor]:
    """The language model and the hot words that are asked for; the decoder has `size` tokens."""
    if not (options.lm or options.hotwords):
        return []
    begins, added = word_beginnings(tokenizer, size, prompts.device), []
    place = (begins, ends, prompts.shape[1])
    if options.lm:
        added.append(Fusion(language_model(options.lm, prompts.device), options.lm_weight, tokenizer, *place))
    if options.hotwords:
        added.append(HotWords(tree_of(tokenizer, tuple(options.hotwords)), options.hotword_bonus, *place))
    return added


class InTime(StoppingCriteria):
    """Ends each utterance at its own length, whatever the others of the batch are.

    limits: (B,) tokens, prompt included
    """

    def __init__(self, limits: Tensor) -> None:
        self.limits = limits

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B N, U) tokens of N beams -> (B N,)"""
        return input_ids.shape[1] >= self.limits.repeat_interleave(len(input_ids) // len(self.limits))
