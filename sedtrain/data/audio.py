"""Reads the samples of a cell of an audio column: bytes, the path of a file, or a range of bytes in a larger file.

S samples. soundfile decodes the bytes as they are stored; torchcodec and FFmpeg are not needed.
"""

import io
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from numpy.typing import NDArray

from sedtrain.data.headers import Claim, RefusedAudio, claim_of

SUFFIXES = {*soundfile.available_formats()} - {"RAW"} | {"AIF", "AIFC", "MP2", "OGA", "OPUS", "SND", "SPH", "WAVE"}
"""Suffixes of formats that can be read. RAW is none of them, because it does not store its sampling rate."""
OTHER_SUFFIXES = {
    "3GP", "AAC", "AC3", "AMR", "APE", "AVI", "M4A", "M4B", "MKA", "MKV", "MOV", "MP4", "SPX", "TTA", "WEBM", "WMA", "WV",
}  # fmt: skip
"""Suffixes of audio formats that libsndfile does not read."""
MP3_RESERVOIR = 11_520  # samples; an MP3 frame needs up to 511 bytes of the frames before it
RATES = range(1_000, 768_001)  # hertz; resampling from a rate outside could fill the memory
AT_ONCE = 1 << 22  # values per read; bounded because a header can claim any length
STREAMED = 1 << 17  # values per block of a stream
LOUDEST = 2.0**31  # amplitude of 32-bit integers that were stored as floats without scaling
TOLERATED_SECONDS = 0.1  # a file may be shorter or longer than its header says by this much
LONGEST = 1 << 40  # samples; libsndfile reports 1 << 63 for an unknown length


def fault_of(error: RefusedAudio) -> str:
    return str(error) if error.reason in str(error) else f"{error.reason}: {error}"


def is_audio_file(name: str) -> bool:
    """True for the suffix of a format that can be read."""
    return os.path.splitext(name)[1][1:].upper() in SUFFIXES


def is_media_file(name: str) -> bool:
    """True for the suffix of any audio format, readable or not: unreadable files are reported one by one."""
    return is_audio_file(name) or os.path.splitext(name)[1][1:].upper() in OTHER_SUFFIXES


def leaves_folder(name: str) -> bool:
    """True for a relative name that leaves its folder by `..`; does not follow links."""
    return os.path.normpath(name).split(os.sep)[0] == os.pardir


def path_in(folder: Path, name: str) -> str:
    """The path of `name` in the folder. Raises RefusedAudio for a relative name that leaves the folder."""
    if "\0" in name or (not os.path.isabs(name) and leaves_folder(name)):
        raise RefusedAudio("path outside the dataset's folder", name.replace("\0", "\\0"))
    return str(folder / name)


class Content(io.BytesIO):
    """Bytes as a file. A seek beyond either end stops there, since corrupt headers make readers seek anywhere."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        size = len(self.getbuffer())
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: size}[whence]
        return super().seek(min(max(0, start + offset), size))


class ByteRange(io.FileIO):
    """`size` bytes of a file from `offset` on, read as a separate file, such as a member of a tar.

    at, patch: `patch` replaces the stored bytes from position `at` on
    """

    readall = io.RawIOBase.readall  # calls readinto, which applies the range and the patch

    def __init__(self, path: str, offset: int, size: int, at: int = 0, patch: bytes = b"") -> None:
        super().__init__(path)
        self.offset, self.size, self.at, self.patch = offset, size, at, patch
        self.seek(0)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = self.tell() if whence == os.SEEK_CUR else self.size if whence == os.SEEK_END else 0
        return super().seek(self.offset + min(max(0, start + offset), self.size)) - self.offset

    def tell(self) -> int:
        return super().tell() - self.offset

    def readinto(self, buffer: Any) -> int:
        first, view = self.tell(), memoryview(buffer)
        number = super().readinto(view[: max(0, self.size - first)])
        for at, byte in enumerate(self.patch, start=self.at - first):
            if 0 <= at < number:
                view[at] = byte
        return number


class Nameless(io.BufferedReader):
    """A file without a name, since soundfile takes a file named .raw for raw samples."""

    name = ""


class Sound(soundfile.SoundFile):
    """An opened recording. `missing`: seconds by which the file is shorter than its header claims; below 0: longer."""

    missing = 0.0


def fields_of(cell: Any) -> dict[str, Any]:
    """The cell as a dict: `bytes` or `path`, with `offset` and `size` if the audio is a range of a larger file."""
    return cell if isinstance(cell, dict) else {"bytes" if isinstance(cell, bytes) else "path": cell}


@contextmanager
def opened(cell: Any, folder: Path | None = None) -> Iterator[Sound]:
    """Opens the audio of a cell: bytes, a path, or a dict of an `Audio(decode=False)` column or of a tar member.

    folder: relative paths start here and must stay inside; None: the user gave the path, which may lead anywhere
    Raises RefusedAudio for unreadable audio and for an impossible sampling rate or length. The suffix does not matter.
    """
    try:
        file, claim = content_of(fields_of(cell), folder)
        # libsndfile reads a FileIO itself, without Python's lock; of any other file it calls the Python methods
        with file, Sound(file.fileno() if type(file) is io.FileIO else file, closefd=False) as sound:
            if sound.samplerate not in RATES:
                raise RefusedAudio("impossible sampling rate", f"{sound.samplerate} Hz")
            if sound.frames > LONGEST:
                raise RefusedAudio("unreadable audio", "it does not say its length")
            sound.missing = claim.missing * sound.frames / sound.samplerate
            yield sound
    except RefusedAudio:
        raise
    except (soundfile.LibsndfileError, OSError) as error:
        raise RefusedAudio("unreadable audio", words_of(error)) from error


def content_of(fields: Mapping[str, Any], folder: Path | None) -> tuple[io.IOBase, Claim]:
    """The audio of a cell as an open file, and the claim of its header."""
    if (content := fields.get("bytes")) is not None:
        refuse_empty(len(content), "0 bytes")
        claim = claim_of(Content(content), len(content))
        return Content(claim.mended(content)), claim
    if not fields.get("path"):
        raise RefusedAudio("no audio", "the row has neither audio bytes nor a path")
    return file_of(fields, folder)


def file_of(fields: Mapping[str, Any], folder: Path | None) -> tuple[io.IOBase, Claim]:
    """The file that a cell names, or the named range of it, and the claim of its header."""
    path = str(fields["path"]) if folder is None else path_in(folder, str(fields["path"]))
    try:
        facts = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RefusedAudio("missing file", path) from error
    if not stat.S_ISREG(facts.st_mode):  # a pipe might never end
        raise RefusedAudio("missing file", f"{path} is no file")
    is_part = fields.get("offset") is not None
    offset, size = (fields["offset"], fields["size"]) if is_part else (0, facts.st_size)
    refuse_empty(size, f"{path}, at byte {offset}" if offset else path)
    claim = claim_at(path, offset, size, facts.st_mtime_ns)
    if not (is_part or claim.patch or claim.prefix):
        return io.FileIO(path), claim
    file = Nameless(ByteRange(path, offset, size, claim.at, claim.patch), 1 << 16)
    if not claim.prefix:
        return file, claim
    with file:
        return Content(claim.mended(file.read())), claim


@lru_cache(maxsize=4096)
def claim_at(path: str, offset: int, size: int, changed: int) -> Claim:
    """The header's claim for a range of a file, cached because the segments of a recording share it.

    changed: modification time of the file, so that a changed file is read again
    """
    with ByteRange(path, offset, size) as file:  # unbuffered: the reads are few, short and far apart
        return claim_of(file, size)


def refuse_empty(num_bytes: int, detail: str) -> None:
    if not num_bytes:
        raise RefusedAudio("empty file", detail)


def words_of(error: Exception) -> str:
    if isinstance(error, soundfile.LibsndfileError):
        return str(error.error_string) or f"error {error.code} of libsndfile"
    return str(error)


def frames_between(sound: Sound, start: float | None, end: float | None) -> tuple[int, int]:
    """The first frame of a segment given in seconds, and the frame after its last.

    Raises RefusedAudio for an empty segment, and for one that reaches the end of audio whose header is wrong.
    """
    rate, total = sound.samplerate, sound.frames
    first = 0.0 if start is None else start
    last = inf if end is None else end
    if not 0 <= first < last or first * rate >= total > 0:
        wanted = f"{first:.2f} s to {'its end' if end is None else f'{end:.2f} s'}"
        raise RefusedAudio("no such segment", f"{wanted}, of {total / rate:.2f} s")
    if last * rate < total:
        return round(first * rate), round(last * rate)
    refuse_missing(sound.missing)
    if not total:
        raise RefusedAudio("no samples", "the audio has no samples")
    return round(first * rate), total


def refuse_missing(seconds: float) -> None:
    """Raises RefusedAudio if audio is missing, or in excess (seconds below 0): it would not match its text."""
    if seconds > TOLERATED_SECONDS:
        raise RefusedAudio("truncated audio", f"{seconds:.2f} s are missing")
    if -seconds > TOLERATED_SECONDS:
        raise RefusedAudio("more audio than its header says", f"{-seconds:.2f} s more")


def seconds_between(
    cell: Any,
    folder: Path | None,
    start: float | None = None,
    end: float | None = None,
    declared: float | None = None,
) -> float:
    """The length in seconds of the audio, or of a segment, by the header. Raises as `read_audio` does."""
    with opened(cell, folder) as sound:
        first, last = frames_between(sound, start, end)
        seconds = (last - first) / int(sound.samplerate)
    refuse_misdeclared(seconds, declared)
    return seconds


def refuse_misdeclared(seconds: float, declared: float | None) -> None:
    if declared is not None and abs(seconds - declared) > max(0.5, 0.1 * declared):
        raise RefusedAudio("declared duration is wrong", f"{seconds:.2f} s, declared {declared:.2f} s")


def read_audio(
    cell: Any,
    sampling_rate: int,
    folder: Path | None = None,
    start: float | None = None,
    end: float | None = None,
    declared: float | None = None,
) -> torch.Tensor:
    """(S,) float32, finite: one channel (the mean of all) at `sampling_rate` hertz. Raises RefusedAudio.

    start, end: seconds; only the frames between them are decoded, plus some earlier ones for MP3. In the last page of
        a Vorbis file libsndfile seeks up to 20 ms too far back.
    declared: the length in seconds by the dataset. Audio of another length is refused before it is decoded: batches
        are planned by declared lengths, and much longer audio would not fit in memory.
    """
    with opened(cell, folder) as sound:
        first, last = frames_between(sound, start, end)
        stored_rate = sound.samplerate
        refuse_misdeclared((last - first) / stored_rate, declared)
        samples = frames(sound, first, last)
        refuse_missing((last - first - len(samples)) / stored_rate)
    mono = one_channel(samples)
    if stored_rate != sampling_rate:
        mono = soxr.resample(mono, stored_rate, sampling_rate)
    if not len(mono):
        raise RefusedAudio("no samples", f"{len(samples)} at {stored_rate} Hz")
    return torch.from_numpy(np.ascontiguousarray(mono, dtype=np.float32))


def audio_blocks(cell: Any, sampling_rate: int) -> Iterator[NDArray[np.float32]]:
    """Yields the samples that `read_audio` returns, in blocks of bounded length. Raises RefusedAudio."""
    with opened(cell) as sound:
        first, last = frames_between(sound, None, None)
        stored_rate, num_read = sound.samplerate, 0
        stream = soxr.ResampleStream(stored_rate, sampling_rate, 1) if stored_rate != sampling_rate else None
        for block in filter(len, frame_blocks(sound, first, last, STREAMED)):
            mono, num_read = one_channel(block), num_read + len(block)
            yield mono if stream is None else stream.resample_chunk(mono)
        refuse_missing((last - num_read) / stored_rate)
        if stream is not None:
            yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def frames(sound: Sound, first: int, last: int) -> NDArray[np.float32]:
    """(frames, channels) from `first` to `last`, or to the end of the audio."""
    earlier = min(first, MP3_RESERVOIR) if sound.format == "MP3" else 0
    blocks = list(frame_blocks(sound, first - earlier, last, AT_ONCE)) or [np.zeros((0, 1), np.float32)]
    return (blocks[0] if len(blocks) == 1 else np.concatenate(blocks))[earlier:]


def frame_blocks(sound: Sound, first: int, last: int, num_values: int) -> Iterator[NDArray[np.float32]]:
    """Yields (frames, channels) in blocks of at most `num_values` values. Raises RefusedAudio."""
    missing, at_once = last - first, num_values // sound.channels
    try:
        if first:
            sound.seek(first)
        while missing > 0:
            block = sound.read(min(missing, at_once), dtype="float32", always_2d=True)
            yield block
            missing = missing - len(block) if len(block) == at_once else 0
    except (soundfile.LibsndfileError, soundfile.SoundFileRuntimeError) as error:
        raise RefusedAudio("undecodable audio", words_of(error)) from error


def refuse_silence(samples: torch.Tensor) -> None:
    """Raises RefusedAudio if all samples are equal: such audio holds no speech."""
    if bool((samples == samples[0]).all()):
        raise RefusedAudio("silent audio", f"every sample is {float(samples[0]):g}")


def one_channel(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """(frames, channels) -> (frames,), the mean. Raises RefusedAudio for no samples and for impossible values."""
    if not len(samples):
        raise RefusedAudio("no samples", "the audio has no samples")
    if not np.isfinite(samples).all():
        raise RefusedAudio("NaN or infinite samples", f"{np.count_nonzero(~np.isfinite(samples))} of {samples.size}")
    if (loudest := max(float(samples.max()), -float(samples.min()))) > LOUDEST:
        raise RefusedAudio("samples out of range", f"up to {loudest:.3g}")
    mono: NDArray[np.float32] = samples.mean(axis=1)
    return mono
