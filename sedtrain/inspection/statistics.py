"""Numbers about utterances, from their lengths and texts alone. N utterances."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

import numpy as np
from numpy.typing import NDArray

from sedtrain.data.batching import DurationBatches

Floats = NDArray[np.float64]
Numbers = NDArray[np.float64] | NDArray[np.int64]

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
NUM_BINS = 14
TAIL = 99  # the percentile behind which a histogram has one bin alone, however far it reaches
NORMAL_MAD, NORMAL_MEAN_DEVIATION = 1.4826, 1.2533  # times these, deviations of a normal distribution are its sigma


@dataclass(frozen=True)
class Spread:
    """How values are distributed: their mean, and percentiles by number."""

    mean: float
    percentiles: dict[int, float]

    @classmethod
    def of(cls, values: Numbers) -> "Spread":
        numbers = np.percentile(values, PERCENTILES).tolist()
        return cls(float(np.mean(values)), dict(zip(PERCENTILES, numbers, strict=True)))


@dataclass(frozen=True)
class Histogram:
    """Counts between edges; the last bin holds its upper edge too, and may be wider, for the few values far off."""

    edges: list[float]
    counts: list[int]

    @classmethod
    def of(cls, values: Numbers) -> "Histogram":
        """Edges at round numbers, whole ones for whole values."""
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
        """The lower edge of each bin and the upper one of the last."""
        step = self.edges[1] - self.edges[0]
        return [f"{edge:,.{max(0, ceil(-log10(step) - 1e-9))}f}" for edge in self.edges]


def round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `least`."""
    if least <= 0:
        return 1.0
    power = 10.0 ** floor(log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


@dataclass(frozen=True)
class Batching:
    """What batches of utterances cost.

    padding:         share of the padded audio that is none
    largest_seconds: padded audio of the largest batch, which has to fit in memory
    """

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
    """The batches of an epoch as training cuts them, beside those of one bucket, and as many drawn at random.

    block: of a stream, how many utterances are batched together; None: all
    """

    def planned(number: int) -> Batching:
        batches: list[list[int]] = []
        for start in range(0, len(seconds), block or len(seconds)):
            here = seconds[start : start + (block or len(seconds))]
            plan = DurationBatches(here, batch_seconds, shuffle=shuffle, seed=seed, num_buckets=number)
            batches += [[start + index for index in batch] for batch in plan]
        return Batching.of(f"{number} bucket{'s' * (number > 1)}", seconds, batches)

    chosen = planned(num_buckets)
    drawn = np.array_split(np.random.default_rng(seed).permutation(len(seconds)), chosen.num_batches)
    single = [] if num_buckets == 1 else [planned(1)]
    return [chosen, *single, Batching.of("as many at random", seconds, [batch.tolist() for batch in drawn])]


@dataclass(frozen=True)
class Group:
    """The utterances of one speaker, language or dataset."""

    name: str
    num_utterances: int
    hours: float


def groups_of(names: Sequence[str | None], seconds: Floats) -> list[Group]:
    """Those with most audio first; utterances of no name are in none."""
    counts = Counter(names)
    totals: dict[str | None, float] = dict.fromkeys(counts, 0.0)
    for name, length in zip(names, seconds.tolist(), strict=True):
        totals[name] += length
    groups = [Group(name, counts[name], totals[name] / 3600) for name in counts if name is not None]
    return sorted(groups, key=lambda group: (-group.hours, group.name))


def first_uses(texts: Sequence[str]) -> dict[str, tuple[int, int]]:
    """For every character, how often it is there and the number of the first text that has it; the rarest first."""
    counts: Counter[str] = Counter()
    first: dict[str, int] = {}
    for number, text in enumerate(texts):
        counts.update(text)
        for character in set(text) - first.keys():
            first[character] = number
    rarest = sorted(counts, key=lambda character: (counts[character], character))
    return {character: (counts[character], first[character]) for character in rarest}


def num_repeated(values: Sequence[Hashable]) -> int:
    """How many are there more than once, each time counted."""
    return sum(count for count in Counter(values).values() if count > 1)


def robust_scores(values: Floats, least_sigma: float) -> Floats:
    """(N,) how many standard deviations each is from the median, where the deviation is judged by the median one.

    NaN where a value is NaN. Where more than half are alike the mean deviation stands in (Iglewicz and Hoaglin, 1993).
    least_sigma: a smaller deviation counts as this one
    """
    if np.isnan(values).all():
        return values
    distance = values - np.nanmedian(values)
    sigma = NORMAL_MAD * np.nanmedian(np.abs(distance)) or NORMAL_MEAN_DEVIATION * np.nanmean(np.abs(distance))
    return distance / max(float(sigma), least_sigma)
