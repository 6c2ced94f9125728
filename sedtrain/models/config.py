"""The configuration of the joined model, which contains that of the encoder and that of the decoder."""

from typing import Any, Self

from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SpeechEncoderDecoderConfig,
)

from sedtrain.models.adapter import Adapter


class AdaptedSpeechEncoderDecoderConfig(SpeechEncoderDecoderConfig):
    """The configuration of a model with an adapter that `transformers` does not have.

    adapter: its `kind` and its `settings`

    The base class would load such a folder without its adapter, and only warn of an unknown model type. Therefore the saved
    model type of the encoder is one that the base class cannot resolve: it then refuses.
    """

    model_type = "adapted-speech-encoder-decoder"
    adapter: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().to_dict()
        if isinstance(self.adapter, dict) and "encoder" in values:
            values["encoder"]["model_type"] += needs_sedtrain(self.adapter)
        return values

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        encoder = dict(config_dict["encoder"])
        encoder["model_type"] = encoder["model_type"].removesuffix(needs_sedtrain(config_dict["adapter"]))
        config: Self = super().from_dict({**config_dict, "encoder": encoder}, **kwargs)
        return config


def needs_sedtrain(adapter: dict[str, Any]) -> str:
    return f" with the {adapter['kind']} adapter of sedtrain"


def frame_width(config: PreTrainedConfig) -> int:
    """The width of the encoder's output frames, which the family's own adapter may change."""
    adapted = getattr(config, "add_adapter", False)
    width: int = getattr(config, "output_hidden_size", config.hidden_size) if adapted else config.hidden_size
    return width


def share_config(part: nn.Module, config: PreTrainedConfig) -> None:
    """Gives every module of the part this one configuration object, so that a later change of it reaches them all."""
    for module in part.modules():
        if isinstance(getattr(module, "config", None), type(config)):
            module.config = config


def register_family(part: PreTrainedModel, factory: Any) -> None:
    """Registers a class of the user's own: transformers finds the parts of a joined configuration by their model types."""
    if part.config.model_type not in CONFIG_MAPPING:
        AutoConfig.register(part.config.model_type, type(part.config))
        factory.register(type(part.config), type(part))


def joint_config(encoder: PreTrainedModel, decoder: PreTrainedModel) -> SpeechEncoderDecoderConfig:
    """The joined configuration of two modules."""
    register_family(encoder, AutoModel)
    register_family(decoder, AutoModelForCausalLM)
    return SpeechEncoderDecoderConfig.from_encoder_decoder_configs(encoder.config, decoder.config)


def with_adapter(config: SpeechEncoderDecoderConfig, adapter: Adapter) -> AdaptedSpeechEncoderDecoderConfig:
    """The configuration of the same model with this adapter."""
    described = {"kind": adapter.kind, "settings": adapter.settings}
    return AdaptedSpeechEncoderDecoderConfig.from_dict({**config.to_dict(), "adapter": described})


def move_generation_options(config: SpeechEncoderDecoderConfig, generation_config: GenerationConfig) -> None:
    """Moves what `config` says of generation, and copies its special tokens: training and generation start with one token."""
    for name, value in config._get_generation_parameters().items():  # such as max_length
        setattr(generation_config, name, value)
        delattr(config, name)
    for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
        token, known = getattr(config, name, None), getattr(generation_config, name)
        if token is not None and not (isinstance(known, list) and token in known):  # several may end a text
            setattr(generation_config, name, token)
