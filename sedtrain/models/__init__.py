"""The model: encoder, adapter, decoder. Imports `SpeechEncoderDecoder` on first use."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "SpeechEncoderDecoder":
        raise AttributeError(f"module 'sedtrain.models' has no attribute {name!r}")
    from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

    return SpeechEncoderDecoder
