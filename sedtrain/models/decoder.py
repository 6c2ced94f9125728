"""Text decoders: any causal decoder of `transformers`, by its model type or as a module; prefix.py adapts language models.

To add a family:
1. `conf/decoder/NAME.yaml`: its `model_type`, its published members, the shape of its tiny member (see conf/decoder/gpt2.yaml).
2. A row in decoder_families.py, if `transformers` has the decoder only inside a sequence-to-sequence model.
3. Code, only if the family needs it: `settle_config` below for its configuration, `decoder_positions` in positions.py for
   its positions, `ENDS_WITH_OUTPUT_LAYER` in output_layer.py if its logits are exactly what its output layer returns.
4. Its name in `FAMILIES` of tests/config/test_conf.py. `SEDTRAIN_WRITE_SUPPORT=1 pytest tests/models/test_support.py` then
   tests it with two encoders and writes docs/support.md; `python tests/options_table.py` writes docs/options.md.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.xmod.modeling_xmod import XmodAdapter

from sedtrain.annotations import checked
from sedtrain.errors import UserError
from sedtrain.models.attention import building, building_with
from sedtrain.models.config_ranges import tried
from sedtrain.models.decoder_families import decoder_config, out_of_whole
from sedtrain.models.family_settings import configured, default_config, load_config, published_name
from sedtrain.models.loading import CROSS_ATTENTION, load_tokenizer, load_weights, pretrained
from sedtrain.models.mixins import mix_into
from sedtrain.models.positions import fix_sinusoids
from sedtrain.models.prefix import arguments_of, behind_prefix, choose_listening, give_prompt, is_prefixed
from sedtrain.text.tokenizers import start_end_pad

ALTERNATIVES = (
    "write decoder=bert, roberta, gpt2, bart or mbart, or another decoder with cross-attention",
    "write another decoder: AutoModelForCausalLM.from_pretrained(FOLDER, is_decoder=True, add_cross_attention=True)",
)
"""Remedies for an unusable decoder, on the command line and in Python."""

BROKEN = {
    "big_bird": "its cache of keys and values fails in generation",
    **dict.fromkeys(
        ["gemma3n_text", "gemma4_text"], "each layer looks up its own embedding of a token, and audio has no tokens"
    ),
    "gpt_bigcode": "its multi-query attention has no cross-attention",
    "megatron-bert": "its cross-attention mixes up frames and tokens",
    "minimax": "it works only with its own kind of cache",
    "moshi": "it writes speech codes beside its text",
    "prophetnet": "its cross-attention takes no mask of padded frames",
    **dict.fromkeys(
        ["musicgen", "musicgen_decoder", "musicgen_melody", "musicgen_melody_decoder"],
        "it writes music codes, not text",
    ),
}
"""Families that cannot read audio, or whose cross-attention fails in transformers; with the reason."""


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
    """A causal decoder of a family in `transformers`, which reads the audio by cross-attention or as a prefix.

    tokenizer: passed by build; sets the vocabulary size of a decoder with random weights
    tiny: the family's configuration for size=tiny; base, large: the Hub ids of the published members
    checkpoint: a Hub id or folder, used instead of the published member of that size
    attention: None stands for sdpa if the family has it, else eager
    listens: None stands for cross_attention if the family has it, else prefix
    prompt: text with {audio} once, where the audio goes; None stands for a turn of the tokenizer's chat template, if it has one
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
        config.dtype = None  # else random weights would take the dtype of the published ones, perhaps 16 bits
        chosen = ("decoder.tiny", tiny) if name is None and not options else ("decoder.options", options)
        return tried(*chosen, config, new_decoder, decode_a_token)
    return as_decoder(load_weights("decoder", name, AutoModelForCausalLM, config, attention))


def new_decoder(config: PreTrainedConfig) -> PreTrainedModel:
    """A decoder with random weights, which reads the audio by cross-attention or as a prefix."""
    settle_config(config)
    with building("decoder", config):
        return as_decoder(AutoModelForCausalLM.from_config(config, trust_remote_code=False))


def decode_a_token(decoder: PreTrainedModel) -> None:
    """Runs the decoder on two frames and one token: families that need chunks of several tokens fail here."""
    frames = torch.zeros(1, 2, decoder.config.hidden_size)
    decoder(input_ids=torch.ones(1, 1, dtype=torch.long), encoder_hidden_states=frames, return_dict=True)


def decoder_from_pretrained(name: str, **options: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, with the configuration of a decoder."""
    if (config := options.pop("config", None)) is None:
        config, options = configured(name, options)
    config = decoder_config(config)
    settle_config(config)
    with building_with("decoder", config, options):
        decoder: PreTrainedModel = pretrained(AutoModelForCausalLM, name, config=config, **options)
    return decoder


def take_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sets vocabulary size and special tokens, including the attributes that only some families have."""
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
    """Configures, in place, a causal decoder with cross-attention, or one that reads the audio as a prefix.

    `generate` sizes the key-value cache by the numbers of layers and heads. In some families these describe the family's
    own encoder, which is absent here: they are set to the decoder's numbers, and so is the vocabulary size.
    Raises UserError for a family that does not work, and for X-MOD without a chosen language.
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
        config.suppress_tokens = config.begin_suppress_tokens = None  # Whisper's lists forbid an empty text
    if getattr(config, "default_language", "") is None:
        if len(config.languages) > 1:
            wrong = f"{config.model_type} has adapters of {len(config.languages)} languages, and none is chosen"
            write = f"write decoder.options.default_language=ONE_OF {', '.join(config.languages)}"
            raise UserError("decoder.options.default_language", None, wrong, write)
        config.default_language = config.languages[0]


def as_decoder(decoder: PreTrainedModel) -> PreTrainedModel:
    """The decoder with its configuration settled; of a sequence-to-sequence model, the decoder alone.

    Raises UserError for a decoder that writes no text, or never hears the audio: it would still train to a finite loss.
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
    """True if a decoder class accepts encoder states."""
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
        own = "(in a class of your own, name the module cross_attn, crossattention or encoder_attn)"
        raise UserError("decoder", name, wrong, f"{write} {own}")


class AdapterOfOneType(nn.Module):
    """Returns the dtype of its input; upstream's returns another under 16-bit autocast."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        adapted: Tensor = super().forward(hidden_states)
        return adapted.to(hidden_states.dtype)


def tokenizer_of(
    size: str, checkpoint: str | None, published: Mapping[str, str | None]
) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with the decoder's weights; None for a decoder with random weights.

    A tokenizer without a pad token pads with its end token. Labels are masked by length, so the end token is still learnt.
    """
    name = published_name("decoder", size, checkpoint, published)
    if name is None:
        return None
    tokenizer = load_tokenizer("decoder.checkpoint", name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
