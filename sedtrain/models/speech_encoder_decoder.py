"""The model: `transformers.SpeechEncoderDecoderModel` with every encoder family and one set of special tokens."""

from typing import Any

import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
    SpeechEncoderDecoderConfig,
)

from sedtrain.models.encoder import encoder_from_config


class SpeechEncoderDecoder(transformers.SpeechEncoderDecoderModel):
    """A speech encoder joined to a text decoder; everything written against the base class works."""

    def __init__(
        self,
        config: SpeechEncoderDecoderConfig | None = None,
        encoder: PreTrainedModel | None = None,
        decoder: PreTrainedModel | None = None,
    ) -> None:
        if encoder is None and config is not None:
            encoder = encoder_from_config(config.encoder)
        make_known(encoder, AutoModel)
        make_known(decoder, AutoModelForCausalLM)
        super().__init__(config, encoder, decoder)

    def set_special_tokens(self, start: int, end: int, pad: int) -> None:
        """The ids that training and generation both use: a difference between them would stay silent."""
        for config in (self.config, self.generation_config):
            config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = start, end, pad
        self.generation_config.bos_token_id = start


def make_known(part: PreTrainedModel | None, factory: Any) -> None:
    """Tells transformers of a class of the user's own: it makes a joined configuration from its parts' model types."""
    if part is not None and part.config.model_type not in CONFIG_MAPPING:
        AutoConfig.register(part.config.model_type, type(part.config))
        factory.register(type(part.config), type(part))
