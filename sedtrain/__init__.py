"""Speech encoder-decoder models: composed, trained, evaluated, shipped.

    model = sedtrain.load("runs/mine")
    text = model.transcribe("a.wav", num_beams=5)

    folder = sedtrain.run("encoder=hubert", "decoder=bert")  # as on the command line
    run = sedtrain.compose("encoder=hubert", "decoder=bert")  # model, data and Trainer, untrained

Each of these is imported, with torch, on first use.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
FOUND_IN = {
    "SpeechEncoderDecoder": "sedtrain.models.speech_encoder_decoder",
    "load": "sedtrain.decoding.transcriber",
    "run": "sedtrain.interactive",
    "compose": "sedtrain.interactive",
}


def __getattr__(name: str) -> Any:
    if name not in FOUND_IN:
        raise AttributeError(f"module 'sedtrain' has no attribute {name!r}")
    return getattr(importlib.import_module(FOUND_IN[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *FOUND_IN]
