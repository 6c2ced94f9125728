"""Augmentation of the waveform: what (seed, epoch, id of the utterance, name of the augmentation) say, and nothing else.

S samples. Every augmentation draws from a generator of its own, so that neither workers, ranks, batches and order nor
the other augmentations of the chain change what it does. None of them clips: audio that a chain leaves louder than
full scale is scaled down to it as a whole, which keeps every ratio of signal to noise.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import ceil, inf, prod, sqrt
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import soundfile
import soxr
import torch
from numpy.random import Generator
from numpy.typing import NDArray

from sedtrain.batch import Utterance
from sedtrain.data.audio import UNREADABLE, is_audio_file, opened
from sedtrain.data.sources import load_rows, local_path, one_line
from sedtrain.data.utterances import check_columns
from sedtrain.errors import UserError, require

Samples = NDArray[np.float32]


class Augmentation:
    """A change of the waveform that is made with a `probability`; one of your own is a subclass.

    longest: the factor by which it lengthens an utterance at most
    """

    longest = 1.0

    def __init__(self, probability: float = 1.0) -> None:
        require(0 <= probability <= 1, "probability", probability, "a number from 0 to 1")
        self.probability = probability

    def __call__(self, audio: Samples, sampling_rate: int, random: Generator) -> Samples:
        """Other (S,) samples at the same rate, all of `random`'s making; `audio` itself stays as it is."""
        raise NotImplementedError


class Augment:
    """Applies augmentations in their order, by name, each with its probability; meant for training alone.

    max_seconds: an augmentation that would make an utterance longer is left out of it
    longest:     the factor by which the chain lengthens an utterance at most
    """

    def __init__(self, augmentations: Mapping[str, Augmentation], seed: int, max_seconds: float = inf) -> None:
        self.augmentations, self.seed, self.max_seconds = dict(augmentations), seed, max_seconds
        self.longest = prod(augmentation.longest for augmentation in augmentations.values())

    def __call__(self, utterance: Utterance, epoch: int) -> Utterance:
        """The utterance as it sounds in this epoch, with its new length in `seconds`; the given one stays as it is."""
        original: Samples = utterance.audio.numpy()
        audio, rate = original, utterance.sampling_rate
        for name, augmentation in self.augmentations.items():
            random = generator(self.seed, epoch, utterance.id, name)
            if random.random() < augmentation.probability:
                changed = augmentation(audio, rate, random)
                audio = changed if len(changed) <= max(self.max_seconds * rate, len(audio)) else audio
        if audio is original:
            return utterance
        audio = np.ascontiguousarray(audio / max(1.0, float(np.abs(audio).max())), dtype=np.float32)
        return replace(utterance, audio=torch.from_numpy(audio), seconds=len(audio) / rate)


def generator(seed: int, epoch: int, id: str, name: str) -> Generator:
    """The random numbers of one augmentation for one utterance in one epoch."""
    key = ascii((seed, epoch, id, name)).encode()  # no two such tuples are written alike
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "big"))


@contextmanager
def options_of(path: str) -> Iterator[None]:
    """What an augmentation refuses by the name of an option is refused by the option's path."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}.{error.what_is_wrong}", f"{path}.{error.write_instead}") from error


def audio_files(option: str, folder: str, instead: str) -> list[str]:
    """The audio files of a folder and those below it, in one order everywhere.

    option, instead: which option names the folder, and what to write where there is none
    Raises UserError where there are none, or one that cannot be read.
    """
    where = Path(folder).expanduser()
    files = sorted(path.as_posix() for path in where.rglob("*") if is_audio_file(path.name))
    if not files:
        wrong = f"{option}={folder}: {'there is no audio in it' if where.is_dir() else 'there is no such folder'}"
        raise UserError(wrong, instead)
    for file in files:
        try:
            if not soundfile.info(file).frames:
                raise OSError("it has no samples")
        except UNREADABLE as error:
            wrong = f"{option}={folder}: {file} cannot be read ({one_line(error)})"
            raise UserError(wrong, f"{option}=FOLDER whose audio files can all be read") from error
    return files


def audio_cells(path: str, split: str, name: str | None, column: str) -> Sequence[Any]:
    """A column of a dataset, of which each cell is read when it is asked for. Raises UserError."""
    try:
        rows = load_rows(path, split, name)
        check_columns({"audio": column}, rows.features, f"{path} ({split})")
    except UserError as error:
        wrong = error.what_is_wrong.replace("data.columns:", "column:").removeprefix("data.")
        raise UserError(wrong, "path=DATASET split=SPLIT column=COLUMN that holds audio") from error
    if isinstance(rows.features[column], datasets.Audio):
        rows = rows.cast_column(column, datasets.Audio(decode=False))
    cells: Sequence[Any] = rows.select_columns([column])[column]
    return cells


def folder_of(path: str) -> Path:
    """Where the relative paths of a dataset's audio begin."""
    where = local_path(path)
    return where if where.is_dir() else where.parent


logger = logging.getLogger(__name__)


LOUDEST_DB = 100.0


MAX_DRAWS = 100  # of recordings until one can be read


SILENT_POWER = 1e-20  # 200 dB below full scale


LOWEST_HERTZ = 20.0  # of coloured noise: below, it would have most of its power where nobody hears it


EXPONENTS = {"white": 0.0, "pink": 0.5, "brown": 1.0}  # of the amplitude: it falls with the frequency to that power


class Speed(Augmentation):
    """Plays an utterance at one of `factors` times its speed, pitch included (Ko et al., Interspeech 2015)."""

    def __init__(self, factors: Sequence[float] = (0.9, 1.0, 1.1), probability: float = 1.0) -> None:
        super().__init__(probability)
        if not factors or not all(0.5 <= factor <= 2 for factor in factors):
            wrong = f"factors={list(factors)}: these have to be numbers from 0.5 to 2, at least one"
            raise UserError(wrong, "factors=[0.9,1.0,1.1]")
        self.factors = list(factors)
        self.longest = max(1.0, 1 / min(factors))

    def __call__(self, audio: Samples, sampling_rate: int, random: Generator) -> Samples:
        factor = self.factors[random.integers(len(self.factors))]
        return audio if factor == 1 else resampled(audio, factor)


class Gain(Augmentation):
    """Makes an utterance louder or softer by a number of decibels within `gain_db`, drawn evenly."""

    def __init__(self, gain_db: tuple[float, float] = (-10.0, 6.0), probability: float = 1.0) -> None:
        super().__init__(probability)
        self.gain_db = decibels("gain_db", gain_db)

    def __call__(self, audio: Samples, sampling_rate: int, random: Generator) -> Samples:
        return audio * np.float32(10 ** (random.uniform(*self.gain_db) / 20))


class Noise(Augmentation):
    """Adds noise at a ratio of signal to noise within `snr_db`, drawn evenly: of mean powers over the whole utterance."""

    def __init__(self, snr_db: tuple[float, float], probability: float) -> None:
        super().__init__(probability)
        self.snr_db = decibels("snr_db", snr_db)

    def __call__(self, audio: Samples, sampling_rate: int, random: Generator) -> Samples:
        snr_db = random.uniform(*self.snr_db)
        noise = self.noise(len(audio), sampling_rate, random)
        return audio + with_power(noise, power(audio) / 10 ** (snr_db / 10))

    def noise(self, num_samples: int, sampling_rate: int, random: Generator) -> Samples:
        """(num_samples,) of noise, however loud."""
        raise NotImplementedError


class ColouredNoise(Noise):
    """Adds noise of one of `colours`: the power in each hertz stays (white), halves (pink) or quarters (brown) an octave."""

    def __init__(
        self,
        colours: Sequence[Literal["white", "pink", "brown"]] = ("white", "pink", "brown"),
        snr_db: tuple[float, float] = (5.0, 30.0),
        probability: float = 1.0,
    ) -> None:
        super().__init__(snr_db, probability)
        if not colours or not set(colours) <= EXPONENTS.keys():
            wrong = f"colours={list(colours)}: these have to be some of {', '.join(EXPONENTS)}, at least one"
            raise UserError(wrong, f"colours=[{','.join(EXPONENTS)}]")
        self.colours = list(colours)

    def noise(self, num_samples: int, sampling_rate: int, random: Generator) -> Samples:
        exponent = EXPONENTS[self.colours[random.integers(len(self.colours))]]
        if not exponent:
            return random.standard_normal(num_samples, dtype=np.float32)
        size = fft_size(max(num_samples, sampling_rate))
        frequencies = np.fft.rfftfreq(size, LOWEST_HERTZ / sampling_rate)  # in multiples of the lowest
        weights = np.where(frequencies < 1, 0.0, np.maximum(frequencies, 1) ** -exponent).astype(np.float32)
        spectrum = np.fft.rfft(random.standard_normal(size, dtype=np.float32)) * weights
        return np.fft.irfft(spectrum, size)[:num_samples].astype(np.float32, copy=False)


class RecordedNoise(Noise):
    """Adds a random stretch of a random recording, which repeats where it is shorter than the utterance.

    path: a folder, searched through for audio files; with a split, whatever `data.path` may name
    split, name, column: the dataset's split, its configuration on the Hub, and the column of the audio

    A recording that turns out to be unreadable is told of once, and the next one drawn takes its place.
    """

    def __init__(
        self,
        path: str,
        snr_db: tuple[float, float] = (5.0, 30.0),
        probability: float = 1.0,
        split: str | None = None,
        name: str | None = None,
        column: str = "audio",
    ) -> None:
        super().__init__(snr_db, probability)
        instead = "path=FOLDER with audio files, or path=DATASET with split=SPLIT"
        self.recordings: Sequence[Any] = (
            audio_files("path", path, instead) if split is None else audio_cells(path, split, name, column)
        )
        self.folder = None if split is None else folder_of(path)
        self.unreadable: set[int] = set()

    def noise(self, num_samples: int, sampling_rate: int, random: Generator) -> Samples:
        for _ in range(MAX_DRAWS):
            drawn = int(random.integers(len(self.recordings)))
            try:
                with opened(self.recordings[drawn], self.folder) as recording:
                    return stretch(recording, num_samples, sampling_rate, random)
            except UNREADABLE as error:
                if drawn not in self.unreadable:
                    logger.warning("noise: recording %d cannot be read (%s)", drawn, one_line(error))
                self.unreadable.add(drawn)
        return np.zeros(num_samples, np.float32)


class Reverb(Augmentation):
    """Puts an utterance into a room: convolution with one of the impulse responses of `folder`.

    The direct sound, the highest peak of the response, arrives when it did before; the length and the mean power stay.
    """

    def __init__(self, folder: str, probability: float = 1.0) -> None:
        super().__init__(probability)
        self.files = audio_files("folder", folder, "folder=FOLDER with audio files")

    def __call__(self, audio: Samples, sampling_rate: int, random: Generator) -> Samples:
        samples, stored_rate = soundfile.read(
            self.files[random.integers(len(self.files))], dtype="float32", always_2d=True
        )
        response = resampled(samples[:, 0], stored_rate / sampling_rate)  # a mean of channels would comb
        direct = int(np.abs(response).argmax())
        if not 0 < abs(response[direct]) < inf:
            return audio
        size = fft_size(len(audio) + len(response))
        spectrum = np.fft.rfft(audio, size) * np.fft.rfft(response / response[direct], size)
        wet = np.fft.irfft(spectrum, size)[direct : direct + len(audio)].astype(np.float32, copy=False)
        return with_power(wet, power(audio))


class TimeMask(Augmentation):
    """Silences `num_masks` stretches of an utterance, each of up to `max_seconds` and up to `max_fraction` of it."""

    def __init__(
        self, num_masks: int = 2, max_seconds: float = 0.1, max_fraction: float = 0.05, probability: float = 1.0
    ) -> None:
        super().__init__(probability)
        require(num_masks >= 1, "num_masks", num_masks, "1 or more")
        require(0 < max_seconds < inf, "max_seconds", max_seconds, "a number above 0")
        require(0 < max_fraction <= 1, "max_fraction", max_fraction, "a number above 0, up to 1")
        self.num_masks, self.max_seconds, self.max_fraction = num_masks, max_seconds, max_fraction

    def __call__(self, audio: Samples, sampling_rate: int, random: Generator) -> Samples:
        masked = audio.copy()
        longest = int(min(self.max_seconds * sampling_rate, self.max_fraction * len(audio)))
        for length in random.integers(longest, size=self.num_masks, endpoint=True):
            start = random.integers(len(audio) - length, endpoint=True)
            masked[start : start + length] = 0
        return masked


def resampled(audio: Samples, factor: float) -> Samples:
    """Every `factor`-th sample, anti-aliased; at least one, and at most S / factor of them."""
    if factor == 1 or not len(audio):
        return audio
    samples: Samples = soxr.resample(audio, factor, 1)[: max(1, int(len(audio) / factor))]
    return samples if len(samples) else audio[:1]


def power(audio: Samples) -> float:
    """The mean square."""
    return float(np.square(audio, dtype=np.float64).mean())


def with_power(audio: Samples, wanted: float) -> Samples:
    """Scaled to a mean square; silence where `audio` has next to none, or samples that are not numbers."""
    found = power(audio)
    if not SILENT_POWER < found < inf:
        return np.zeros_like(audio)
    return audio * np.float32(sqrt(wanted / found))


def fft_size(num_samples: int) -> int:
    """The next power of two."""
    return 1 << (num_samples - 1).bit_length()


def stretch(recording: soundfile.SoundFile, num_samples: int, sampling_rate: int, random: Generator) -> Samples:
    """(num_samples,) from anywhere in a recording, one channel, the mean of all."""
    wanted = ceil(num_samples * recording.samplerate / sampling_rate)
    recording.seek(random.integers(max(1, recording.frames - wanted + 1)))
    samples = recording.read(wanted, dtype="float32", always_2d=True).mean(axis=1)
    return np.resize(resampled(samples, recording.samplerate / sampling_rate), num_samples)


def decibels(option: str, bounds: Sequence[float]) -> tuple[float, float]:
    """The lower and the higher bound. Raises UserError."""
    if len(bounds) != 2 or not -LOUDEST_DB <= bounds[0] <= bounds[1] <= LOUDEST_DB:
        wrong = f"{option}={list(bounds)}: this has to be two numbers of decibels from -100 to 100, the lower one first"
        raise UserError(wrong, f"{option}=[LOW,HIGH]")
    return bounds[0], bounds[1]
