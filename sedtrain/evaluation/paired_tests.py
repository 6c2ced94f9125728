"""Paired tests of two runs over the same utterances: a t-test, and random swaps.

Shapes: N utterances, K counts; units as in `intervals`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import numpy.typing as npt

from sedtrain.evaluation.intervals import Speakers, chance, degrees_of_freedom, quantile, standard_error, sums_of_units
from sedtrain.evaluation.metric_set import MetricSet
from sedtrain.evaluation.metrics import Counts

LEVEL = 0.05
NUM_SWAPS, CHUNK = 5000, 2_000_000  # random swaps of a test; units times swaps in memory at once


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
