"""Text from audio files and arrays by a saved model; `Model` is what `sedtrain.load` returns.

S samples.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soxr
from numpy.typing import NDArray

from sedtrain.annotations import checked
from sedtrain.data.audio import RATES, audio_blocks, fault_of, one_channel, seconds_between
from sedtrain.data.headers import RefusedAudio
from sedtrain.decoding.generate import refuse_impossible
from sedtrain.decoding.options import DecodingOptions
from sedtrain.decoding.recordings import Recording, RecordingDecoder
from sedtrain.decoding.transcription import Segment, Transcription
from sedtrain.decoding.windows import Samples
from sedtrain.errors import UserError
from sedtrain.models import saved
from sedtrain.models.positions import most_new_tokens
from sedtrain.models.saved import SavedModel
from sedtrain.text.tags import TASK_OF, WholePrompt

logger = logging.getLogger(__name__)

Audio = str | Path | NDArray[Any]


@dataclass(frozen=True)
class Transcriber(RecordingDecoder):
    """A decoder of recordings with the language and target of their texts. Warns if words are asked for without a CTC head.

    of_decoding: prefix of decoding options in messages: `decoding.` on the command line, empty in Python
    Raises UserError if the model never learnt this target or language, or cannot search with these options.
    """

    language: str | None = None
    target: str = "transcription"
    of_decoding: str = "decoding."

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_impossible(self.saved.model, self.saved.tokenizer, self.options)
        self.refuse_unlearnt(self.language)
        tags = self.collator.tags
        if isinstance(tags, WholePrompt) and tags.detects and not (self.language or tags.language):
            logger.info("no language is named: the model finds the language of each recording")
        if self.with_words and self.saved.model.ctc_head is None:
            logger.warning(
                "words have no times: the model was trained without a CTC head; train with loss=joint loss.ctc_weight=0.3"
            )

    def refuse_unlearnt(self, language: str | None) -> None:
        """Raises UserError if the model never learnt to write this language for `target`."""
        if (tags := self.collator.tags) is not None:
            tags.of(language, TASK_OF[self.target])
        elif language:
            wrong = "this model was trained without language tags, so it cannot be asked for a language"
            write = "write no data.language, or a checkpoint that was trained with data.tags=true"
            python = "leave language out, or load a model that was trained with tags"
            raise UserError("data.language", language, wrong, write, python)

    def recording_of(self, file: str, language: str | None, with_words: bool) -> Recording:
        """A file to decode. Reading its windows raises UserError for audio that cannot be read."""
        blocks = blocks_of(file, self.collator.sampling_rate)
        return Recording(self, file, blocks, language, TASK_OF[self.target], with_words)

    def transcription_of(
        self, audio: Audio, sampling_rate: int | None = None, name: str | None = None
    ) -> Transcription:
        """The text of a file or an array, with its times; messages show `name`. Raises UserError for unreadable audio."""
        rate = self.collator.sampling_rate
        if isinstance(audio, np.ndarray):
            shown, blocks = "array", iter([resampled(audio, sampling_rate, rate)])
        else:
            shown, blocks = str(audio), blocks_of(audio, rate)
        found = self.transcription(name or shown, blocks, self.language, TASK_OF[self.target])
        warn(found, [each for each in found.segments if each.cut_at], self.limit)
        doubted = [each for each in found.segments if each.doubt]
        warn(found, doubted, lambda each: f"the text may be wrong: {each.doubt}")
        return found

    def limit(self, segment: Segment) -> str:
        """Says at which limit a text was cut, and what to write instead."""
        number, option, most = segment.cut_at, f"{self.of_decoding}max_new_tokens", self.saved.model.max_tokens
        text, num_given = f"the text is cut at {number} tokens", 1 + self.saved.num_tags
        if (more := most_new_tokens(2 * number, most, num_given)) > number:
            return f"{text}; write {option}={more}, or a smaller {self.of_decoding}window"
        return f"{text}, the last position of the decoder; write a smaller {self.of_decoding}window"


def warn(found: Transcription, faulty: Sequence[Segment], describe: Callable[[Segment], str]) -> None:
    """Logs the first faulty segment of a recording and the number of the others."""
    for first in faulty[:1]:
        place = f", {first.start:.2f} to {first.end:.2f} s" if len(found.segments) > 1 else ""
        others = f" ({len(faulty) - 1} more of its {len(found.segments)} segments too)" if len(faulty) > 1 else ""
        logger.warning("audio=%s%s: %s%s", found.audio, place, describe(first), others)


def blocks_of(path: str | Path, sampling_rate: int) -> Iterator[Samples]:
    """The samples of a file, read block by block. Raises UserError if it is missing or cannot be read to its end."""
    if not Path(path).is_file():
        raise UserError("audio", str(path), "there is no such audio file", "write audio=FILE")
    with readable(path):
        yield from audio_blocks(str(path), sampling_rate)


def seconds_of(path: str) -> float:
    """The length of a file by its header, which `blocks_of` never exceeds. Raises UserError if it is no audio."""
    with readable(path):
        return seconds_between(path, None)


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Raises UserError where audio cannot be read."""
    try:
        yield
    except RefusedAudio as error:
        raise UserError("audio", str(path), fault_of(error), "write audio=FILE that can be read to its end") from error


def resampled(audio: NDArray[Any], from_rate: int | None, to_rate: int) -> Samples:
    """(S,) floats at `from_rate` hertz -> float32 at `to_rate`. Raises UserError for any other array, and for no rate."""
    if from_rate not in RATES:
        write = f"write sampling_rate=HERTZ of the array; the model's own is {to_rate}"
        raise UserError("sampling_rate", from_rate, "an array does not say its sampling rate", write)
    shape = f"an array of {audio.dtype}, shape {audio.shape}"
    if audio.ndim != 1 or audio.dtype.kind != "f":
        write = "write one channel as floats from -1 to 1, such as audio.mean(axis=1) / 32768 of 16-bit stereo"
        raise UserError("audio", shape, "this has to be one channel of floating-point samples", write)
    try:
        samples = one_channel(audio.astype(np.float32)[:, None])
    except RefusedAudio as error:
        raise UserError("audio", shape, str(error), "write finite samples from -1 to 1, at least one") from error
    return samples if from_rate == to_rate else soxr.resample(samples, from_rate, to_rate)


def decoding_options(options: Mapping[str, Any]) -> DecodingOptions:
    """Decoding options by name. Raises UserError for unknown names and for values that do not fit."""
    known = [each.name for each in fields(DecodingOptions)]
    write = f"write one of {', '.join(known)}"
    others = {name: value for name, value in options.items() if name not in known}
    if unknown := [UserError(name, others[name], f"decoding has no option {name!r}", write) for name in others]:
        raise UserError.all_of(unknown)
    return DecodingOptions(**options)


@dataclass(frozen=True)
class Model(SavedModel):
    """A saved model, which computes on the device of `model.model`."""

    def transcribe(self, audio: Audio | Sequence[Audio], **options: Any) -> str | list[str]:
        """The text of an audio file or array, or a list of texts for a list of them. Takes the options of `transcription`."""
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
        """Text with segments, and with timed words if the model has a CTC head. A list of audio gives a list, in order.

        audio: path of a file that libsndfile reads, or (S,) floats from -1 to 1. The channels of a file are mixed to one
        sampling_rate: hertz of an array; a file names its own. Audio is resampled to the model's rate
        language: language to write, where the model learnt several
        target: what to write, where the model learnt both
        decoding: options of DecodingOptions, such as num_beams=5 and max_new_tokens=200

        Logs a warning for a text that is cut at max_new_tokens. Raises UserError for audio that cannot be read or used, a
        language that the model did not learn, and impossible options.
        """
        options = decoding_options(decoding)
        transcriber = Transcriber(self, options, with_words, language=language, target=target, of_decoding="")
        if isinstance(audio, str | Path | np.ndarray):
            return transcriber.transcription_of(audio, sampling_rate)
        return [transcriber.transcription_of(each, sampling_rate) for each in audio]


def load(checkpoint: str | Path) -> Model:
    """A trained model with its tokenizer and feature extractor, on the CPU, in float32 and evaluation mode.

    checkpoint: the folder of a run (its `model` is loaded), a Hugging Face folder, or a Hub id
    Raises UserError for anything else.
    """
    found = saved.load(checkpoint)
    return Model(found.model, found.tokenizer, found.feature_extractor)
