"""Text decoders: any `transformers` decoder with cross-attention, by its model type or as a module.

B batch, U target tokens.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sedtrain.errors import UserError
from sedtrain.models.loading import (
    CROSS_ATTENTION,
    attention_of,
    attention_wanted,
    configured,
    load_config,
    load_tokenizer,
    load_weights,
    parts,
    published_name,
)
from sedtrain.text.tokenizers import start_end_pad

ALTERNATIVES = "decoder=bert, roberta, gpt2, bart or mbart, or another decoder with cross-attention layers"


def load_decoder(
    tokenizer: PreTrainedTokenizerBase | None,
    model_type: str,
    tiny: Mapping[str, Any],
    base: str | None = None,
    large: str | None = None,
    size: str = "tiny",
    pretrained: bool = True,
    checkpoint: str | None = None,
    attention: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A causal decoder with cross-attention of a family that `transformers` knows.

    tokenizer: handed over by build; its vocabulary sizes a decoder with random weights
    tiny: the family's configuration for size=tiny; base, large: the Hub ids of the published members
    checkpoint: a Hub id or folder that takes the place of the size's own
    attention: None is sdpa where the family has it, else eager
    options: values of the family's configuration class, for any size
    """
    name = published_name("decoder", size, checkpoint, {"base": base, "large": large})
    config = load_config("decoder", name, model_type, tiny, **(options or {}))
    settle_config(config)
    config._attn_implementation = attention
    if name is None:
        assert tokenizer is not None, "build hands the tokenizer over"
        take_vocabulary(config, tokenizer)
    if name is not None and pretrained:
        decoder = load_weights("decoder", name, AutoModelForCausalLM, config, attention)
    else:
        with attention_of("decoder", config):
            decoder = AutoModelForCausalLM.from_config(config)
    return as_decoder(decoder)


def decoder_from_pretrained(name: str, **options: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained` with a configuration that makes the checkpoint a decoder."""
    if (config := options.pop("config", None)) is None:
        config, options = configured(name, options)
    settle_config(config)
    with attention_wanted("decoder", config, options):
        decoder: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, config=config, **options)
    return decoder


def take_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sets the size and the special tokens of a vocabulary, also those that only some families have."""
    start, end, pad = start_end_pad(tokenizer)
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = start, end, pad
    family = {"decoder_vocab_size": len(tokenizer), "decoder_start_token_id": start, "forced_eos_token_id": end}
    for name in family.keys() & vars(config).keys():
        setattr(config, name, family[name])


def settle_config(config: PreTrainedConfig) -> None:
    """Makes a configuration, in place, that of a decoder which stands alone behind a speech encoder.

    Causal and with cross-attention. Where the family's number of layers is that of its own, absent encoder, it becomes the
    decoder's, by which `generate` sizes the key-value cache; so does the number of attention heads, and of tokens.
    Raises UserError where the language is open (X-MOD).
    """
    config.is_decoder = config.add_cross_attention = True
    config.is_encoder_decoder = False
    for name, source in config.attribute_map.items():
        if name in ("num_hidden_layers", "num_attention_heads") and source.startswith("encoder_"):
            setattr(config, name, getattr(config, source.replace("encoder_", "decoder_")))
    if getattr(config, "decoder_vocab_size", None):
        config.vocab_size = config.decoder_vocab_size
    if getattr(config, "encoder_no_repeat_ngram_size", 0):
        config.encoder_no_repeat_ngram_size = 0  # Blenderbot's: what its encoder reads is text
    if getattr(config, "default_language", "") is None:
        if len(config.languages) > 1:
            raise UserError(
                f"decoder {config.model_type} has adapters of {len(config.languages)} languages and is told of none to use",
                f"decoder.options.default_language=ONE_OF {', '.join(config.languages)}",
            )
        config.default_language = config.languages[0]


def refuse_deaf(decoder: PreTrainedModel) -> None:
    """Raises UserError for a decoder that would train to a finite loss without ever hearing the audio."""
    name = type(decoder).__name__
    if not takes_audio(decoder.forward):
        raise UserError(
            f"decoder {name} has no cross-attention: it would never hear the audio",
            ALTERNATIVES,
        )
    if not has_cross_attention(decoder):
        looks_ahead = any(getattr(module, "is_decoder", True) is False for module in decoder.modules())
        raise UserError(
            f"decoder {name} was built without cross-attention: it would never hear the audio"
            + (", and each token would see the later ones" if looks_ahead else ""),
            f"{name}(config) with config.is_decoder = config.add_cross_attention = True "
            "(modules of your own: named cross_attn, crossattention or encoder_attn)",
        )


def takes_audio(forward: Callable[..., Any]) -> bool:
    return "encoder_hidden_states" in inspect.signature(forward).parameters


def has_cross_attention(decoder: nn.Module) -> bool:
    return any(
        CROSS_ATTENTION.search(name.rpartition(".")[2]) or isinstance(module, nn.TransformerDecoderLayer)
        for name, module in decoder.named_modules()
    )


def as_decoder(decoder: PreTrainedModel) -> PreTrainedModel:
    """The decoder itself, its configuration settled; one of transformers that was built deaf is rebuilt, with a warning.

    Rebuilt around the same weights is a module made without `is_decoder`, `add_cross_attention` or an output layer, or
    with an encoder of its own. The tensors are shared, not copied: dtype, device and what is frozen stay; so does the
    training mode. Raises UserError where the family has no decoder that hears the audio.
    """
    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(decoder.config), None)
    of_transformers = type(decoder).__module__.startswith("transformers.")
    complete = takes_audio(decoder.forward) and (decoder.can_generate() or not of_transformers)
    if complete and has_cross_attention(decoder):
        settle_config(decoder.config)
        fix_sinusoids(decoder)
        return decoder
    rebuilt_class = type(decoder) if complete else family
    if not of_transformers or rebuilt_class is None or not takes_audio(rebuilt_class.forward):
        refuse_deaf(decoder)
        raise UserError(
            f"decoder {type(decoder).__name__} has no output layer, and its family no decoder that could have one",
            ALTERNATIVES,
        )
    return rebuilt(decoder, rebuilt_class)


def rebuilt(module: PreTrainedModel, decoder_class: type[PreTrainedModel]) -> PreTrainedModel:
    """A decoder of this class that holds the module's weights; what the module has not starts random, with a warning."""
    config = copy.deepcopy(module.config)
    settle_config(config)
    decoder = decoder_class(config).to(module.device, module.dtype).train(module.training)
    weights = module.state_dict(keep_vars=True)
    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    place = max(decoder.modules(), key=lambda part: len(weights.keys() & part.state_dict().keys()))
    place.load_state_dict(weights, strict=False, assign=True)
    decoder.tie_weights()
    for weight in frozen:
        weight.requires_grad_(False)
    refuse_deaf(decoder)
    fix_sinusoids(decoder)
    given, used = set(weights.values()), set(decoder.parameters())
    new = parts(name for name, weight in decoder.named_parameters() if weight not in given)
    unused = parts(name for name, weight in module.named_parameters() if weight not in used)
    told = {"starting at random": new, "left out": unused}
    warnings.warn(
        f"decoder {type(module).__name__} as it was built cannot hear audio and write text: it goes on as a new "
        f"{decoder_class.__name__} with the same weights"
        + "".join(f"; {what}: {of}" for what, of in told.items() if of),
        stacklevel=3,
    )
    return decoder


def fix_sinusoids(decoder: nn.Module) -> None:
    """Makes computed position embeddings buffers: as parameters they get no gradient, and loading unfreezes them."""
    for module in decoder.modules():
        if (
            isinstance(module, nn.Embedding)
            and "Sinusoidal" in type(module).__name__
            and "weight" in module._parameters
        ):
            weight = module._parameters.pop("weight")
            assert weight is not None
            module.register_buffer("weight", weight.detach())


def decoder_positions(
    decoder: PreTrainedModel, tokens: Tensor, past_length: int, attention_mask: Tensor | None = None
) -> Tensor | None:
    """(B, U) position ids that count every real token; None where the family's own do.

    RoBERTa and its like give no position to tokens that are their pad token, and forget that on the next cached step: with
    the pad token in front or within, training and cached decoding differ. Without one these positions are theirs.

    tokens: (B, U) ids or (B, U, D) embeddings of them, behind `past_length` tokens in the cache
    attention_mask: (B, past_length + U), 0 where a prompt is padded
    """
    embeddings: Any = getattr(decoder.base_model, "embeddings", None)
    if not hasattr(embeddings, "create_position_ids_from_input_ids"):
        return None
    batch_size, num_tokens = tokens.shape[:2]
    if attention_mask is not None:
        real = attention_mask.long()
        positions: Tensor = real.cumsum(1) * real + embeddings.padding_idx
        return positions[:, -num_tokens:]
    first: int = embeddings.padding_idx + 1 + past_length
    return (torch.arange(num_tokens, device=tokens.device) + first).expand(batch_size, num_tokens)


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
