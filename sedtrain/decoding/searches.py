"""Searches in which the decoder writes the text: in sedtrain's own loop where that can drive it, else in `generate`.

B batch, N beams, P prompt, U generated tokens.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from sedtrain.decoding.ctc import Lattice
from sedtrain.decoding.hypotheses import Hypotheses, end_tokens
from sedtrain.decoding.joint import JointScores
from sedtrain.decoding.loop import Task, beam_search, greedy
from sedtrain.decoding.options import DecodingOptions
from sedtrain.decoding.speculative import speculate
from sedtrain.errors import UserError
from sedtrain.models.encoder import EncodedSpeech
from sedtrain.models.positions import most_new_tokens
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.models.steps import Steps, decoder_steps

Found = tuple[list[list[list[int]]], list[list[float] | None]]
"""For each utterance, the tokens of its hypotheses, and their scores."""


@dataclass(frozen=True)
class SearchInputs:
    """Encoded utterances, and how to search their texts.

    prompts: (B, P)
    limits:  (B,) most tokens after the prompt
    lattice: scores of CTC, for the searches that use it
    added:   processors of scores that look at each row by itself
    """

    encoded: EncodedSpeech
    prompts: Tensor
    limits: Tensor
    options: DecodingOptions
    lattice: Lattice | None = None
    added: Sequence[LogitsProcessor] = ()

    def rows(self, order: list[int]) -> "SearchInputs":
        """The utterances at the indices `order`."""
        lattice = None if self.lattice is None else self.lattice.rows(order)
        encoded, prompts, limits = self.encoded.rows(order), self.prompts[order], self.limits[order]
        return replace(self, encoded=encoded, prompts=prompts, limits=limits, lattice=lattice)

    @property
    def most(self) -> int:
        return int(self.limits.max())

    def processors(self, ends: list[int]) -> list[LogitsProcessor]:
        """The added processors of scores; in a joint search, CTC's first."""
        if self.lattice is None or self.options.search != "joint" or not self.options.ctc_weight:
            return [*self.added]
        return [JointScores(self.lattice, self.options.ctc_weight, ends), *self.added]


def by_decoder(model: SpeechEncoderDecoder, inputs: SearchInputs) -> list[Hypotheses]:
    """Texts that the decoder writes; beam search gives them scores."""
    model.settle_generation_config()
    steps = steps_of_search(model, inputs.options, inputs.most)
    found = by_generate(model, inputs) if steps is None else by_loop(model, steps, inputs)
    ends, pad = end_tokens(model.generation_config), model.config.pad_token_id
    return [Hypotheses.of_rows(rows, scores, ends, pad) for rows, scores in zip(*found, strict=True)]


def steps_of_search(model: SpeechEncoderDecoder, options: DecodingOptions, most: int | None = None) -> Steps | None:
    """The decoder's steps for sedtrain's own loop; None where `generate` has to search.

    most: tokens of the longest text; the decoder needs a position for each
    """
    generation = model.generation_config
    is_special = generation.early_stopping or generation.stop_strings or generation.max_time
    if options.do_sample or is_special or generation.use_cache is False:
        return None
    if options.search == "speculative" and processors_of(model, options, 1, 1, model.device):
        return None
    return decoder_steps(model, most or options.max_new_tokens or 1)


def processors_of(
    model: SpeechEncoderDecoder,
    options: DecodingOptions,
    num_prompt: int,
    most: int,
    device: torch.device,
    own: Sequence[LogitsProcessor] = (),
) -> LogitsProcessorList:
    """Processors that change scores: `own`, and those that the options and the model's saved settings ask for.

    BART would force an end at the limit. Here none is forced, since a cut text has to be told from one that ended.
    Raises UserError for saved settings that transformers refuses.
    """
    generation = copy(model.generation_config)
    values = options.generation_kwargs() | {"forced_eos_token_id": None, "max_length": num_prompt + most}
    vars(generation).update(values)
    given = LogitsProcessorList(own)
    try:
        model._prepare_special_tokens(generation, True, device=device)
        processors = model._get_logits_processor(generation, num_prompt, logits_processor=given, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        wrong = f"the settings of its generation_config.json gave: {type(error).__name__} {str(error)[:160]}"
        write = "write checkpoint=FOLDER with the generation_config.json that was saved with the model"
        raise UserError("checkpoint", model.name_or_path, wrong, write) from error
    return cast(LogitsProcessorList, processors)


def loop_of(model: SpeechEncoderDecoder, options: DecodingOptions) -> str:
    """The loop that searches: `sedtrain`, its own, or `generate`, the one of transformers."""
    if options.search in ("ctc", "rescore"):
        return "sedtrain"
    return "generate" if steps_of_search(model, options) is None else "sedtrain"


def by_loop(model: SpeechEncoderDecoder, steps: Steps, inputs: SearchInputs) -> Found:
    """The rows that `generate` would write, by sedtrain's own loop."""
    options, prompts, ends = inputs.options, inputs.prompts, end_tokens(model.generation_config)
    no_scores: list[list[float] | None] = [None] * len(prompts)
    if options.search == "speculative":
        assert inputs.lattice is not None
        task = Task(steps, inputs.encoded, prompts, inputs.limits, ends, LogitsProcessorList())
        return [[row] for row in speculate(task, inputs.lattice.best_path[0])], no_scores
    own = inputs.processors(ends)
    processors = processors_of(model, options, prompts.shape[1], inputs.most, prompts.device, own)
    leaves = len(own) == len(inputs.added)  # joint scores count the rows of the batch
    task = Task(steps, inputs.encoded, prompts, inputs.limits, ends, processors, leaves)
    if options.num_beams == 1:
        return [[row] for row in greedy(task)], no_scores
    texts, scores = beam_search(task, options.num_beams, options.num_return_sequences, options.length_penalty)
    return texts, scores.tolist()


def by_generate(model: SpeechEncoderDecoder, inputs: SearchInputs) -> Found:
    """The rows that `generate` writes, each within its own limit.

    Behind a prefix, `generate` needs a position of every row in every step, ended texts included. So all rows end where the
    longest audio leaves no more positions; rows that may go on are then searched again, without it.
    """
    rooms, limits, num_given = model.rooms(inputs.encoded), inputs.limits.tolist(), inputs.prompts.shape[1]
    most = max(limits) if rooms is None else most_new_tokens(max(limits), min(rooms), num_given)
    ended = OwnLimit(num_given + inputs.limits.clamp(max=most))
    rows, scores = generated(model, inputs, ended)
    longer = [row for row, limit in enumerate(limits) if limit > most] if ended.num_tokens >= num_given + most else []
    if longer:
        for row, texts, of_texts in zip(longer, *by_generate(model, inputs.rows(longer)), strict=True):
            rows[row], scores[row] = texts, of_texts
    return rows, scores


def generated(model: SpeechEncoderDecoder, inputs: SearchInputs, ended: "OwnLimit") -> Found:
    """The rows of one call of `generate`. A speculative search becomes greedy search here, which writes the same ids."""
    options, prompts, num_best = inputs.options, inputs.prompts, inputs.options.num_return_sequences
    kwargs: dict[str, Any] = {
        **options.generation_kwargs(),
        "num_return_sequences": num_best,
        "max_new_tokens": inputs.most + 1,  # never reached: there BART is forced to end its text
        "stopping_criteria": StoppingCriteriaList([ended]),
        "logits_processor": LogitsProcessorList(inputs.processors(end_tokens(model.generation_config))),
    }
    if is_scored := num_best > 1 and options.num_beams > 1:  # only then, as the scores of all steps stay in memory
        kwargs |= {"return_dict_in_generate": True, "output_scores": True}
    output = model.generate(
        encoder_outputs=inputs.encoded,
        decoder_input_ids=prompts,
        synced_gpus=False,  # validation has gathered weights that are sharded over ranks
        **kwargs,
    )
    rows = (output.sequences if is_scored else output)[:, prompts.shape[1] :]
    scores = output.sequences_scores.unflatten(0, (-1, num_best)).tolist() if is_scored else [None] * len(prompts)
    return rows.unflatten(0, (-1, num_best)).tolist(), scores


@dataclass(eq=False)
class OwnLimit(StoppingCriteria):
    """Ends each text at the limit of its utterance, whatever else is in the batch.

    limits: (B,) tokens, prompt included
    num_tokens: tokens of the longest text so far
    """

    limits: Tensor
    num_tokens: int = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B N, U) tokens of N beams -> (B N,)"""
        self.num_tokens = input_ids.shape[1]
        return input_ids.shape[1] >= self.limits.repeat_interleave(len(input_ids) // len(self.limits))
