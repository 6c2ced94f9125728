"""A saved model that transcribes: what `sedtrain.load` returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sedtrain.annotations import checked
from sedtrain.decoding.transcribe import Audio, Transcriber, decoding_options
from sedtrain.decoding.transcription import Transcription
from sedtrain.models import saved
from sedtrain.models.saved import SavedModel


@dataclass(frozen=True)
class Model(SavedModel):
    """A saved model; it computes on the device where `model.model` is."""

    def transcribe(self, audio: Audio | Sequence[Audio], **options: Any) -> str | list[str]:
        """The text of an audio file or array; of a list of them, a list of texts. Options: those of `transcription`."""
        found = self.transcription(audio, with_words=False, **options)
        return [each.text for each in found] if isinstance(found, list) else found.text

    @checked("")
    def transcription(
        self,
        audio: Audio | Sequence[Audio],
        *,
        sampling_rate: int | None = None,
        language: str | None = None,
        target: Literal["transcription", "translation"] = "transcription",
        with_words: bool = True,
        **decoding: Any,
    ) -> Transcription | list[Transcription]:
        """Text with segments, and words with times where the model has a CTC head; of a list, a list in the same order.

        audio: the path of a file that libsndfile reads, or (S,) floats from -1 to 1; a file of several channels is mixed to one
        sampling_rate: of arrays, in hertz; files have their own. The model's own rate is resampled to.
        language: of the text, where the model learnt to write several
        target: `translation` where the model learnt both
        decoding: options of DecodingOptions, such as num_beams=5 and max_new_tokens=200

        A warning is logged for a text that is cut at max_new_tokens. Raises UserError for audio that cannot be read or taken,
        a language that was not learnt, and options that cannot be.
        """
        options = decoding_options(decoding)
        transcriber = Transcriber(self, options, with_words, language=language, target=target, of_decoding="")
        if isinstance(audio, str | Path | np.ndarray):
            return transcriber.transcription_of(audio, sampling_rate)
        return [transcriber.transcription_of(each, sampling_rate) for each in audio]


def load(checkpoint: str | Path) -> Model:
    """A trained model with its tokenizer and feature extractor, on the CPU, in float32 and evaluation mode.

    checkpoint: the folder of a run (its `model` is taken), a Hugging Face folder, or a Hub id
    Raises UserError where it is none of these.
    """
    found = saved.load(checkpoint)
    return Model(found.model, found.tokenizer, found.feature_extractor)
