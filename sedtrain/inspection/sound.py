"""Decodes utterances of a corpus: how loud, clipped and silent they are. S samples."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sedtrain.batch import Skipped
from sedtrain.data.audio import UNREADABLE, opened
from sedtrain.data.dataset import Parts, Reference

Samples = NDArray[np.float32]  # (S,) in -1..1

FULL_SCALE, CLIPPED_RUN = 0.999, 3  # so many samples in a row at full scale are clipped
QUIETEST = -100.0  # dBFS of digital silence
WINDOW_SECONDS, SILENCE = 0.02, 40.0  # a window so many decibels below the loudest one is silent
PLAYED_RATE, PLAYED_SECONDS = 48_000, 60  # at most


@dataclass(frozen=True)
class Sound:
    """One decoded utterance: root mean square level in dBFS, and the share of its windows that are silent."""

    sampling_rate: int
    num_channels: int
    format: str
    seconds: float
    level: float
    is_clipped: bool
    silence: float


def listen(parts: Parts, references: Sequence[Reference]) -> list[Sound | Skipped]:
    """Decodes utterances in threads; Skipped, with the reason that training would give, where that fails."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(lambda reference: hear(parts, reference), references))


def hear(parts: Parts, reference: Reference) -> Sound | Skipped:
    part, index = reference
    rows = parts[part]
    try:
        with opened(rows.rows[index][rows.columns.audio], rows.folder) as file:
            rate, num_channels, format = file.samplerate, file.channels, f"{file.format} {file.subtype}"
        samples = rows.utterance(index, rate).audio.numpy()
    except UNREADABLE as error:
        return rows.skipped(index, getattr(error, "reason", "undecodable audio"), str(error))
    loudness = level(samples), is_clipped(samples), silence(samples, rate)
    return Sound(rate, num_channels, format, len(samples) / rate, *loudness)


def playable(parts: Parts, reference: Reference) -> tuple[Samples, int] | None:
    """Samples of an utterance, truncated where it is long, and their sampling rate; None where it cannot be decoded."""
    part, index = reference
    rows = parts[part]
    try:
        with opened(rows.rows[index][rows.columns.audio], rows.folder) as file:
            rate = min(file.samplerate, PLAYED_RATE)
        return rows.utterance(index, rate).audio.numpy()[: PLAYED_SECONDS * rate], rate
    except UNREADABLE:
        return None


def level(samples: Samples) -> float:
    """Root mean square in dBFS, at least QUIETEST."""
    power = float(np.mean(np.square(samples, dtype=np.float64)))
    return max(10 * float(np.log10(power)), QUIETEST) if power else QUIETEST


def is_clipped(samples: Samples) -> bool:
    at_limit = np.abs(samples) >= FULL_SCALE
    return bool(np.convolve(at_limit, np.ones(CLIPPED_RUN), "valid").max(initial=0) >= CLIPPED_RUN)


def silence(samples: Samples, sampling_rate: int) -> float:
    """Share of windows that are silent; 1 for digital silence."""
    size = max(1, round(WINDOW_SECONDS * sampling_rate))
    windows = samples[: max(1, len(samples) // size) * size].reshape(-1, min(size, len(samples)))
    power = np.square(windows, dtype=np.float64).mean(axis=1)
    return float(np.mean(power <= power.max() * 10 ** (-SILENCE / 10)))
