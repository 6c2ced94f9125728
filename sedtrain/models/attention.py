"""Which attention implementations a part can use, and the clear refusal of the others."""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedConfig
from transformers.utils import is_flash_attn_2_available

from sedtrain.batch import UserError

ATTENTION_FLAGS = {
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}


@contextmanager
def attention_of(part: str, config: PreTrainedConfig) -> Iterator[None]:
    """While a model is made, an attention implementation that the family or the machine lacks becomes a UserError.

    None, which `attention=auto` stands for, is never refused: transformers then takes sdpa where the family has it, else eager.
    """
    attention = config._attn_implementation
    if attention == "flex_attention":
        refuse_flex(part, config)
    try:
        yield
    except (ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, UserError):
            raise
        if not re.search("attention(?! heads)|attn", reason, re.IGNORECASE):
            raise UserError(f"{part}.options: {reason[:200]}", f"{part}.options.NAME=VALUE that fits") from error
        raise unusable_attention(part, config, reason[:160]) from error


def attention_wanted(part: str, config: PreTrainedConfig, options: Mapping[str, Any]) -> AbstractContextManager[None]:
    """`attention_of` where loading options ask for an implementation, else nothing."""
    if options.get("attn_implementation") is None:
        return nullcontext()
    config._attn_implementation = options["attn_implementation"]
    return attention_of(part, config)


def refuse_unsupported(config: PreTrainedConfig, attention: str | dict[str, str] | None) -> None:
    """Raises UserError for an attention implementation that a part of this joined model does not have.

    attention: of both parts, or of each by its name
    """
    for part in ("encoder", "decoder"):
        wanted = attention.get(part) if isinstance(attention, dict) else attention
        flag, family = ATTENTION_FLAGS.get(wanted or ""), family_of(getattr(config, part))
        if flag and family and not getattr(family, flag, False):
            described = copy.copy(getattr(config, part))
            described._attn_implementation = wanted
            raise unusable_attention(part, described, f"{family.__name__} does not have it")


def family_of(config: PreTrainedConfig) -> Any:
    """The class of transformers with this configuration, None for a class of the user's own."""
    return MODEL_MAPPING.get(type(config), None) or MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def unusable_attention(part: str, config: PreTrainedConfig, reason: str) -> UserError:
    usable = " or ".join(f"{part}.attention={each}" for each in attentions_of(config))
    return UserError(
        f"{part}.attention={config._attn_implementation}: {config.model_type} cannot use it here: {reason}",
        f"{usable}, or attention=auto, the best that each part can",
    )


def attentions_of(config: PreTrainedConfig) -> list[str]:
    """The attention implementations that this family can train with on this machine; the refused one is none of them."""
    family = family_of(config)
    usable = {
        "eager": True,
        "sdpa": getattr(family, "_supports_sdpa", False),
        "flash_attention_2": getattr(family, "_supports_flash_attn", False) and is_flash_attn_2_available(True),
        "flex_attention": getattr(family, "_supports_flex_attn", False) and torch.cuda.is_available(),
    }
    return [name for name, possible in usable.items() if possible and name != config._attn_implementation]


def refuse_flex(part: str, config: PreTrainedConfig) -> None:
    """Raises UserError for what FlexAttention would refuse in the middle of training: a CPU, and dropout."""
    if not torch.cuda.is_available():
        raise unusable_attention(part, config, "FlexAttention has no backward on a CPU")
    for name in ("attention_dropout", "attention_probs_dropout_prob"):
        if rate := getattr(config, name, 0.0):
            raise UserError(
                f"{part}.attention=flex_attention: it has no dropout, and {name} is {rate}",
                f"{part}.options.{name}=0, or attention=auto, the best that each part can",
            )
