"""What utterances sound like: headers and decoded samples of a few, drawn at random.

S samples. Levels are in dBFS: 0 is the loudest that can be stored.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sedtrain.batch import Skipped
from sedtrain.data.clips import UNREADABLE, opened
from sedtrain.data.parts import Parts, Reference

FULL_SCALE = 0.999
CLIPPED_RUN = 3  # samples in a row at full scale
QUIETEST = -100.0  # dBFS of no sound at all
WINDOW_SECONDS = 0.02
PLAYED_RATE, PLAYED_SECONDS = 48_000, 60
SILENCE = 40.0  # decibels below the loudest window


@dataclass(frozen=True)
class Sound:
    """One utterance, decoded.

    level:   of the whole, as root mean square, dBFS
    silence: share of windows of 20 ms that are silent
    seconds: what was decoded
    """

    sampling_rate: int
    num_channels: int
    format: str
    seconds: float
    level: float
    is_clipped: bool
    silence: float


def listen(parts: Parts, references: Sequence[Reference]) -> list[Sound | Skipped]:
    """Decodes utterances, several at a time; what cannot be decoded is told as in training."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(lambda reference: hear(parts, reference), references))


def hear(parts: Parts, reference: Reference) -> Sound | Skipped:
    part, index = reference
    rows = parts[part]
    try:
        with opened(rows.rows[index][rows.columns.audio], rows.folder) as file:
            sampling_rate, num_channels, format = file.samplerate, file.channels, f"{file.format} {file.subtype}"
        samples = rows.utterance(index, sampling_rate).audio.numpy()
    except UNREADABLE as error:
        return rows.skipped(index, getattr(error, "reason", "undecodable audio"), str(error))
    return Sound(
        sampling_rate,
        num_channels,
        format,
        len(samples) / sampling_rate,
        level(samples),
        is_clipped(samples),
        silence(samples, sampling_rate),
    )


def sound_of(parts: Parts, reference: Reference) -> tuple[NDArray[np.float32], int] | None:
    """What can be played of an utterance, its beginning if it is long: (S,) samples and their rate; None: nothing."""
    part, index = reference
    rows = parts[part]
    try:
        with opened(rows.rows[index][rows.columns.audio], rows.folder) as file:
            sampling_rate = min(file.samplerate, PLAYED_RATE)
        samples = rows.utterance(index, sampling_rate).audio.numpy()
    except UNREADABLE:
        return None
    return samples[: PLAYED_SECONDS * sampling_rate], sampling_rate


def level(samples: NDArray[np.float32]) -> float:
    """dBFS of (S,) samples, no less than QUIETEST."""
    power = float(np.mean(np.square(samples, dtype=np.float64)))
    return max(10 * float(np.log10(power)), QUIETEST) if power else QUIETEST


def is_clipped(samples: NDArray[np.float32]) -> bool:
    """Whether several samples in a row are at full scale."""
    at_limit = np.abs(samples) >= FULL_SCALE
    return bool(np.convolve(at_limit, np.ones(CLIPPED_RUN), "valid").max(initial=0) >= CLIPPED_RUN)


def silence(samples: NDArray[np.float32], sampling_rate: int) -> float:
    """Share of the windows that are much quieter than the loudest; 1 where nothing sounds."""
    size = max(1, round(WINDOW_SECONDS * sampling_rate))
    windows = samples[: max(1, len(samples) // size) * size].reshape(-1, min(size, len(samples)))
    power = np.square(windows, dtype=np.float64).mean(axis=1)
    return float(np.mean(power <= power.max() * 10 ** (-SILENCE / 10)))
