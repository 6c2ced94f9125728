"""Speech activity of a recording, hop by hop: by silero-vad where it is installed, else by energy.

S samples, N hops.
"""

import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from threading import Lock
from typing import Any, Literal

import numpy as np
import soxr
import torch
from numpy.typing import NDArray

from sedtrain.errors import UserError

Pauses = Literal["auto", "energy", "silero"]
Samples = NDArray[np.float32]
Activity = Callable[[Samples, int], NDArray[np.float64]]
"""(S,) samples at a rate -> (N,) activity of each hop: above 0 where somebody speaks, lowest where it is quietest."""

HOPS_PER_SECOND = 31.25  # 512 samples at 16 kHz, the step of silero-vad
SILENT = -80.0  # dB of full scale: no more than the noise of 16 bits
ABOVE_FLOOR = 6.0  # dB by which speech exceeds the background; the levels of steady noise vary by less than 1 dB
FLOOR_PERCENT = 10  # the background is this percentile of the levels around, even if somebody speaks without a pause
FLOOR_SECONDS = 15  # around means this far on each side, since the background may change
SMOOTHED = 3  # hops that a level is averaged over
SILERO_RATE = 16_000
USES_SILERO = Lock()  # the model keeps a state between hops


def samples_per_hop(rate: int) -> int:
    return round(rate / HOPS_PER_SECOND)


def activity_of(pauses: Pauses) -> Activity:
    """The function that finds speech. Raises UserError for `silero` where silero-vad is not installed."""
    installed = find_spec("silero_vad") is not None
    if pauses == "silero" and not installed:
        write = "pip install 'sedtrain[vad]', or write decoding.pauses=energy"
        raise UserError("decoding.pauses", pauses, "silero-vad is not installed", write)
    return by_energy if pauses == "energy" or not installed else by_silero


def by_energy(samples: Samples, rate: int) -> NDArray[np.float64]:
    """Level in dB above silence or above the background, whichever is higher.

    It measures differences between samples, so that a constant offset, rumble and hum count little and most noise is steady.
    """
    hop = samples_per_hop(rate)
    changes = np.diff(samples, append=samples[-1:])
    changes = np.pad(changes, (0, -len(changes) % hop))
    power = np.square(changes.reshape(-1, hop)).mean(1, dtype=np.float64)
    sums = np.convolve(np.pad(power, SMOOTHED // 2, mode="edge"), np.ones(SMOOTHED), "valid")
    levels = 10 * np.log10(sums / SMOOTHED + 1e-12)
    around, step = round(FLOOR_SECONDS * HOPS_PER_SECOND), round(5 * HOPS_PER_SECOND)
    firsts = range(0, len(levels), step)
    near = [levels[max(0, first - around) : first + step + around] for first in firsts]
    floors = np.repeat([np.percentile(each, FLOOR_PERCENT) for each in near], step)[: len(levels)]
    return levels - np.maximum(floors + ABOVE_FLOOR, SILENT)


def by_silero(samples: Samples, rate: int) -> NDArray[np.float64]:
    """Probability of speech by silero-vad, minus one half; the package brings its model."""
    hop, length = samples_per_hop(SILERO_RATE), -(-len(samples) // samples_per_hop(rate))
    if rate != SILERO_RATE:
        samples = soxr.resample(samples, rate, SILERO_RATE)
    samples = np.pad(samples, (0, max(0, length * hop - len(samples))))[: length * hop]
    model = silero()
    with USES_SILERO, torch.inference_mode():
        model.reset_states()
        found = [model(each[None], SILERO_RATE).item() for each in torch.from_numpy(samples).split(hop)]
    return np.array(found) - 0.5


@cache
def silero() -> Any:
    """The model of silero-vad. Its import changes the number of threads of the whole process, which is set back."""
    num_threads = torch.get_num_threads()
    import silero_vad

    torch.set_num_threads(num_threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit
        return silero_vad.load_silero_vad()
