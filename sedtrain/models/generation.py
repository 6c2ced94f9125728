"""How the joined model generates: what does not change from token to token is computed once per utterance."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from sedtrain.models.encoded import EncodedSpeech, given_input


class GeneratesFromSpeech(transformers.SpeechEncoderDecoderModel):
    """The base class, whose `generate` encodes once and whose special tokens are those of training."""

    def encode(self, inputs: Tensor, attention_mask: Tensor | None = None, **options: Any) -> EncodedSpeech:
        raise NotImplementedError

    def accepted(
        self, encoder_outputs: BaseModelOutput | tuple[Tensor, ...], attention_mask: Tensor | None
    ) -> EncodedSpeech:
        raise NotImplementedError

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The base class's `generate`; encoder, adapter and frame mask run once per utterance, not once per token."""
        source = None
        if kwargs.get("encoder_outputs") is None:
            source = given_input(inputs, kwargs.pop("input_values", None), kwargs.pop("input_features", None))
            generation_config = args[0] if args else kwargs.get("generation_config")
            encoded = self.encode(source, kwargs.get("attention_mask"), **self.wanted_states(generation_config, kwargs))
        else:
            encoded = self.accepted(kwargs["encoder_outputs"], kwargs.get("attention_mask"))
        kwargs["encoder_outputs"] = EncodedSpeech(  # without the encoder's own frames, which beams would copy
            last_hidden_state=encoded.last_hidden_state,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            attention_mask=encoded.attention_mask,
        )
        self.settle_generation_config()
        return super().generate(source, *args, **kwargs)  # by which an assistant hears it too

    def wanted_states(self, generation_config: GenerationConfig | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """Which of the encoder's states `generate` is to return: said by keyword, else by the nearest configuration."""
        said = [options, vars(generation_config or GenerationConfig()), vars(self.generation_config)]
        names = ("output_attentions", "output_hidden_states")
        return {name: next((of[name] for of in said if of.get(name) is not None), None) for name in names}

    def settle_generation_config(self) -> None:
        """Generation starts with the token that training starts with, and is told what only `config` was told."""
        generation = self.generation_config
        for name, value in self.config._get_generation_parameters().items():  # such as max_length
            setattr(generation, name, value)
            delattr(self.config, name)
        for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
            token, known = getattr(self.config, name, None), getattr(generation, name)
            if token is not None and not (isinstance(known, list) and token in known):  # several may end a text
                setattr(generation, name, token)
        if "past_key_values" not in inspect.signature(self.decoder.forward).parameters:
            generation.use_cache = False
