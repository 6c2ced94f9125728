"""Rules of the greedy search under JAX, from the generation configuration."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import GenerationConfig

from sedtrain.errors import UserError
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

DEFAULT_LENGTH = 21  # the start token and 20 tokens, as in transformers
GREEDY = {"num_beams": 1, "do_sample": False, "num_return_sequences": 1, "penalty_alpha": None, "dola_layers": None}
UNCHANGED = {
    **{"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "guidance_scale": 1.0},
    **{"encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "sequence_bias": None, "suppress_tokens": None},
    **{"begin_suppress_tokens": None, "exponential_decay_length_penalty": None, "stop_strings": None},
}
"""Values with which `generate` of transformers does not change the scores."""


class Rules(NamedTuple):
    """Rules of a greedy search.

    room:        longest text, with its start token
    least:       no end token before this position
    first, last: tokens forced at position 1 and at the last position; None for none
    """

    room: int
    start: int
    ends: tuple[int, ...]
    pad: int
    least: int
    first: int | None
    last: int | None


def rules_of(model: SpeechEncoderDecoder, options: Mapping[str, Any]) -> Rules:
    """The rules of a greedy search, from a call's options and, for the others, the generation configuration."""
    model.settle_generation_config()
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    if unknown := config.update(**options):
        name, value = next(iter(unknown.items()))
        raise UserError(name, value, "generation has no such option", "write an option of GenerationConfig")
    for name, plain in {**GREEDY, **UNCHANGED}.items():
        if (value := getattr(config, name, None)) not in (plain, None, [], False):
            write = f"write {name}={plain}, or generate with PyTorch: model.model.generate(...)"
            raise UserError(name, value, "under JAX the search is greedy, and does not change scores", write)
    room = DEFAULT_LENGTH if config.max_length is None else config.max_length
    room = room if config.max_new_tokens is None else 1 + config.max_new_tokens
    room = room if model.max_tokens is None else min(room, model.max_tokens + 1)
    start = config.bos_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [end for end in ends if end is not None]
    least = max(config.min_length or 0, 1 + config.min_new_tokens if config.min_new_tokens else 0)
    pad = config.pad_token_id if config.pad_token_id is not None else (ends or [0])[0]
    return Rules(room, start, tuple(ends), pad, least, config.forced_bos_token_id, config.forced_eos_token_id)
