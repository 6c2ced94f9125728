"""Statistics of N utterances: distributions, padding, groups, characters, outliers."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

import numpy as np
from numpy.typing import NDArray

from sedtrain.data.buckets import Bounds
from sedtrain.data.sampler import DurationBatches

Floats = NDArray[np.float64]
Numbers = NDArray[np.float64] | NDArray[np.int64]

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
NUM_BINS = 14
TAIL = 99  # percentile; values beyond it share the last bin of a histogram
NORMAL_MAD, NORMAL_MEAN_DEVIATION = 1.4826, 1.2533  # sigma of a normal distribution, in units of these deviations


@dataclass(frozen=True)
class Spread:
    """Mean of some values, and their percentiles by number."""

    mean: float
    percentiles: dict[int, float]

    @classmethod
    def of(cls, values: Numbers) -> "Spread":
        numbers = np.percentile(values, PERCENTILES).tolist()
        return cls(float(np.mean(values)), dict(zip(PERCENTILES, numbers, strict=True)))


@dataclass(frozen=True)
class Histogram:
    """Counts between edges; the last bin includes its upper edge, and is wider when it holds far outliers."""

    edges: list[float]
    counts: list[int]

    @classmethod
    def of(cls, values: Numbers) -> "Histogram":
        """Bins between round edges; whole edges for whole numbers."""
        least, most = float(values.min()), float(values.max())
        tail = float(np.percentile(values, TAIL))
        step = round_step((tail - least) / NUM_BINS)
        if np.issubdtype(values.dtype, np.integer):
            step = max(step, 1.0)
        first = floor(least / step)
        last = max(ceil(tail / step), first + 1)
        edges = [round(number * step, 9) for number in range(first, last + 1)]
        if most > edges[-1]:
            edges.append(max(most, round((last + 1) * step, 9)))
        return cls(edges, np.histogram(values, edges)[0].tolist())

    def labels(self) -> list[str]:
        """Edges as text, with the decimals that a bin's width needs."""
        step = self.edges[1] - self.edges[0]
        return [f"{edge:,.{max(0, ceil(-log10(step) - 1e-9))}f}" for edge in self.edges]


def round_step(least: float) -> float:
    """Smallest of 1, 2, 5 times a power of ten that is at least `least`."""
    if least <= 0:
        return 1.0
    power = 10.0 ** floor(log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


@dataclass(frozen=True)
class Batching:
    """Batches of utterances; `padding` is a share of the padded audio, `largest_seconds` includes padding."""

    name: str
    num_batches: int
    mean_utterances: float
    padding: float
    largest_seconds: float

    @classmethod
    def of(cls, name: str, seconds: Floats, batches: Iterable[Sequence[int]]) -> "Batching":
        sizes, longest = zip(*((len(batch), float(seconds[batch].max())) for batch in batches), strict=True)
        padded = np.multiply(sizes, longest)
        padding = 1 - float(seconds.sum() / padded.sum())
        return cls(name, len(sizes), len(seconds) / len(sizes), padding, float(padded.max()))


def batchings(
    seconds: Floats, batch_seconds: float, num_buckets: int, seed: int, *, shuffle: bool, block: int | None
) -> list[Batching]:
    """One epoch batched as in training, then in a single bucket, then into as many random batches.

    block: how many utterances of a stream are batched together; None: all
    """
    block = block or len(seconds)

    def planned(number: int) -> Batching:
        batches: list[list[int]] = []
        bounds = Bounds(batch_seconds, num_buckets=number)
        for start in range(0, len(seconds), block):
            plan = DurationBatches(seconds[start : start + block], bounds, shuffle=shuffle, seed=seed)
            batches += [[start + index for index in batch] for batch in plan]
        return Batching.of(f"{number} bucket{'s' * (number > 1)}", seconds, batches)

    chosen = planned(num_buckets)
    drawn = np.array_split(np.random.default_rng(seed).permutation(len(seconds)), chosen.num_batches)
    single = [] if num_buckets == 1 else [planned(1)]
    return [chosen, *single, Batching.of("as many at random", seconds, [batch.tolist() for batch in drawn])]


@dataclass(frozen=True)
class Group:
    """Utterances of one speaker, language or dataset."""

    name: str
    num_utterances: int
    hours: float


def groups_of(names: Sequence[str | None], seconds: Floats) -> list[Group]:
    """Groups utterances by name, longest total audio first; leaves out those named None."""
    lengths: dict[str | None, list[float]] = {}
    for name, length in zip(names, seconds.tolist(), strict=True):
        lengths.setdefault(name, []).append(length)
    groups = [Group(name, len(each), sum(each) / 3600) for name, each in lengths.items() if name is not None]
    return sorted(groups, key=lambda group: (-group.hours, group.name))


def first_uses(texts: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Counts each character and finds the first text with it; rarest characters first."""
    counts: Counter[str] = Counter()
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        counts.update(text)
        for character in set(text) - first.keys():
            first[character] = index
    rarest = sorted(counts, key=lambda character: (counts[character], character))
    return {character: (counts[character], first[character]) for character in rarest}


def robust_scores(values: Floats, least_sigma: float) -> Floats:
    """(N,) deviations from the median, in robust sigmas of at least `least_sigma`; NaN stays NaN.

    The sigma comes from the median deviation, or from the mean one if more than half of the values are equal
    (Iglewicz and Hoaglin, 1993).
    """
    if np.isnan(values).all():
        return values
    distance = values - np.nanmedian(values)
    sigma = NORMAL_MAD * np.nanmedian(np.abs(distance)) or NORMAL_MEAN_DEVIATION * np.nanmean(np.abs(distance))
    return distance / max(float(sigma), least_sigma)
