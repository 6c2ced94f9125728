"""Text from audio files and arrays by a saved model.

S samples.
"""

import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import soxr
import torch
from numpy.typing import NDArray

from sedtrain.batch import Batch, Utterance
from sedtrain.data.audio import RATES, UNREADABLE, one_channel, read_audio
from sedtrain.data.collate import Collator
from sedtrain.decoding.generate import DecodingOptions, decode_batch
from sedtrain.decoding.transcription import Segment, Transcription
from sedtrain.errors import UserError
from sedtrain.models.decoder import most_new_tokens
from sedtrain.models.saved import SavedModel, load
from sedtrain.ranges import Range
from sedtrain.text.tags import TASK_OF

logger = logging.getLogger(__name__)

Audio = str | Path | NDArray[Any]


def transcribe(
    model: SavedModel | str | Path,
    audio: Audio | Sequence[Audio],
    *,
    sampling_rate: int | None = None,
    language: str | None = None,
    target: str = "transcription",
    **decoding: Any,
) -> str | list[str]:
    """The text of an audio file or array; of a list of them, a list of texts in the same order.

    model: what `sedtrain.load` returned, on the device where it is to compute, or what `load` takes
    audio: the path of a file that libsndfile reads, or (S,) floats from -1 to 1; a file of several channels is mixed to one
    sampling_rate: of arrays, in hertz; files have their own. The model's own rate is resampled to.
    language: of the text, where the model learnt to write several
    target: `transcription`, or `translation` where the model learnt both
    decoding: options of DecodingOptions, such as num_beams=5 and max_new_tokens=200

    A warning is logged for audio longer than any that the model was trained on, and for a text that is cut at
    max_new_tokens. Raises UserError for audio that cannot be read or is longer than the encoder takes, a language that was
    not learnt, and options that cannot be.
    """
    saved = model if isinstance(model, SavedModel) else load(model)
    transcriber = Transcriber(saved, decoding_options(decoding), language, target, of_decoding="")
    if isinstance(audio, str | Path | np.ndarray):
        return transcriber.text_of(audio, sampling_rate)
    return [transcriber.text_of(each, sampling_rate) for each in audio]


@dataclass(frozen=True)
class Transcriber:
    """A saved model with all that a text depends on besides the audio.

    of_decoding: what names of DecodingOptions begin with where the user writes them, for messages
    Raises UserError where the model never learnt to write what `target` and `language` ask for, or to search so.
    """

    saved: SavedModel
    options: DecodingOptions
    language: str | None = None
    target: str = "transcription"
    of_decoding: str = "decoding."

    def __post_init__(self) -> None:
        self.options.refuse_without_ctc(self.saved.model)
        if self.target not in TASK_OF:
            write = f"write one of {', '.join(TASK_OF)}"
            raise UserError("target", self.target, f"target has no option {self.target!r}", write)
        if self.saved.tags is not None:
            self.saved.tags.of(self.language, TASK_OF[self.target])
        elif self.language:
            wrong = "this model was trained without data.tags, so that it cannot be asked for a language"
            write = "write no data.language, or a checkpoint that was trained with data.tags=true"
            raise UserError("data.language", self.language, wrong, write)

    @cached_property
    def collator(self) -> Collator:
        start = self.saved.model.config.decoder_start_token_id
        return Collator(self.saved.feature_extractor, self.saved.tokenizer, start, tags=self.saved.tags)

    def text_of(self, audio: Audio, sampling_rate: int | None = None) -> str:
        """The text of a file or of an array, as in `transcribe`. Raises UserError for audio that cannot be read or taken."""
        return self.transcription_of(audio, sampling_rate).text

    def transcription_of(self, audio: Audio, sampling_rate: int | None = None) -> Transcription:
        """The text of a file or of an array with its times. Raises UserError for audio that cannot be read or taken."""
        rate = self.collator.sampling_rate
        if isinstance(audio, np.ndarray):
            name, samples = "array", resampled(audio, sampling_rate, rate)
        else:
            name, samples = str(audio), samples_of(audio, rate)
        seconds, task = len(samples) / rate, TASK_OF[self.target]
        if round(seconds, 2) > self.saved.max_seconds:
            raise too_long(audio, seconds, self.saved.max_seconds, rate)
        utterance = Utterance(name, samples, rate, "", self.language, None, seconds, task)
        batch = self.collator([utterance]).to(self.saved.model.device)
        [found] = decode_batch(self.saved.model, self.saved.tokenizer, batch, self.options)
        if seconds > (longest := self.saved.max_training_seconds):
            wrong = "audio=%s: %.2f s, and the longest utterance in training had %.2f s: words may be missing; cut it at pauses"
            logger.warning(wrong, name, seconds, longest)
        if found.is_cut:
            logger.warning("audio=%s: the text is cut at %s", name, self.limit_of(len(found.ids[0]), batch))
        best, *others = found.texts
        score = found.scores[0] if found.scores else None
        segment = Segment(best, 0.0, seconds, score, others=tuple(others), is_cut=found.is_cut)
        return Transcription(name, seconds, (segment,))

    def limit_of(self, num_tokens: int, batch: Batch) -> str:
        """The limit at which a text was cut, and what to write instead."""
        number, option = self.options.max_new_tokens, f"{self.of_decoding}max_new_tokens"
        num_given = 1 if batch.prompts is None else batch.prompts.shape[1]
        most = most_new_tokens(2 * number, self.saved.model.max_tokens, num_given)
        if num_tokens >= number and most > number:
            return f"{option}={number}; write {option}={most}, or cut the audio at pauses"
        if num_tokens < most:
            return f"{num_tokens} tokens, one a frame of the encoder: train with larger tokens, or a smaller stride"
        return f"{num_tokens} tokens, the last position of the decoder; cut the audio at pauses"


def too_long(audio: Audio, seconds: float, most: float, sampling_rate: int) -> UserError:
    """The error for audio longer than the encoder takes; of a file, with a command that cuts it."""
    piece = max(int(most) - 1, 1)  # ffmpeg cuts at the first block of samples that begins after it
    wrong = f"{seconds:.2f} s, and the encoder of this model takes up to {most:g} s: it has to be cut"
    if isinstance(audio, np.ndarray):
        write = f"cut the audio into pieces of up to {most:g} s, such as audio[: {piece} * sampling_rate]"
        return UserError("audio", f"an array of {audio.dtype}, shape {audio.shape}", wrong, write)
    stem = Path(audio).stem
    pieces = shlex.quote(stem.replace("%", "%%") + "-%03d.wav")
    command = f"ffmpeg -i {shlex.quote(str(audio))} -f segment -segment_time {piece} -ac 1 -ar {sampling_rate} {pieces}"
    write = f"cut the audio into pieces of up to {most:g} s, at pauses or by\n{command}"
    return UserError("audio", str(audio), wrong, f"{write}\nand write audio={shlex.quote(escape(stem) + '-*.wav')}")


def samples_of(path: str | Path, sampling_rate: int) -> torch.Tensor:
    """(S,) float32 of a file. Raises UserError if there is none, or it cannot be read to its end."""
    if not Path(path).is_file():
        raise UserError("audio", str(path), "there is no such audio file", "write audio=FILE")
    try:
        return read_audio(str(path), sampling_rate)
    except UNREADABLE as error:
        reason = getattr(error, "reason", "unreadable audio")
        wrong = str(error) if reason in str(error) else f"{reason}: {error}"
        raise UserError("audio", str(path), wrong, "write audio=FILE that can be read to its end") from error


def resampled(audio: NDArray[Any], from_rate: int | None, to_rate: int) -> torch.Tensor:
    """(S,) float32 at `to_rate` hertz of (S,) floats at `from_rate`. Raises UserError for another array, or no rate."""
    if from_rate not in RATES:
        write = f"write sampling_rate=HERTZ of the array; the model's own is {to_rate}"
        raise UserError("sampling_rate", from_rate, "an array does not say its sampling rate", write)
    shape = f"an array of {audio.dtype}, shape {audio.shape}"
    if audio.ndim != 1 or audio.dtype.kind != "f":
        write = "write one channel as floats from -1 to 1, such as audio.mean(axis=1) / 32768 of 16-bit stereo"
        raise UserError("audio", shape, "this has to be one channel of floating-point samples", write)
    try:
        samples = one_channel(audio.astype(np.float32)[:, None])
    except UNREADABLE as error:
        raise UserError("audio", shape, str(error), "write finite samples from -1 to 1, at least one") from error
    return torch.from_numpy(samples if from_rate == to_rate else soxr.resample(samples, from_rate, to_rate))


def decoding_options(options: Mapping[str, Any]) -> DecodingOptions:
    """Raises UserError for each option that is unknown, or a number out of its range."""
    hints = get_type_hints(DecodingOptions, include_extras=True)
    known = [field.name for field in fields(DecodingOptions)]
    errors = [error for name, value in options.items() for error in misfits(name, value, hints.get(name), known)]
    if errors:
        raise UserError.all_of(errors)
    return DecodingOptions(**options)


def misfits(name: str, value: Any, hint: Any, known: Sequence[str]) -> Iterator[UserError]:
    if name not in known:
        yield UserError(name, value, f"decoding has no option {name!r}", f"write one of {', '.join(known)}")
    for each in getattr(hint, "__metadata__", ()):
        kind = get_args(hint)[0]
        fits = isinstance(value, int | kind) and not isinstance(value, bool)
        if isinstance(each, Range) and not (fits and value in each):
            yield UserError(name, value, f"this has to be {each.words}", f"write {name}=NUMBER")
