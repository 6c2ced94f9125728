"""Text decoders: any causal decoder of `transformers`, by its model type or as a module; prefix.py is for language models.

To add a family (of a whole sequence-to-sequence model: a row in stacks.py, too):
1. `conf/decoder/NAME.yaml`: its `model_type`, its published members, the shape of its tiny one (like conf/decoder/gpt2.yaml).
2. Code, only if it differs from the others: `settle_config` below for its configuration, `decoder_positions` for its
   positions, `ENDS_WITH_OUTPUT_LAYER` in output_layer.py if its logits are exactly what its output layer returns.
3. Its name in `FAMILIES` of tests/config/test_conf.py; then `SEDTRAIN_WRITE_SUPPORT=1 pytest tests/models/test_support.py`
   tests it beside two encoders and writes docs/support.md, and `python tests/options_table.py` writes docs/options.md.

B batch, U target tokens, D width.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.canary.modeling_canary import CanaryPositionalEmbedding
from transformers.models.xmod.modeling_xmod import XmodAdapter

from sedtrain.annotations import checked
from sedtrain.errors import UserError
from sedtrain.models.flax_weights import pretrained
from sedtrain.models.loading import (
    CROSS_ATTENTION,
    attention_of,
    attention_wanted,
    configured,
    default_config,
    load_config,
    load_tokenizer,
    load_weights,
    published_name,
)
from sedtrain.models.mixing import mix_into
from sedtrain.models.options import tried
from sedtrain.models.prefix import arguments_of, behind_prefix, choose_listening, give_prompt, is_prefixed
from sedtrain.models.stacks import decoder_config, out_of_whole
from sedtrain.text.tokenizers import start_end_pad

ALTERNATIVES = (
    "write decoder=bert, roberta, gpt2, bart or mbart, or another decoder with cross-attention",
    "write another decoder: AutoModelForCausalLM.from_pretrained(FOLDER, is_decoder=True, add_cross_attention=True)",
)
"""Remedies for a decoder that cannot be used, on the command line and in Python."""

BROKEN = {
    "big_bird": "its cache of keys and values fails in generation",
    **dict.fromkeys(
        ["gemma3n_text", "gemma4_text"], "its layers read embeddings of their own for each token, which audio has not"
    ),
    "gpt_bigcode": "its multi-query attention has no cross-attention",
    "megatron-bert": "its cross-attention mixes up frames and tokens",
    "minimax": "it takes no cache but its own",
    "moshi": "it writes codes of speech beside its text",
    "prophetnet": "its cross-attention takes no mask of padded frames",
    **dict.fromkeys(
        ["musicgen", "musicgen_decoder", "musicgen_melody", "musicgen_melody_decoder"],
        "it writes codes of music, no text",
    ),
}
"""Families that cannot be fed with audio, or whose cross-attention does not work in transformers, with the reason."""
POSITIONS = re.compile(r"^(?!.*(rel|bias|bucket)).*(position|pos_?emb|wpe)", re.IGNORECASE)
"""Names of tables of absolute positions, not of distances."""


@checked("decoder.")
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
    listens: Literal["cross_attention", "prefix"] | None = None,
    prompt: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A causal decoder of a family that `transformers` knows, which listens by cross-attention or to a prefix of audio.

    tokenizer: handed over by build; its vocabulary sizes a decoder with random weights
    tiny: the family's configuration for size=tiny; base, large: the Hub ids of the published members
    checkpoint: a Hub id or folder that takes the place of the size's own
    attention: None is sdpa if the family has it, else eager
    listens: None is cross_attention if the family has it
    prompt: text with one place for the audio, {audio}; None is a turn of the tokenizer's chat template, if it has one
    options: values of the family's configuration class, for any size
    """
    name = published_name("decoder", size, checkpoint, {"base": base, "large": large})
    options = dict(options or {})
    if name is None:
        refuse_broken(default_config("decoder", model_type))
    config = load_config("decoder", name, model_type, tiny, **options)
    choose_listening(config, listens)
    settle_config(config)
    config._attn_implementation = attention
    if name is None:
        assert tokenizer is not None, "build hands the tokenizer over"
        take_vocabulary(config, tokenizer)
    give_prompt(config, tokenizer, prompt)
    if name is None or not pretrained:
        config.dtype = None  # of the published weights, which may be 16 bits
        chosen = ("decoder.tiny", tiny) if name is None and not options else ("decoder.options", options)
        return tried(*chosen, config, new_decoder, decode_a_token)
    return as_decoder(load_weights("decoder", name, AutoModelForCausalLM, config, attention))


def new_decoder(config: PreTrainedConfig) -> PreTrainedModel:
    """A decoder with cross-attention and random weights."""
    settle_config(config)
    with attention_of("decoder", config):
        return as_decoder(AutoModelForCausalLM.from_config(config, trust_remote_code=False))


def decode_a_token(decoder: PreTrainedModel) -> None:
    """A forward on a text of one token, which chunks of several do not divide, and two frames."""
    frames = torch.zeros(1, 2, decoder.config.hidden_size)
    decoder(input_ids=torch.ones(1, 1, dtype=torch.long), encoder_hidden_states=frames, return_dict=True)


def decoder_from_pretrained(name: str, **options: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained` with a configuration that makes the checkpoint a decoder."""
    if (config := options.pop("config", None)) is None:
        config, options = configured(name, options)
    config = decoder_config(config)
    settle_config(config)
    with attention_wanted("decoder", config, options):
        decoder: PreTrainedModel = pretrained(AutoModelForCausalLM, name, config=config, **options)
    return decoder


def take_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sets size and special tokens of the vocabulary, also under the names that only some families have."""
    start, end, pad = start_end_pad(tokenizer)
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = start, end, pad
    family = {"decoder_vocab_size": len(tokenizer), "decoder_start_token_id": start, "forced_eos_token_id": end}
    for name in family.keys() & vars(config).keys():
        setattr(config, name, family[name])


def refuse_broken(config: PreTrainedConfig) -> None:
    if config.model_type in BROKEN and type(config).__module__.startswith("transformers."):
        raise UserError("decoder.model_type", config.model_type, BROKEN[config.model_type], *ALTERNATIVES)


def settle_config(config: PreTrainedConfig) -> None:
    """Turns a configuration, in place, into that of a decoder behind a speech encoder: causal, with cross-attention.

    `generate` sizes the key-value cache by the number of layers and heads. In some families these are the numbers of their
    own encoder, which is absent here: they become those of the decoder, and so does the number of tokens.
    Raises UserError for a family that does not work, and if no language is chosen (X-MOD).
    """
    refuse_broken(config)
    config.is_decoder, config.is_encoder_decoder, config.add_cross_attention = True, False, not is_prefixed(config)
    if is_prefixed(config):
        config.listens = "prefix"
        return
    for name, source in config.attribute_map.items():
        if name in ("num_hidden_layers", "num_attention_heads") and source.startswith("encoder_"):
            setattr(config, name, getattr(config, source.replace("encoder_", "decoder_")))
    if getattr(config, "num_decoder_layers", None):
        config.num_layers = config.num_decoder_layers
    if getattr(config, "decoder_vocab_size", None):
        config.vocab_size = config.decoder_vocab_size
    if getattr(config, "encoder_no_repeat_ngram_size", 0):
        config.encoder_no_repeat_ngram_size = 0  # Blenderbot's encoder reads text
    if getattr(config, "begin_suppress_tokens", None):
        config.suppress_tokens = config.begin_suppress_tokens = None  # Whisper's, by which no text is empty
    if getattr(config, "default_language", "") is None:
        if len(config.languages) > 1:
            wrong = f"{config.model_type} has adapters of {len(config.languages)} languages, and none is chosen"
            write = f"write decoder.options.default_language=ONE_OF {', '.join(config.languages)}"
            raise UserError("decoder.options.default_language", None, wrong, write)
        config.default_language = config.languages[0]


def as_decoder(decoder: PreTrainedModel) -> PreTrainedModel:
    """The decoder itself, its configuration settled.

    Raises UserError for a decoder that would train to a finite loss without ever hearing the audio, or writes no text.
    """
    if (config := decoder_config(decoder.config)) is not decoder.config:
        settle_config(config)
        decoder = out_of_whole(decoder, config)
    elif is_prefixed(decoder.config) and type(decoder).__name__ in CAUSAL.values():
        settle_config(decoder.config)
        return behind_prefix(decoder)
    refuse_without_cross_attention(decoder)
    settle_config(decoder.config)
    fix_sinusoids(decoder)
    for module in decoder.modules():
        if isinstance(module, XmodAdapter):
            mix_into(module, AdapterOfOneType)
    return decoder


def can_attend(kind: type[PreTrainedModel]) -> bool:
    """True if a class of decoders takes the states of an encoder."""
    return "encoder_hidden_states" in arguments_of(kind.forward)


def refuse_without_cross_attention(decoder: PreTrainedModel) -> None:
    name = type(decoder).__name__
    if not can_attend(type(decoder)):
        wrong = "it takes no encoder_hidden_states: it would never hear the audio"
        raise UserError("decoder", name, wrong, *ALTERNATIVES)
    if type(decoder).__module__.startswith("transformers.") and name not in CAUSAL.values():
        raise UserError("decoder", name, "it is no causal language model: it would write no text", *ALTERNATIVES)
    if not any(
        CROSS_ATTENTION.search(module_name.rpartition(".")[2]) or isinstance(module, nn.TransformerDecoderLayer)
        for module_name, module in decoder.named_modules()
    ):
        looks_ahead = any(getattr(module, "is_decoder", True) is False for module in decoder.modules())
        ahead = ", and each token would see the later ones" if looks_ahead else ""
        wrong = f"it was built without cross-attention: it would never hear the audio{ahead}"
        write = f"write {name}(config) with config.is_decoder = config.add_cross_attention = True"
        own = "(modules of your own: named cross_attn, crossattention or encoder_attn)"
        raise UserError("decoder", name, wrong, f"{write} {own}")


class AdapterOfOneType(nn.Module):
    """Returns the type that it is given, which upstream's 16-bit autocast does not."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        adapted: Tensor = super().forward(hidden_states)
        return adapted.to(hidden_states.dtype)


def fix_sinusoids(decoder: nn.Module) -> None:
    """Makes computed position embeddings buffers: as parameters they get no gradient, and loading unfreezes them."""
    for module in decoder.modules():
        is_computed = isinstance(module, nn.Embedding) and "Sinusoidal" in type(module).__name__
        if is_computed and (weight := module._parameters.pop("weight", None)) is not None:
            module.register_buffer("weight", weight.detach())


def max_tokens(decoder: PreTrainedModel) -> int | None:
    """The number of tokens for which the decoder has positions; None if it computes positions without end.

    RoBERTa and its like leave out the positions up to the padding index.
    """
    tables = [
        module.num_embeddings - getattr(module, "offset", 0)  # BART's begin at 2, which its table allows for
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Embedding) and POSITIONS.search(name.rpartition(".")[2])
    ]
    tables += [module.length for module in decoder.modules() if isinstance(module, CanaryPositionalEmbedding)]
    embeddings: Any = getattr(decoder.base_model, "embeddings", None)
    skipped = embeddings.padding_idx + 1 if hasattr(embeddings, "create_position_ids_from_input_ids") else 0
    return min(tables) - skipped if tables else None


def most_new_tokens(wanted: int, positions: int | None, num_given: int) -> int:
    """Tokens that a text may have behind a prompt of `num_given`: the last is written, and needs no position."""
    return wanted if positions is None else max(1, min(wanted, positions + 1 - num_given))


def refuse_longer(tokens: Tensor | None, most: int | None) -> None:
    """Raises UserError for (B, U) tokens, or their embeddings, that are more than the decoder has positions for."""
    if most is None or tokens is None or tokens.shape[1] <= most:
        return
    wrong = f"a text of {tokens.shape[1]} tokens is too long for the decoder's {most} positions"
    raise UserError("labels", tuple(tokens.shape), wrong, f"write labels of at most {most} tokens")


def decoder_positions(
    decoder: PreTrainedModel, tokens: Tensor | None, past_length: int = 0, attention_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """(B, U) `position_ids` that count every real token; empty if the family counts them so itself.

    RoBERTa and its like give no position to pad tokens, and forget that in the next cached step: with a pad token in front or
    within, training and cached decoding differ. Without one these positions are their own.

    tokens: (B, U) ids or (B, U, D) embeddings of them, behind `past_length` tokens in the cache
    attention_mask: (B, past_length + U), 0 where a prompt is padded
    """
    embeddings: Any = getattr(decoder.base_model, "embeddings", getattr(decoder.base_model, "embed_positions", None))
    if tokens is None or not hasattr(embeddings, "create_position_ids_from_input_ids"):
        return {}
    batch_size, num_tokens = tokens.shape[:2]
    if attention_mask is not None:
        real = attention_mask.long()
        return {"position_ids": (real.cumsum(1) * real + embeddings.padding_idx)[:, -num_tokens:]}
    positions = torch.arange(num_tokens, device=tokens.device) + embeddings.padding_idx + 1 + past_length
    return {"position_ids": positions.expand(batch_size, num_tokens)}


def tokenizer_of(
    size: str, checkpoint: str | None, published: Mapping[str, str | None]
) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved beside the decoder's weights; None for a decoder with random weights.

    A tokenizer without a pad token pads with its end token; labels are masked by length, so that the end token still counts.
    """
    name = published_name("decoder", size, checkpoint, published)
    if name is None:
        return None
    tokenizer = load_tokenizer("decoder.checkpoint", name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
