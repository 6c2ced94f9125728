"""Decoders of sequence-to-sequence models: decoder stack and output layer, taken out of the whole model.

To add a family: a row in `DECODER_CLASSES`. It needs a class in repaired_decoders.py only if upstream's decoder ignores the
mask of frames or gives pad tokens no position.

B batch, U target tokens, T frames, D width.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.canary.configuration_canary import CanaryDecoderConfig
from transformers.models.canary.modeling_canary import CanaryDecoder
from transformers.models.m2m_100.modeling_m2m_100 import M2M100Decoder
from transformers.models.moonshine.modeling_moonshine import MoonshineDecoder
from transformers.models.mt5.modeling_mt5 import MT5Stack
from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4TDecoder
from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import SeamlessM4Tv2Decoder
from transformers.models.speech_to_text.modeling_speech_to_text import Speech2TextDecoder
from transformers.models.t5.modeling_t5 import T5Stack
from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig
from transformers.utils.generic import can_return_tuple

from sedtrain.models.mixins import mixed
from sedtrain.models.output_layer import DeferrableLinear
from sedtrain.models.repaired_decoders import (
    Counting,
    MaskedWhisperDecoder,
    TokenSpeechT5Decoder,
    UnprojectedCohereDecoder,
    UnprojectedMoonshineStreamingDecoder,
    WholeT5GemmaDecoder,
)

NAMES = {
    r"^(model\.decoder|text_decoder|speecht5\.decoder)\.": "decoder.",
    r"^(proj_out|lm_head\.out_proj|text_decoder_postnet\.lm_head)\.": "lm_head.",
    r"^(model\.)?shared\.": "decoder.embed_tokens.",
}
"""Prefixes of parameter names in whole models -> prefixes in a StackDecoder."""


class StackDecoder(PreTrainedModel, GenerationMixin):
    """A causal language model made of a sequence-to-sequence model's decoder stack and output layer.

    whole: class of the sequence-to-sequence model
    stack: class of its decoder, or a subclass of it
    within: attribute of the whole model's configuration that holds the decoder's; None if they share one
    output_bias: True if the output layer has a bias
    frame_modules: modules of the whole model's stack that process frames; a joined model moves them into its adapter
    """

    whole: ClassVar[type[PreTrainedModel]]
    stack: ClassVar[type[PreTrainedModel]]
    within: ClassVar[str | None] = None
    output_bias: ClassVar[bool] = False
    frame_modules: ClassVar[tuple[str, ...]] = ()
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "decoder.embed_tokens.weight"}
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        r"^(model\.|speecht5\.)?(encoder|speech_encoder|text_encoder|t2u_model|vocoder)\.",
        r"^decoder\.(pos_emb|proj)\.",  # process frames
    ]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.decoder = self.stack(config)
        self.set_output_embeddings(nn.Linear(config.hidden_size, config.vocab_size, bias=self.output_bias))
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Loads as upstream does, also from the folder of a whole model."""
        renamings = get_checkpoint_conversion_mapping(cls.whole.config_class.model_type) or []
        renamed = {
            pattern: renaming.target_patterns[0] for renaming in renamings for pattern in renaming.source_patterns
        }
        loaded = super().from_pretrained(*args, **{"key_mapping": {**renamed, **NAMES}, **kwargs})
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._weight_conversions = []  # else save_pretrained would write the names of the whole model
        return loaded

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.decoder.embed_tokens
        return embeddings

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Makes a linear layer the output layer, with T5Gemma's cap on logits if the configuration has one."""
        new_embeddings.__class__ = DeferrableLinear
        self.lm_head = cast(DeferrableLinear, new_embeddings)
        self.lm_head.cap = getattr(self.config, "final_logit_softcapping", None)

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.set_input_embeddings(value)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithCrossAttentions:
        """(B, U) tokens or (B, U, D) embeddings, and (B, T, D) frames with their (B, T) mask -> (B, U, V) logits."""
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache())
        decoded = self.decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        states = decoded.last_hidden_state
        if getattr(self.config, "scale_decoder_outputs", False):  # T5 as first published
            states = states * self.config.d_model**-0.5
        return CausalLMOutputWithCrossAttentions(
            logits=self.lm_head(states),
            past_key_values=decoded.past_key_values,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
        )


# --- the families


def family(
    whole: type[PreTrainedModel],
    stack: type[PreTrainedModel],
    of_config: type[PreTrainedConfig] | None = None,
    config_fields: dict[str, Any] | None = None,
    **values: Any,
) -> type[StackDecoder]:
    """Makes and registers the class of a family's decoders and its configuration class.

    of_config: the configuration class of the stack, if not that of the whole model
    config_fields: values that the whole model would set in it
    values: attributes of the class
    """
    fields: dict[str, Any] = {
        "__module__": __name__,
        "model_type": f"{whole.config_class.model_type}-decoder",
        "sub_configs_defaults": {},
    }
    name = whole.config_class.__name__.replace("Config", "DecoderConfig")
    config: Any = type(name, (of_config or whole.config_class,), fields | (config_fields or {}))
    base = next(base for base in stack.__mro__ if base.__name__.endswith("PreTrainedModel"))
    name = f"{whole.__name__.partition('For')[0]}StackDecoder"
    values |= {"__module__": __name__, "whole": whole, "stack": stack, "config_class": config}
    made = type(name, (StackDecoder, base), values)
    AutoConfig.register(config.model_type, config)
    AutoModelForCausalLM.register(config, made)
    return made


# transformers' flex attention reads one position bias per utterance, and T5 has one for all
NO_FLEX: dict[str, Any] = {"_supports_flex_attn": False}
DECODER_CLASSES = (
    family(transformers.WhisperForConditionalGeneration, MaskedWhisperDecoder),
    family(transformers.M2M100ForConditionalGeneration, mixed(Counting, M2M100Decoder)),
    family(transformers.Speech2TextForConditionalGeneration, mixed(Counting, Speech2TextDecoder)),
    family(transformers.MoonshineForConditionalGeneration, MoonshineDecoder),
    family(transformers.T5ForConditionalGeneration, T5Stack, **NO_FLEX),
    family(transformers.MT5ForConditionalGeneration, MT5Stack, **NO_FLEX),
    family(transformers.SeamlessM4TForSpeechToText, mixed(Counting, SeamlessM4TDecoder)),
    family(transformers.SeamlessM4Tv2ForSpeechToText, mixed(Counting, SeamlessM4Tv2Decoder)),
    family(
        transformers.CanaryForConditionalGeneration,
        CanaryDecoder,
        CanaryDecoderConfig,
        within="decoder_config",
        output_bias=True,
    ),
    family(
        transformers.CohereAsrForConditionalGeneration,
        UnprojectedCohereDecoder,
        output_bias=True,
        frame_modules=("proj",),
    ),
    family(
        transformers.MoonshineStreamingForConditionalGeneration,
        UnprojectedMoonshineStreamingDecoder,
        frame_modules=("pos_emb", "proj"),
    ),
    family(
        transformers.SpeechT5ForSpeechToText,
        mixed(Counting, TokenSpeechT5Decoder),
        _tied_weights_keys={"lm_head.weight": "decoder.prenet.embed_tokens.weight"},
    ),
    family(
        transformers.T5GemmaForConditionalGeneration,
        WholeT5GemmaDecoder,
        T5GemmaModuleConfig,
        {"dropout_rate": 0.0},
        within="decoder",
    ),
)
globals().update(
    {made.__name__: made for decoder in DECODER_CLASSES for made in (decoder, decoder.config_class)}
)  # for pickle
# model type of a whole sequence-to-sequence model -> class of its decoder
DECODERS_OF_WHOLE: Mapping[str, type[StackDecoder]] = {
    decoder.whole.config_class.model_type: decoder for decoder in DECODER_CLASSES
}


def decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a whole model's decoder; any other configuration unchanged."""
    if config.model_type not in DECODERS_OF_WHOLE:
        return config
    kind, whole = DECODERS_OF_WHOLE[config.model_type], config
    config = copy.deepcopy(getattr(whole, kind.within) if kind.within else whole)
    config.__class__ = kind.config_class
    config.model_type, config.is_encoder_decoder = kind.config_class.model_type, False
    config._name_or_path = whole._name_or_path
    if num_layers := getattr(config, "num_decoder_layers", None):  # T5's; None stands for `num_layers`
        config.num_layers, config.num_decoder_layers = num_layers, None
    for name in () if kind.within else whole.sub_configs:
        setattr(config, name, None)
    for name in ("decoder_start_token_id", "tie_word_embeddings"):
        if hasattr(whole, name):
            setattr(config, name, getattr(whole, name))
    return config


def out_of_whole(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A decoder with this configuration and a whole model's weights; a model without an output layer unchanged."""
    weights = {stack_name(name): weight for name, weight in model.state_dict().items()}
    if "lm_head.weight" not in weights:
        return model
    decoder = DECODERS_OF_WHOLE[model.config.model_type](config).to(model.device, model.dtype)
    decoder.load_state_dict({name: weights[name] for name in decoder.state_dict()}, assign=True)
    if torch.equal(decoder.lm_head.weight, decoder.get_input_embeddings().weight):
        decoder.tie_weights()
    return decoder.train(model.training)


def stack_name(name: str) -> str:
    """The name in a StackDecoder of a whole model's parameter."""
    for pattern, replacement in NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def whole_type(config: PreTrainedConfig) -> str:
    """The model type of the whole model, which users know the family by."""
    return next(
        (name for name, kind in DECODERS_OF_WHOLE.items() if isinstance(config, kind.config_class)), config.model_type
    )
