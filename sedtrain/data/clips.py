"""A cell of an audio column becomes samples: bytes, the path of a file, or a range of bytes in a larger one.

S samples. Audio is decoded by soundfile from the bytes as they are stored: neither torchcodec nor FFmpeg is needed.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch

AUDIO_FORMATS = {*soundfile.available_formats(), "OPUS"} - {"RAW"}  # raw audio does not say its sampling rate
MP3_RESERVOIR = 11_520  # samples: a frame of MP3 needs up to 511 bytes of those before it, or is decoded wrongly
UNREADABLE = (soundfile.LibsndfileError, OSError, TypeError)


class RefusedAudio(OSError):
    """Audio that is not read although it may be there; `reason` is one of few words, so that reasons can be counted."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def is_audio_file(name: str) -> bool:
    return os.path.splitext(name)[1][1:].upper() in AUDIO_FORMATS


def leaves_folder(name: str) -> bool:
    """Whether a relative name climbs out of the folder that it is relative to, links not followed."""
    return os.path.normpath(name).split(os.sep)[0] == os.pardir


def path_in(folder: Path, name: str) -> str:
    """Where `name` is. An absolute one is taken as its author wrote it; a relative one has to stay in the folder."""
    if "\0" in name or (not os.path.isabs(name) and leaves_folder(name)):
        raise RefusedAudio("path outside the dataset's folder", name.replace("\0", "\\0"))
    return str(folder / name)


class ByteRange(io.RawIOBase):
    """`size` bytes of a file from `offset` on, as a file of their own: a member of a tar is read without the tar."""

    def __init__(self, path: str, offset: int, size: int) -> None:
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        self.offset, self.size, self.position = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = max(0, start + offset)
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer)[: max(0, self.size - self.position)]
        self.file.seek(self.offset + self.position)
        number = self.file.readinto(room) or 0
        self.position += number
        return number

    def close(self) -> None:
        self.file.close()
        super().close()


@contextmanager
def opened(cell: Any, folder: Path | None = None) -> Iterator[soundfile.SoundFile]:
    """The audio of a cell: bytes, a path, or what an `Audio(decode=False)` cell or a member of a tar holds of these.

    folder: where relative paths begin, and what they must not leave; without one, paths are the user's own
    Raises one of UNREADABLE where there is no audio.
    """
    values = cell if isinstance(cell, dict) else {"bytes" if isinstance(cell, bytes) else "path": cell}
    content, path = values.get("bytes"), values.get("path")
    if content is not None:
        with soundfile.SoundFile(io.BytesIO(content)) as sound:
            yield sound
        return
    if not path:
        raise OSError("the row has neither audio bytes nor a path")
    where = str(path) if folder is None else path_in(folder, str(path))
    if values.get("offset") is None:
        with soundfile.SoundFile(where) as sound:
            yield sound
        return
    member = ByteRange(where, values["offset"], values["size"])
    with io.BufferedReader(member, 1 << 16) as file, soundfile.SoundFile(file) as sound:
        yield sound


def frames_between(sound: soundfile.SoundFile, start: float | None, end: float | None) -> tuple[int, int]:
    """The first frame of a segment in seconds, and the one behind its last. Raises RefusedAudio where it has none."""
    rate, total = sound.samplerate, sound.frames
    first = 0.0 if start is None else start
    last = inf if end is None else end
    if not 0 <= first < last or first * rate >= total > 0:
        wanted = f"{first:.2f} s to {'its end' if end is None else f'{end:.2f} s'}"
        raise RefusedAudio("no such segment", f"{wanted}, of {total / rate:.2f} s")
    return round(first * rate), total if last * rate >= total else round(last * rate)


def seconds_between(cell: Any, folder: Path | None, start: float | None = None, end: float | None = None) -> float:
    """The length of the audio, or of a segment of it, by its header. Raises one of UNREADABLE."""
    with opened(cell, folder) as sound:
        first, last = frames_between(sound, start, end)
        return (last - first) / int(sound.samplerate)


def read_audio(
    cell: Any, sampling_rate: int, folder: Path | None = None, start: float | None = None, end: float | None = None
) -> torch.Tensor:
    """(S,) float32 in -1..1: one channel (the mean of all) at `sampling_rate` hertz. Raises one of UNREADABLE.

    start, end: seconds; nothing but the frames between them is decoded, of MP3 some before them. In the last page of
        a Vorbis file libsndfile seeks up to 20 ms too far back.
    """
    with opened(cell, folder) as sound:
        first, last = frames_between(sound, start, end)
        earlier = min(first, MP3_RESERVOIR) if sound.format == "MP3" else 0
        if first:
            sound.seek(first - earlier)
        samples = sound.read(last - first + earlier, dtype="float32", always_2d=True)[earlier:]
        stored_rate = sound.samplerate
    mono = samples.mean(axis=1)
    if not len(mono) or not np.isfinite(mono).all():
        raise OSError("the audio has no samples, or some that are not numbers")
    if stored_rate != sampling_rate:
        mono = soxr.resample(mono, stored_rate, sampling_rate)
    return torch.from_numpy(np.ascontiguousarray(mono, dtype=np.float32))
