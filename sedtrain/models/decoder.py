"""Text decoders: any `transformers` decoder with cross-attention, by its model type."""

import inspect
import re
from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sedtrain.batch import UserError
from sedtrain.models.checkpoint import attention_of, load_config, load_tokenizer, load_weights, published_name
from sedtrain.text import start_end_pad

CROSS_ATTENTION = re.compile(r"cross_?att|encoder_attn|enc_?dec", re.IGNORECASE)


def load_decoder(
    tokenizer: PreTrainedTokenizerBase | None,
    model_type: str,
    tiny: Mapping[str, Any],
    base: str | None = None,
    large: str | None = None,
    size: str = "tiny",
    pretrained: bool = True,
    checkpoint: str | None = None,
    attention: str = "sdpa",
    options: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A causal decoder with cross-attention of a family that `transformers` knows.

    tokenizer: handed over by build; its vocabulary sizes a decoder with random weights
    tiny: the family's configuration for size=tiny; base, large: the Hub ids of the published members
    checkpoint: a Hub id or folder that takes the place of the size's own
    options: values of the family's configuration class, for any size
    """
    name = published_name("decoder", size, checkpoint, {"base": base, "large": large})
    config = load_config("decoder", name, model_type, tiny, **(options or {}))
    config.is_decoder = config.add_cross_attention = True
    config._attn_implementation = attention
    if name is None:
        assert tokenizer is not None, "build hands the tokenizer over"
        config.vocab_size = len(tokenizer)
        config.bos_token_id, config.eos_token_id, config.pad_token_id = start_end_pad(tokenizer)
    if name is not None and pretrained:
        decoder = load_weights("decoder", name, AutoModelForCausalLM, config, attention)
    else:
        with attention_of("decoder", config):
            decoder = AutoModelForCausalLM.from_config(config)
    refuse_deaf(decoder)
    return decoder


def refuse_deaf(decoder: PreTrainedModel) -> None:
    """Raises UserError for a decoder that would train to a finite loss without ever hearing the audio."""
    takes_audio = "encoder_hidden_states" in inspect.signature(decoder.forward).parameters
    has_layers = any(CROSS_ATTENTION.search(name) for name, _ in decoder.named_modules())
    if not (takes_audio and has_layers):
        raise UserError(
            f"decoder {type(decoder).__name__} has no cross-attention: it would never hear the audio",
            "decoder=bert, roberta, gpt2, bart or mbart, or another decoder with cross-attention layers",
        )


def tokenizer_of(
    size: str, checkpoint: str | None, published: Mapping[str, str | None]
) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved beside the decoder's weights; None for a decoder with random weights.

    A tokenizer without a pad token pads with its end token: labels are masked by length, so the end token still counts.
    """
    name = published_name("decoder", size, checkpoint, published)
    if name is None:
        return None
    tokenizer = load_tokenizer("decoder.checkpoint", name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
