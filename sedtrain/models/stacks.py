"""Decoders of sequence-to-sequence models: decoder stack and output layer, taken out of the whole model.

To add a family: a row in `KINDS`. A class of its own is needed only where upstream's decoder leaves out the mask of frames
or gives pad tokens no position.

B batch, U target tokens, T frames, D width.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.whisper.modeling_whisper import WhisperDecoder, WhisperDecoderLayer
from transformers.utils.generic import can_return_tuple

NAMES = {
    r"^(model\.decoder|text_decoder)\.": "decoder.",
    r"^(proj_out|lm_head\.out_proj)\.": "lm_head.",
    r"^(model\.)?shared\.": "decoder.embed_tokens.",
}
"""Beginnings of parameters' names in whole models, and what they are here."""


class StackDecoder(PreTrainedModel, GenerationMixin):
    """A causal language model out of the decoder stack of a sequence-to-sequence model and its output layer.

    whole: the class of that model
    stack: the class of its decoder, or a subclass of it
    """

    whole: ClassVar[type[PreTrainedModel]]
    stack: ClassVar[type[PreTrainedModel]]
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "decoder.embed_tokens.weight"}
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        r"^(model\.)?(encoder|speech_encoder|text_encoder|t2u_model|vocoder)\."
    ]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.decoder = self.stack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Upstream's, also from the folder of a whole model."""
        loaded = super().from_pretrained(*args, **{"key_mapping": NAMES, **kwargs})
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._weight_conversions = []  # by which save_pretrained would write the names of the whole model
        return loaded

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.decoder.embed_tokens
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.embed_tokens = value

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
        """(B, U) tokens, or (B, U, D) embeddings, and (B, T, D) frames with their mask -> (B, U, V) logits."""
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
        return CausalLMOutputWithCrossAttentions(
            logits=self.lm_head(self.scaled(decoded.last_hidden_state)),
            past_key_values=decoded.past_key_values,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
        )

    def scaled(self, states: Tensor) -> Tensor:
        """The inputs of the output layer."""
        return states


# --- Whisper: its decoder has no mask of frames


class MaskedWhisperLayer(WhisperDecoderLayer):
    """Takes the mask of frames as `frame_mask`: upstream's decoder gives None for `encoder_attention_mask`."""

    def forward(self, *args: Any, frame_mask: Tensor | None = None, **kwargs: Any) -> Any:
        return super().forward(*args, **{**kwargs, "encoder_attention_mask": frame_mask})


class MaskedWhisperDecoder(WhisperDecoder):
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        for layer in self.layers:
            layer.__class__ = MaskedWhisperLayer

    def forward(
        self,
        input_ids: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        frame_mask = None
        if encoder_hidden_states is not None and encoder_attention_mask is not None:
            inputs_embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            frame_mask = create_bidirectional_mask(
                self.config, inputs_embeds, encoder_attention_mask, encoder_hidden_states=encoder_hidden_states
            )
        return super().forward(
            input_ids=input_ids if inputs_embeds is None else None,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            frame_mask=frame_mask,
            **kwargs,
        )


# --- the families


def kind(whole: type[PreTrainedModel], stack: type[PreTrainedModel]) -> type[StackDecoder]:
    """The class of a family's decoders, with a configuration class of its own, which AutoModelForCausalLM finds."""
    whole_config = whole.config_class
    fields = {"__module__": __name__, "model_type": f"{whole_config.model_type}-decoder"}
    config: Any = type(whole_config.__name__.replace("Config", "DecoderConfig"), (whole_config,), fields)
    family = next(each for each in stack.__mro__ if each.__name__.endswith("PreTrainedModel"))
    name = whole.__name__.replace("ForConditionalGeneration", "StackDecoder")
    made = type(
        name, (StackDecoder, family), {"__module__": __name__, "whole": whole, "stack": stack, "config_class": config}
    )
    AutoConfig.register(config.model_type, config)
    AutoModelForCausalLM.register(config, made)
    return made


KINDS = (kind(transformers.WhisperForConditionalGeneration, MaskedWhisperDecoder),)
# the model type of a whole sequence-to-sequence model -> the class of its decoder alone
OF_WHOLE: Mapping[str, type[StackDecoder]] = {each.whole.config_class.model_type: each for each in KINDS}


def decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the decoder alone of a whole model; any other unchanged."""
    if config.model_type not in OF_WHOLE:
        return config
    kind = OF_WHOLE[config.model_type].config_class
    config = copy.deepcopy(config)
    config.__class__ = kind
    config.model_type, config.is_encoder_decoder = kind.model_type, False
    return config


def out_of_whole(model: PreTrainedModel) -> PreTrainedModel:
    """A decoder with the weights of a whole model; any other unchanged."""
    if model.config.model_type not in OF_WHOLE:
        return model
    weights = {here_named(name): weight for name, weight in model.state_dict().items()}
    if "lm_head.weight" not in weights:
        return model
    decoder = OF_WHOLE[model.config.model_type](decoder_config(model.config)).to(model.device, model.dtype)
    decoder.load_state_dict({name: weights[name] for name in decoder.state_dict()}, assign=True)
    if torch.equal(decoder.lm_head.weight, decoder.decoder.embed_tokens.weight):
        decoder.tie_weights()
    return decoder.train(model.training)


def here_named(name: str) -> str:
    """The name here of a whole model's parameter."""
    for pattern, replacement in NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def whole_type(config: PreTrainedConfig) -> str:
    """The model type by which users know the family: that of the whole model."""
    return next((name for name, kind in OF_WHOLE.items() if isinstance(config, kind.config_class)), config.model_type)
