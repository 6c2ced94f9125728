"""One configuration for the joined model and its parts."""

import copy
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    SpeechEncoderDecoderConfig,
)

from sedtrain.models.adapter import Adapter


class AdaptedSpeechEncoderDecoderConfig(SpeechEncoderDecoderConfig):
    """Of a model with an adapter that `transformers` does not have.

    adapter: its `kind` and its `settings`

    The base class would load such a folder without its adapter. It only warns of another model type, so what is saved names
    the encoder's type in a way that it cannot resolve: it then refuses.
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
    """The width of the frames that an encoder gives: behind the family's own adapter it may be another."""
    adapted = getattr(config, "add_adapter", False)
    width: int = getattr(config, "output_hidden_size", config.hidden_size) if adapted else config.hidden_size
    return width


def share_config(part: nn.Module, config: PreTrainedConfig) -> None:
    """Every module of the part reads this one configuration, so that a change of it reaches them all."""
    for module in part.modules():
        if isinstance(getattr(module, "config", None), type(config)):
            module.config = config


def make_known(part: PreTrainedModel, factory: Any) -> None:
    """Tells transformers of a class of the user's own: it makes a joined configuration from its parts' model types."""
    if part.config.model_type not in CONFIG_MAPPING:
        AutoConfig.register(part.config.model_type, type(part.config))
        factory.register(type(part.config), type(part))


def joint_config(encoder: PreTrainedModel, decoder: PreTrainedModel) -> SpeechEncoderDecoderConfig:
    """The configuration of two modules that are to be joined."""
    make_known(encoder, AutoModel)
    make_known(decoder, AutoModelForCausalLM)
    return SpeechEncoderDecoderConfig.from_encoder_decoder_configs(encoder.config, decoder.config)


def with_adapter(config: SpeechEncoderDecoderConfig, adapter: Adapter) -> AdaptedSpeechEncoderDecoderConfig:
    """The configuration of the same model with this adapter in it."""
    described = {"kind": adapter.kind, "settings": adapter.settings}
    return AdaptedSpeechEncoderDecoderConfig.from_dict({**config.to_dict(), "adapter": described})


class FollowedRates:
    """The dropout rates of a part: a module reads them when it is built, `follow` hands it what they have become since."""

    def __init__(self, config: PreTrainedConfig) -> None:
        values = config.to_dict().items()
        self.names = [name for name, value in values if "drop" in name and type(value) in (int, float)]
        self.built_with = self.of(config)

    def of(self, config: PreTrainedConfig) -> list[float]:
        return [getattr(config, name) for name in self.names]

    def follow(self, part: PreTrainedModel) -> None:
        """Sets every rate in the part's modules to that of its configuration, where one has changed."""
        rates = self.of(part.config)
        if rates == self.built_with:
            return
        for module, attribute, name in self.readers(part):
            setattr(module, attribute, getattr(part.config, name))
        self.built_with = rates

    def readers(self, part: PreTrainedModel) -> Iterator[tuple[nn.Module, str, str]]:
        """The modules that keep a rate, the attribute in which they do, and the rate's name.

        Found by building the part once more, without memory, with a rate that no other has under every name.
        """
        config = copy.deepcopy(part.config)
        names = {0.5 + 2.0**-12 * number: name for number, name in enumerate(self.names, start=1)}
        for rate, name in names.items():
            setattr(config, name, rate)
        with torch.device("meta"):
            probe = type(part)(config)
        for path, module in probe.named_modules():
            for attribute, value in vars(module).items():
                if type(value) is float and value in names:
                    yield part.get_submodule(path), attribute, names[value]
