"""Attention implementations: checks that a model has the requested one, and offers others."""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.utils import is_flash_attn_2_available

from sedtrain.errors import UserError, in_python, one_line
from sedtrain.models.config_ranges import UNBUILDABLE

ATTENTION_FLAGS = {
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}


@contextmanager
def building(
    part: str, config: PreTrainedConfig, failures: tuple[type[Exception], ...] = UNBUILDABLE
) -> Iterator[None]:
    """Turns a failure to build a model into a UserError, for example an attention implementation that the family lacks.

    part: "encoder" or "decoder", for the options that an error names
    None (`attention=auto`) is never refused: transformers takes sdpa if the family has it, else eager.
    """
    if config._attn_implementation == "flex_attention":
        refuse_flex(part, config)
    try:
        yield
    except UserError:
        raise
    except failures as error:
        reason = one_line(error, 160) or type(error).__name__
        if re.search("attention(?! heads)|attn", str(error), re.IGNORECASE):
            raise unusable_attention(part, config, reason) from error
        write = f"write {part}.options.NAME=VALUE that fits"
        raise UserError(f"{part}.model_type", config.model_type, reason, write) from error


def building_with(part: str, config: PreTrainedConfig, options: Mapping[str, Any]) -> AbstractContextManager[None]:
    """`building` with the attention implementation in the loading options; nothing if they name none."""
    if options.get("attn_implementation") is None:
        return nullcontext()
    config._attn_implementation = options["attn_implementation"]
    return building(part, config)


def refuse_unsupported(config: PreTrainedConfig, attention: str | dict[str, str] | None) -> None:
    """Raises UserError if the encoder or the decoder of a joined model lacks its attention implementation.

    attention: one for both, or {"encoder": ..., "decoder": ...}
    """
    for part in ("encoder", "decoder"):
        wanted = attention.get(part) if isinstance(attention, dict) else attention
        flag, family = ATTENTION_FLAGS.get(wanted or ""), family_of(getattr(config, part))
        if flag and family and not getattr(family, flag, False):
            refused = copy.copy(getattr(config, part))
            refused._attn_implementation = wanted
            raise unusable_attention(part, refused, f"{family.__name__} does not have it")


def family_of(config: PreTrainedConfig) -> Any:
    """The model class in transformers with this configuration; None for a user's own class."""
    kind = type(config)
    return transformers.MODEL_MAPPING.get(kind, None) or transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None)


def unusable_attention(part: str, config: PreTrainedConfig, reason: str) -> UserError:
    """A UserError that offers the implementations which the family can train with on this machine."""
    family, refused = family_of(config), config._attn_implementation
    machine_lacks = {
        "flash_attention_2": not is_flash_attn_2_available(True),
        "flex_attention": not torch.cuda.is_available(),
    }
    family_has = [name for name, flag in ATTENTION_FLAGS.items() if getattr(family, flag, False)]
    usable = [name for name in ("eager", *family_has) if name != refused and not machine_lacks.get(name)]
    offered = " or ".join(f"{part}.attention={name}" for name in usable)
    wrong = f"{config.model_type} cannot use it here: {reason}"
    return UserError(f"{part}.attention", refused, wrong, *or_best_attention(offered))


def or_best_attention(offered: str) -> tuple[str, str]:
    """Remedies for an unusable attention implementation, on the command line and in Python."""
    best = "the best that encoder and decoder each can"
    return f"write {offered}, or attention=auto, {best}", f"write {in_python(offered)}, or none, for {best}"


def refuse_flex(part: str, config: PreTrainedConfig) -> None:
    """Raises UserError on a CPU and for attention dropout; FlexAttention itself would only fail during training."""
    if not torch.cuda.is_available():
        raise unusable_attention(part, config, "FlexAttention has no backward on a CPU")
    for name in ("attention_dropout", "attention_probs_dropout_prob"):
        if rate := getattr(config, name, 0.0):
            wrong = f"it has no dropout, and {name} is {rate}"
            write = or_best_attention(f"{part}.options.{name}=0")
            raise UserError(f"{part}.attention", "flex_attention", wrong, *write)
