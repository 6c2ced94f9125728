"""Texts that the decoder writes: by the loop of this package where it drives the decoder, else by `generate` of transformers.

B batch, N beams, P prompt, U generated tokens.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from sedtrain.decoding.ctc import Lattice, best_path
from sedtrain.decoding.hypotheses import Hypotheses, end_tokens
from sedtrain.decoding.joint import JointScores
from sedtrain.decoding.loop import Task, beam_search, greedy
from sedtrain.decoding.options import DecodingOptions
from sedtrain.decoding.speculative import speculate
from sedtrain.errors import UserError
from sedtrain.models.encoder import EncodedSpeech
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.models.steps import Steps, steps_of

Found = tuple[list[list[int]], list[list[float] | None]]
"""Rows of tokens, the hypotheses of an utterance together, and the scores of each utterance."""


@dataclass(frozen=True)
class Wanted:
    """Utterances and how their texts are searched.

    prompts: (B, P)
    limits:  (B,) most tokens behind the prompt
    lattice: of CTC, for the searches that use it
    added:   processors of scores that look at each row alone
    """

    encoded: EncodedSpeech
    prompts: Tensor
    limits: Tensor
    options: DecodingOptions
    lattice: Lattice | None = None
    added: Sequence[LogitsProcessor] = ()

    @property
    def most(self) -> int:
        return int(self.limits.max())

    def processors(self, ends: list[int]) -> list[LogitsProcessor]:
        """Processors of scores: CTC's in a joint search, and those that were added."""
        if self.lattice is None or self.options.search != "joint" or not self.options.ctc_weight:
            return [*self.added]
        return [JointScores(self.lattice, self.options.ctc_weight, ends), *self.added]


def generated(model: SpeechEncoderDecoder, wanted: Wanted) -> list[Hypotheses]:
    """The texts; the scores are those of the beams."""
    model.settle_generation_config()
    ends, num_best = end_tokens(model.generation_config), wanted.options.num_return_sequences
    steps = steps_of_search(model, wanted.options, wanted.most)
    rows, scores = by_generate(model, wanted) if steps is None else by_loop(model, steps, wanted)
    pad = model.config.pad_token_id
    return [
        Hypotheses.of_rows(rows[n * num_best : (n + 1) * num_best], scores[n], ends, pad)
        for n in range(len(wanted.prompts))
    ]


def steps_of_search(model: SpeechEncoderDecoder, options: DecodingOptions, most: int | None = None) -> Steps | None:
    """What the loop of this package searches with; None where the search is left to `generate`.

    most: tokens of a text, for which the decoder needs positions
    """
    generation = model.generation_config
    is_special = generation.early_stopping or generation.stop_strings or generation.max_time
    if options.do_sample or is_special or generation.use_cache is False:
        return None
    if options.search == "speculative" and processors_of(model, options, 1, 1, model.device):
        return None
    return steps_of(model, most or options.max_new_tokens or 1)


def processors_of(
    model: SpeechEncoderDecoder,
    options: DecodingOptions,
    num_prompt: int,
    most: int,
    device: torch.device,
    own: Sequence[LogitsProcessor] = (),
) -> LogitsProcessorList:
    """What changes scores: `own`, the options and the settings that were saved with the model.

    No end is forced at the limit of a text, as BART's is: a text that is cut has to be told from one that ends.
    Raises UserError for saved settings that are none.
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
    """Names what searches: sedtrain's own loop, or `generate` of transformers for what that loop does not drive."""
    if options.search in ("ctc", "rescore"):
        return "sedtrain"
    return "generate" if steps_of_search(model, options) is None else "sedtrain"


def by_loop(model: SpeechEncoderDecoder, steps: Steps, wanted: Wanted) -> Found:
    """The rows that `generate` would write."""
    options, prompts, ends = wanted.options, wanted.prompts, end_tokens(model.generation_config)
    unknown: list[list[float] | None] = [None] * len(prompts)
    if options.search == "speculative":
        assert wanted.lattice is not None
        drafts = [found.ids[0] for found in best_path(wanted.lattice, wanted.most)]
        task = Task(steps, wanted.encoded, prompts, wanted.limits, ends, LogitsProcessorList())
        return speculate(task, drafts), unknown
    own = wanted.processors(ends)
    processors = processors_of(model, options, prompts.shape[1], wanted.most, prompts.device, own)
    leaves = len(own) == len(wanted.added)  # joint scores count the rows of the batch
    task = Task(steps, wanted.encoded, prompts, wanted.limits, ends, processors, leaves)
    if options.num_beams == 1:
        return greedy(task), unknown
    texts, scores = beam_search(task, options.num_beams, options.num_return_sequences, options.length_penalty)
    return [row for each in texts for row in each], scores.tolist()


def by_generate(model: SpeechEncoderDecoder, wanted: Wanted) -> Found:
    """The rows that `generate` writes; those of a speculative search are those of greedy search, in as many calls."""
    options, prompts, num_best = wanted.options, wanted.prompts, wanted.options.num_return_sequences
    kwargs: dict[str, Any] = {
        **options.generation_kwargs(),
        "num_return_sequences": num_best,
        "max_new_tokens": wanted.most + 1,  # never reached: there BART is forced to end its text
        "stopping_criteria": StoppingCriteriaList([InTime(prompts.shape[1] + wanted.limits)]),
        "logits_processor": LogitsProcessorList(wanted.processors(end_tokens(model.generation_config))),
    }
    if is_scored := num_best > 1 and options.num_beams > 1:  # it keeps the scores of all tokens in all steps
        kwargs |= {"return_dict_in_generate": True, "output_scores": True}
    output = model.generate(
        encoder_outputs=wanted.encoded,
        decoder_input_ids=prompts,
        synced_gpus=False,  # where weights lie in pieces on several ranks, the validation has gathered them
        **kwargs,
    )
    rows = (output.sequences if is_scored else output)[:, prompts.shape[1] :]
    scores = output.sequences_scores.unflatten(0, (-1, num_best)).tolist() if is_scored else [None] * len(prompts)
    return rows.tolist(), scores


@dataclass(eq=False)
class InTime(StoppingCriteria):
    """Ends each utterance at its own length, whatever the others of the batch are.

    limits: (B,) tokens, prompt included
    """

    limits: Tensor

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B N, U) tokens of N beams -> (B N,)"""
        return input_ids.shape[1] >= self.limits.repeat_interleave(len(input_ids) // len(self.limits))
