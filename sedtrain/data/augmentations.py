"""The kinds of augmentation: speed, gain, noise, reverberation, time masks.

S samples.
"""

import logging
from collections.abc import Sequence
from math import ceil, inf, sqrt
from typing import Any, Literal

import datasets
import numpy as np
import soundfile
import soxr
from numpy.random import Generator

from sedtrain.data.audio import frames, opened
from sedtrain.data.audio_paths import audio_files
from sedtrain.data.augment import Augmentation, Samples
from sedtrain.data.headers import RefusedAudio
from sedtrain.data.load_rows import load_rows
from sedtrain.data.paths import local_path
from sedtrain.data.readers import one_line
from sedtrain.data.roles import check_columns
from sedtrain.errors import UserError
from sedtrain.ranges import Finite, Fraction, Positive, PositiveFraction, UpTo1000

logger = logging.getLogger(__name__)

LOUDEST_DB = 100.0
MAX_DRAWS = 100  # attempts to draw a readable recording
SILENT_POWER = 1e-20  # 200 dB below full scale
LOWEST_HERTZ = 20.0  # of coloured noise; without this limit most of its power would be inaudible
EXPONENTS = {"white": 0.0, "pink": 0.5, "brown": 1.0}  # amplitude is proportional to frequency ** -exponent


class Speed(Augmentation):
    """Plays an utterance at one of `factors` times its speed, pitch included (Ko et al., Interspeech 2015)."""

    def __init__(self, factors: Sequence[Positive] = (0.9, 1.0, 1.1), probability: Fraction = 1.0) -> None:
        super().__init__(probability)
        if not factors or not all(0.5 <= factor <= 2 for factor in factors):
            wrong = "these have to be numbers from 0.5 to 2, at least one"
            raise UserError("factors", list(factors), wrong, "write [0.9,1.0,1.1]")
        self.factors = list(factors)
        self.longest = max(1.0, 1 / min(factors))

    def __call__(self, audio: Samples, sampling_rate: int, random: Generator) -> Samples:
        factor = self.factors[random.integers(len(self.factors))]
        return audio if factor == 1 else resampled(audio, factor)


class Gain(Augmentation):
    """Makes an utterance louder or softer by decibels drawn uniformly from the range `gain_db`."""

    def __init__(self, gain_db: tuple[Finite, Finite] = (-10.0, 6.0), probability: Fraction = 1.0) -> None:
        super().__init__(probability)
        self.gain_db = decibels("gain_db", gain_db)

    def __call__(self, audio: Samples, sampling_rate: int, random: Generator) -> Samples:
        return audio * np.float32(10 ** (random.uniform(*self.gain_db) / 20))


class Noise(Augmentation):
    """Adds noise at a signal-to-noise ratio drawn uniformly from `snr_db`; powers are means over the utterance."""

    def __init__(self, snr_db: tuple[Finite, Finite], probability: Fraction) -> None:
        super().__init__(probability)
        self.snr_db = decibels("snr_db", snr_db)

    def __call__(self, audio: Samples, sampling_rate: int, random: Generator) -> Samples:
        snr_db = random.uniform(*self.snr_db)
        noise = self.noise(len(audio), sampling_rate, random)
        return audio + with_power(noise, power(audio) / 10 ** (snr_db / 10))

    def noise(self, num_samples: int, sampling_rate: int, random: Generator) -> Samples:
        """(num_samples,) of noise at any level; `__call__` scales it."""
        raise NotImplementedError


class ColouredNoise(Noise):
    """Adds noise of one of `colours`. Per octave, power per hertz is constant (white), halves (pink), quarters (brown)."""

    def __init__(
        self,
        colours: Sequence[Literal["white", "pink", "brown"]] = ("white", "pink", "brown"),
        snr_db: tuple[Finite, Finite] = (5.0, 30.0),
        probability: Fraction = 1.0,
    ) -> None:
        super().__init__(snr_db, probability)
        if not colours or not set(colours) <= EXPONENTS.keys():
            wrong = f"these have to be some of {', '.join(EXPONENTS)}, at least one"
            write = f"write [{','.join(EXPONENTS)}]"
            raise UserError("colours", list(colours), wrong, write, f"write colours={list(EXPONENTS)}")
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
    """Adds a random stretch of a random recording, repeated if the recording is shorter than the utterance.

    path: a folder with audio files, also in subfolders; with a `split`, any dataset that `data.path` accepts
    split, name, column: the dataset's split, its configuration on the Hub, and its audio column

    An unreadable recording is logged once, and another one is drawn instead.
    """

    def __init__(
        self,
        path: str,
        snr_db: tuple[Finite, Finite] = (5.0, 30.0),
        probability: Fraction = 1.0,
        split: str | None = None,
        name: str | None = None,
        column: str = "audio",
    ) -> None:
        super().__init__(snr_db, probability)
        self.recordings: Sequence[Any]
        if split is None:
            write = "write path=FOLDER with audio files, or path=DATASET with split=SPLIT"
            self.recordings, self.folder = audio_files("path", path, write), None
        else:
            where = local_path(path)
            self.recordings = audio_cells(path, split, name, column)
            self.folder = where if where.is_dir() else where.parent
        self.unreadable: set[int] = set()

    def noise(self, num_samples: int, sampling_rate: int, random: Generator) -> Samples:
        for _ in range(MAX_DRAWS):
            drawn = int(random.integers(len(self.recordings)))
            try:
                with opened(self.recordings[drawn], self.folder) as recording:
                    return stretch(recording, num_samples, sampling_rate, random)
            except RefusedAudio as error:
                if drawn not in self.unreadable:
                    logger.warning("noise: recording %d cannot be read (%s)", drawn, one_line(error))
                self.unreadable.add(drawn)
        return np.zeros(num_samples, np.float32)


class Reverb(Augmentation):
    """Puts an utterance into a room: convolves it with a random impulse response of `folder`.

    The direct sound (the highest peak of the response) is not delayed. Length and mean power do not change.
    """

    def __init__(self, folder: str, probability: Fraction = 1.0) -> None:
        super().__init__(probability)
        self.files = audio_files("folder", folder, "write folder=FOLDER with audio files")

    def __call__(self, audio: Samples, sampling_rate: int, random: Generator) -> Samples:
        file = self.files[random.integers(len(self.files))]
        with opened(file) as sound:
            samples, stored_rate = frames(sound, 0, sound.frames), sound.samplerate
        response = resampled(samples[:, 0], stored_rate / sampling_rate)  # mixing channels would comb
        direct = int(np.abs(response).argmax())
        if not 0 < abs(response[direct]) < inf:
            return audio
        size = fft_size(len(audio) + len(response))
        spectrum = np.fft.rfft(audio, size) * np.fft.rfft(response / response[direct], size)
        wet = np.fft.irfft(spectrum, size)[direct : direct + len(audio)].astype(np.float32, copy=False)
        return with_power(wet, power(audio))


class TimeMask(Augmentation):
    """Silences `num_masks` stretches of an utterance; each is at most `max_seconds` and `max_fraction` of it long."""

    def __init__(
        self,
        num_masks: UpTo1000 = 2,
        max_seconds: Positive = 0.1,
        max_fraction: PositiveFraction = 0.05,
        probability: Fraction = 1.0,
    ) -> None:
        super().__init__(probability)
        self.num_masks, self.max_seconds, self.max_fraction = num_masks, max_seconds, max_fraction

    def __call__(self, audio: Samples, sampling_rate: int, random: Generator) -> Samples:
        masked = audio.copy()
        longest = int(min(self.max_seconds * sampling_rate, self.max_fraction * len(audio)))
        for length in random.integers(longest, size=self.num_masks, endpoint=True):
            start = random.integers(len(audio) - length, endpoint=True)
            masked[start : start + length] = 0
        return masked


def audio_cells(path: str, split: str, name: str | None, column: str) -> Sequence[Any]:
    """The audio column of a dataset; cells are read on access. Raises UserError."""
    option, value = "path", path
    try:
        rows = load_rows(path, split, name)
        option, value = "column", column
        check_columns({"audio": column}, rows.features, f"{path} ({split})")
    except UserError as error:
        write = "write path=DATASET split=SPLIT column=COLUMN that holds audio"
        raise UserError(option, value, error.wrong, write) from error
    if isinstance(rows.features[column], datasets.Audio):
        rows = rows.cast_column(column, datasets.Audio(decode=False))
    cells: Sequence[Any] = rows.select_columns([column])[column]
    return cells


def decibels(option: str, bounds: Sequence[float]) -> tuple[float, float]:
    """The two bounds, checked. Raises UserError if they are out of range or in the wrong order."""
    if len(bounds) != 2 or not -LOUDEST_DB <= bounds[0] <= bounds[1] <= LOUDEST_DB:
        wrong = "this has to be two numbers of decibels from -100 to 100, the lower one first"
        raise UserError(option, list(bounds), wrong, "write [LOW,HIGH]")
    return bounds[0], bounds[1]


def stretch(recording: soundfile.SoundFile, num_samples: int, sampling_rate: int, random: Generator) -> Samples:
    """(num_samples,) from a random place in a recording: one channel, the mean of all."""
    wanted = ceil(num_samples * recording.samplerate / sampling_rate)
    recording.seek(random.integers(max(1, recording.frames - wanted + 1)))
    samples = recording.read(wanted, dtype="float32", always_2d=True).mean(axis=1)
    return np.resize(resampled(samples, recording.samplerate / sampling_rate), num_samples)


def resampled(audio: Samples, factor: float) -> Samples:
    """Every `factor`-th sample, anti-aliased: at most S / factor samples, at least one."""
    if factor == 1 or not len(audio):
        return audio
    samples: Samples = soxr.resample(audio, factor, 1)[: max(1, int(len(audio) / factor))]
    return samples if len(samples) else audio[:1]


def power(audio: Samples) -> float:
    """The mean square."""
    return float(np.square(audio, dtype=np.float64).mean())


def with_power(audio: Samples, wanted: float) -> Samples:
    """Scales `audio` to the mean square `wanted`; returns silence for almost silent or non-finite audio."""
    found = power(audio)
    if not SILENT_POWER < found < inf:
        return np.zeros_like(audio)
    return audio * np.float32(sqrt(wanted / found))


def fft_size(num_samples: int) -> int:
    """The next power of two."""
    return 1 << (num_samples - 1).bit_length()
