"""95 % confidence intervals, from counts per utterance, and paired tests of two runs: a t-test, and random swaps.

Utterances of one speaker resemble each other, so known speakers are resampled, not utterances (arXiv 1912.09508). Each speaker
is left out once (the cluster jackknife). The standard error is multiplied by a quantile of Student's t, since few speakers say
little about their own spread. Percentiles of a bootstrap cover less than 95 %: 81 % with four speakers, 88 % with rare errors;
`tests/evaluation/test_statistics.py` simulates the coverage.

Shapes: N utterances, K counts, G units: the speakers, or the utterances if no speaker is known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import atan, exp, inf, isnan, nan, pi, sqrt, tan
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sedtrain.evaluation.metric_set import MetricSet
from sedtrain.evaluation.metrics import Counts

Speakers = Sequence[str | None]
"""The speaker of each utterance, None where unknown; empty if the data have no speakers."""

FEW_SPEAKERS = 10
LEVEL = 0.05
NUM_SWAPS, CHUNK = 5000, 2_000_000  # random swaps of a test; units times swaps in memory at once


@dataclass(frozen=True)
class Interval:
    """A metric of a corpus and its 95 % interval, whose ends are NaN for a single unit."""

    value: float
    low: float
    high: float

    @property
    def ends(self) -> str:
        """Both ends in percent."""
        return "unknown" if isnan(self.low + self.high) else f"{100 * self.low:.2f} to {100 * self.high:.2f} %"


class Units(NamedTuple):
    """Units of the intervals: `speaker`, or `utterance` if there are not two speakers.

    num_speakers:        None if no speaker is known
    num_without_speaker: utterances of unknown speakers, if others are known; each is a unit of its own
    """

    resampled: str
    num_speakers: int | None
    num_without_speaker: int

    @classmethod
    def of(cls, speakers: Speakers) -> "Units":
        known = {*speakers} - {None}
        unknown = sum(speaker is None for speaker in speakers) if known else 0
        return cls("speaker" if len(known) + unknown > 1 and known else "utterance", len(known) or None, unknown)

    def __str__(self) -> str:
        if self.num_speakers is None:
            return "by utterance"
        number = f"{self.num_speakers:,} speaker{'s' if self.num_speakers > 1 else ''}"
        few = "only " if self.num_speakers < FEW_SPEAKERS else ""
        unknown = f", {self.num_without_speaker:,} utterances of unknown speakers" if self.num_without_speaker else ""
        return f"by {self.resampled} ({few}{number}{unknown})"


def confidence_intervals(metric_set: MetricSet, counts: Counts, speakers: Speakers = ()) -> dict[str, Interval]:
    """95 % intervals of every metric, from counts (N, K) of `MetricSet.count`."""
    sums = sums_of_units(counts, speakers)
    total = sums.sum(axis=0)
    values, without_one = metric_set.values(total), metric_set.values(total - sums)
    freedom = degrees_of_freedom(sums)
    least = least_width(freedom, int(total[0]))
    intervals = {}
    for name, metric in metric_set.metrics.items():
        value, width = float(values[name]), quantile(freedom) * standard_error(without_one[name])
        low, high = bounds(1 - value if metric.higher_is_better else value, width, least)
        intervals[name] = Interval(value, *((max(1 - high, 0.0), 1 - low) if metric.higher_is_better else (low, high)))
    return intervals


def sums_of_units(counts: Counts, speakers: Speakers) -> Counts:
    """(G, K) sums over the utterances of each unit; the same name is the same speaker in all datasets of a mix."""
    if Units.of(speakers).resampled == "utterance":
        return counts
    names = [number if speaker is None else speaker for number, speaker in enumerate(speakers)]
    numbers: dict[str | int, int] = {}
    units = [numbers.setdefault(name, len(numbers)) for name in names]
    sums = np.zeros((len(numbers), counts.shape[1]), dtype=counts.dtype)
    np.add.at(sums, units, counts)
    return sums


def standard_error(without_one: npt.NDArray[np.float64]) -> float:
    """Standard error of a metric, from its values (G,), each without one unit; NaN for a single unit."""
    return sqrt(len(without_one) - 1) * float(np.std(without_one)) if len(without_one) > 1 else nan


def degrees_of_freedom(sums: Counts) -> int:
    """The effective number of units minus one, which is small if a few speakers say most of the words."""
    sizes = sums[:, 0].astype(np.float64)
    return max(round(float(sizes.sum() ** 2 / max((sizes**2).sum(), 1.0))) - 1, 1)


def least_width(freedom: int, num_words: int) -> float:
    """The error rate at which `num_words` words would show no error once in 40 times.

    For many units it is 3.7 / `num_words` (the rule of three at 97.5 %). It is higher for few, as their error rates may differ:
    these are taken to be exponentially distributed.
    """
    units = freedom + 1
    return float((40 ** (1 / units) - 1) * units / max(num_words, 1))


def bounds(wrong: float, width: float, least: float) -> tuple[float, float]:
    """Ends of the interval of an error rate: symmetric on a logarithmic scale, which covers rare errors.

    Above 1 the linear scale bounds it: with few speakers, the logarithmic one would reach millions.
    """
    if isnan(width):
        return nan, nan
    factor = exp(min(width / wrong, 700.0)) if wrong > 0 else 1.0
    high = min(wrong * factor, max(1.0, wrong + width))
    return max(min(wrong / factor, wrong - least), 0.0), max(high, wrong + least)


@lru_cache(maxsize=64)
def student(freedom: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Angles whose tangent is |t| / sqrt(freedom), and the probabilities of a smaller |t|."""
    angles = np.linspace(0, pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    cumulative = np.append(0.0, np.cumsum(density[1:] + density[:-1]))
    return angles, cumulative / cumulative[-1]


def quantile(freedom: int) -> float:
    """The |t| that chance exceeds once in 20 times."""
    freedom = min(freedom, 10_000)  # more change nothing
    angles, probabilities = student(freedom)
    return sqrt(freedom) * tan(float(np.interp(0.95, probabilities, angles)))


def chance(t: float, freedom: int) -> float:
    """The probability of a larger |t|."""
    freedom = min(freedom, 10_000)
    angles, probabilities = student(freedom)
    return 1 - float(np.interp(atan(t / sqrt(freedom)), angles, probabilities))


@dataclass(frozen=True)
class PairedDifference:
    """Metric of the second run minus that of the first, its 95 % interval, and the probability of such a gap by chance."""

    difference: float
    low: float
    high: float
    p_value: float


def paired_test(
    metric_set: MetricSet, first: Counts, second: Counts, speakers: Speakers = ()
) -> dict[str, PairedDifference]:
    """Two-sided t-test of counts (N, K) of two runs over the same utterances in the same order, with the intervals' units."""
    if first.shape != second.shape:
        raise ValueError(f"paired runs score the same utterances: {first.shape} against {second.shape} counts")
    sums = np.stack([sums_of_units(counts, speakers) for counts in (first, second)])
    total = sums.sum(axis=1, keepdims=True)
    values, without_one = metric_set.values(total[:, 0]), metric_set.values(total - sums)
    freedom = degrees_of_freedom(sums[0])
    tests = {}
    for name in values:
        difference, error = float(np.diff(values[name])[0]), standard_error(np.diff(without_one[name], axis=0)[0])
        width = quantile(freedom) * error
        p_value = chance(abs(difference) / error if error else inf, freedom) if difference else 1.0
        tests[name] = PairedDifference(difference, difference - width, difference + width, p_value)
    return tests


def chances_of_swaps(
    metric_set: MetricSet, first: Counts, second: Counts, speakers: Sequence[str | None]
) -> dict[str, float]:
    """Approximate randomisation: how often two runs differ as much as these do once units are swapped between them at random.

    The units are those of the intervals; no metric has a value if they are too few (Noreen 1989; Riezler and Maxwell 2005).
    """
    sums = [sums_of_units(counts, speakers) for counts in (first, second)]
    if smallest_chance(len(sums[0])) >= LEVEL:
        return {}
    totals, change = [each.sum(axis=0) for each in sums], sums[1] - sums[0]
    change = change[change.any(axis=1)]  # swapping equal counts changes nothing
    observed = {name: abs(float(values)) for name, values in differences(metric_set, *totals).items()}
    generator, num_larger, num_drawn = np.random.default_rng(0), dict.fromkeys(observed, 0), 0
    while num_drawn < NUM_SWAPS:
        number = min(max(CHUNK // max(len(change), 1), 1), NUM_SWAPS - num_drawn)
        swaps = generator.integers(0, 2, (number, len(change)), dtype=np.int8)
        moved = np.rint(swaps.astype(np.float32) @ change.astype(np.float32)).astype(np.int64)
        num_drawn += number
        for name, values in differences(metric_set, totals[0] + moved, totals[1] - moved).items():
            num_larger[name] += int((np.abs(values) >= observed[name] - 1e-12).sum())
    return {name: (number + 1) / (NUM_SWAPS + 1) for name, number in num_larger.items()}


def differences(metric_set: MetricSet, first: Counts, second: Counts) -> dict[str, npt.NDArray[np.float64]]:
    values = metric_set.values(first), metric_set.values(second)
    return {name: values[1][name] - values[0][name] for name in metric_set.metrics}


def smallest_chance(num_units: int) -> float:
    """The smallest p-value that swaps of this many units can give: only all or none swapped differ as much."""
    return 2.0 ** (1 - num_units)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for the number of tests, so that all together err no more often than one would (Holm 1979)."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
