"""Text from audio: greedy, beam search or sampling by `generate`, with CTC beside it, before it or instead of it.

B batch, P prompt, U generated tokens.
"""

from copy import copy
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from sedtrain.batch import Batch
from sedtrain.decoding.ctc import Lattice, best_path, frames_of, lattice_of, prefix_beam
from sedtrain.decoding.hypotheses import Hypotheses, end_tokens
from sedtrain.decoding.joint import JointScores, rescored
from sedtrain.decoding.loop import Task, beam_search, greedy
from sedtrain.decoding.speculative import Speculative, speculate
from sedtrain.errors import UserError
from sedtrain.models.encoder import EncodedSpeech
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.models.steps import Steps, steps_of
from sedtrain.ranges import Count, CountOrZero, Exponent, Fraction, Positive, PositiveFraction

Search = Literal["attention", "joint", "ctc", "rescore", "speculative"]
Found = tuple[list[list[int]], list[list[float] | None]]
"""Rows of tokens, the hypotheses of an utterance together, and the scores of each utterance."""
OURS = {"search", "ctc_weight", "num_return_sequences"}  # the options that `generate` does not get as they are


@dataclass(frozen=True)
class DecodingOptions:
    """Settings of the search for hypotheses; most names are those of `transformers.GenerationConfig`.

    search: attention: the decoder alone; ctc: CTC alone; joint: both in each step of a beam; rescore: the best texts of CTC by
        their joint score; speculative: CTC drafts, the decoder verifies, with the ids of greedy search
    ctc_weight: of CTC in a joint score, (1 - w) · decoder + w · CTC
    num_return_sequences: texts of each utterance in `decode_batch`
    max_new_tokens: where there is a CTC head, also at most as many as an utterance has frames
    top_k, no_repeat_ngram_size: 0 is off; top_p: 1 is off
    """

    search: Search = "attention"
    num_beams: Count = 1
    num_return_sequences: Count = 1
    ctc_weight: Fraction = 0.5
    do_sample: bool = False
    max_new_tokens: Count = 200
    length_penalty: Exponent = 1.0
    temperature: Positive = 1.0
    top_k: CountOrZero = 50
    top_p: PositiveFraction = 1.0
    no_repeat_ngram_size: CountOrZero = 0

    def __post_init__(self) -> None:
        """Raises UserError for options that do not go together."""
        if self.search not in get_args(Search):
            write = f"write one of {', '.join(get_args(Search))}"
            raise UserError("decoding.search", self.search, f"search has no option {self.search!r}", write)
        if self.do_sample and self.search != "attention":
            write = "write decoding=sample, or decoding.do_sample=false"
            raise UserError("decoding.do_sample", True, f"search={self.search} does not sample", write)
        if self.search == "speculative" and self.num_beams > 1:
            write = "write decoding.num_beams=1, or decoding=joint for a beam"
            raise UserError("decoding.num_beams", self.num_beams, "search=speculative is greedy search", write)
        if self.num_return_sequences > self.num_beams and not self.do_sample:
            write = f"write decoding.num_beams={self.num_return_sequences} or more"
            wrong = f"num_beams={self.num_beams} beams end in no more texts than that"
            raise UserError("decoding.num_return_sequences", self.num_return_sequences, wrong, write)

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
            raise UserError("decoding.search", self.search, wrong, write)


@torch.inference_mode()
def decode_batch(
    model: SpeechEncoderDecoder, tokenizer: PreTrainedTokenizerBase, batch: Batch, options: DecodingOptions
) -> list[Hypotheses]:
    """The best `num_return_sequences` hypotheses for each of the B utterances, in their order, without prompts.

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
    options = replace(options, max_new_tokens=most_new_tokens(model, prompts.shape[1], options))
    lattice = None if options.search == "attention" else lattice_of(model, encoded)
    if lattice is not None and options.search in ("ctc", "rescore"):
        found = by_ctc(model, encoded, prompts, options, lattice)
    else:
        found = generated(model, encoded, prompts, options, lattice)
    if was_training:
        model.train()
    limits = [options.max_new_tokens] * len(found)
    if model.ctc_head is not None:
        limits = most_tokens(encoded).clamp(max=options.max_new_tokens).tolist()
    return [
        replace(each, texts=texts_of(tokenizer, each.ids), is_cut=len(each.ids[0]) >= limit)
        for each, limit in zip(found, limits, strict=True)
    ]


def most_new_tokens(model: SpeechEncoderDecoder, num_given: int, options: DecodingOptions) -> int:
    """Tokens that a text may have behind a prompt of `num_given`: at most those that the decoder has positions for."""
    if model.max_tokens is None:
        return options.max_new_tokens
    return max(1, min(options.max_new_tokens, model.max_tokens + 1 - num_given))


def texts_of(tokenizer: PreTrainedTokenizerBase, ids: list[list[int]]) -> tuple[str, ...]:
    return tuple(text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True))


def by_ctc(
    model: SpeechEncoderDecoder, encoded: EncodedSpeech, prompts: Tensor, options: DecodingOptions, lattice: Lattice
) -> list[Hypotheses]:
    """Texts of CTC, as it ranks them or as both do."""
    num_beams, num_best, most = options.num_beams, options.num_return_sequences, options.max_new_tokens
    if options.search == "rescore":
        found = prefix_beam(lattice, num_beams, num_beams, most)
        return rescored(model, encoded, prompts, found, options.ctc_weight, num_best)
    if num_beams == 1:
        return best_path(lattice, most)
    return prefix_beam(lattice, num_beams, num_best, most)


def generated(
    model: SpeechEncoderDecoder,
    encoded: EncodedSpeech,
    prompts: Tensor,
    options: DecodingOptions,
    lattice: Lattice | None,
) -> list[Hypotheses]:
    """Texts that the decoder writes."""
    model.settle_generation_config()
    ends, num_best = end_tokens(model.generation_config), options.num_return_sequences
    if (steps := steps_of_search(model, options)) is not None:
        rows, scores = by_loop(model, steps, encoded, prompts, options, lattice)
    else:
        rows, scores = by_generate(model, encoded, prompts, options, lattice)
    pad = model.config.pad_token_id
    return [
        Hypotheses.of_rows(rows[n * num_best : (n + 1) * num_best], scores[n], ends, pad) for n in range(len(prompts))
    ]


def steps_of_search(model: SpeechEncoderDecoder, options: DecodingOptions) -> Steps | None:
    """What the loop of this package searches with; None where the search is left to `generate`."""
    generation = model.generation_config
    is_special = generation.early_stopping or generation.stop_strings or generation.max_time
    if options.do_sample or is_special or generation.use_cache is False:
        return None
    if options.search == "speculative" and processors_of(model, options, 1, model.device):
        return None
    return steps_of(model, options.max_new_tokens)


def processors_of(
    model: SpeechEncoderDecoder, options: DecodingOptions, num_prompt: int, device: torch.device, *own: LogitsProcessor
) -> LogitsProcessorList:
    """What changes scores: `own`, the options and the settings that were saved with the model, such as a forced end."""
    generation = copy(model.generation_config)
    vars(generation).update(options.generation_kwargs(), max_length=num_prompt + options.max_new_tokens)
    model._prepare_special_tokens(generation, True, device=device)
    processors: LogitsProcessorList = model._get_logits_processor(
        generation, num_prompt, logits_processor=LogitsProcessorList(own), device=device
    )
    return processors


def loop_of(model: SpeechEncoderDecoder, options: DecodingOptions) -> str:
    """Names what searches: sedtrain's own loop, or `generate` of transformers for what that loop does not drive."""
    if options.search in ("ctc", "rescore"):
        return "sedtrain"
    return "generate" if steps_of_search(model, options) is None else "sedtrain"


def by_loop(
    model: SpeechEncoderDecoder,
    steps: Steps,
    encoded: EncodedSpeech,
    prompts: Tensor,
    options: DecodingOptions,
    lattice: Lattice | None,
) -> Found:
    """The rows that `generate` would write."""
    limits = torch.full((len(prompts),), options.max_new_tokens, device=prompts.device)
    if model.ctc_head is not None:
        limits = limits.minimum(most_tokens(encoded))
    ends = end_tokens(model.generation_config)
    if lattice is not None and options.search == "speculative":
        task = Task(steps, encoded, prompts, limits, ends, LogitsProcessorList())
        return speculate(task, drafts_of(lattice, options)), [None] * len(prompts)
    own = [] if lattice is None or not options.ctc_weight else [JointScores(lattice, options.ctc_weight, ends)]
    processors = processors_of(model, options, prompts.shape[1], prompts.device, *own)
    task = Task(steps, encoded, prompts, limits, ends, processors, leaves=not own)
    if options.num_beams == 1:
        return greedy(task), [None] * len(prompts)
    texts, scores = beam_search(task, options.num_beams, options.num_return_sequences, options.length_penalty)
    return [row for each in texts for row in each], scores.tolist() if options.num_return_sequences > 1 else [
        None
    ] * len(prompts)


def by_generate(
    model: SpeechEncoderDecoder,
    encoded: EncodedSpeech,
    prompts: Tensor,
    options: DecodingOptions,
    lattice: Lattice | None,
) -> Found:
    """The rows that `generate` writes; the scores of n-best beams are those of the beams."""
    num_best = options.num_return_sequences
    kwargs = {**options.generation_kwargs(), "num_return_sequences": num_best}
    if model.ctc_head is not None:
        kwargs["stopping_criteria"] = StoppingCriteriaList([InTime(prompts.shape[1] + most_tokens(encoded))])
    if lattice is not None:
        kwargs |= with_ctc(options, lattice, most_tokens(encoded), end_tokens(model.generation_config))
    if is_scored := num_best > 1 and options.num_beams > 1:
        kwargs |= {"return_dict_in_generate": True, "output_scores": True}
    output = model.generate(
        encoder_outputs=encoded,
        decoder_input_ids=prompts,
        synced_gpus=False,  # where weights lie in pieces on several ranks, the validation has gathered them
        **kwargs,
    )
    rows = (output.sequences if is_scored else output)[:, prompts.shape[1] :]
    scores = output.sequences_scores.unflatten(0, (-1, num_best)).tolist() if is_scored else [None] * len(prompts)
    return rows.tolist(), scores


def most_tokens(encoded: EncodedSpeech) -> Tensor:
    """(B,) tokens that each utterance may have: one a frame, and the end."""
    return frames_of(encoded) + 1


def with_ctc(options: DecodingOptions, lattice: Lattice, limits: Tensor, ends: list[int]) -> dict[str, Any]:
    """What CTC adds to `generate`: scores or a draft."""
    if options.search == "speculative":
        return {"custom_generate": Speculative(drafts_of(lattice, options), limits.tolist())}
    scores = [JointScores(lattice, options.ctc_weight, ends)] if options.ctc_weight else []
    return {"logits_processor": LogitsProcessorList(scores)}


def drafts_of(lattice: Lattice, options: DecodingOptions) -> list[list[int]]:
    return [found.ids[0] for found in best_path(lattice, options.max_new_tokens)]


class InTime(StoppingCriteria):
    """Ends each utterance at its own length, whatever the others of the batch are.

    limits: (B,) tokens, prompt included
    """

    def __init__(self, limits: Tensor) -> None:
        self.limits = limits

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B N, U) tokens of N beams -> (B N,)"""
        return input_ids.shape[1] >= self.limits.repeat_interleave(len(input_ids) // len(self.limits))
