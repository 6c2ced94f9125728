"""Bootstrap confidence intervals and a paired test, from counts per utterance.

Utterances are drawn with replacement (Bisani and Ney, 2004, "Bootstrap estimates for confidence intervals in
ASR performance evaluation"), as if they were independent. Where few speakers say many utterances each, sum the
rows of each speaker first, and hand in one row per speaker.
"""

from dataclasses import dataclass

import numpy as np

from sedtrain.evaluation.metrics import Counts, MetricSet

PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True)
class Interval:
    """A metric of a corpus and its 95 % interval, which has no width in a corpus without errors."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """Metric of the second run minus that of the first, its 95 % interval, and how often chance does as much."""

    difference: float
    low: float
    high: float
    p_value: float


def bootstrap_intervals(
    metric_set: MetricSet, counts: Counts, *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """95 % percentile intervals of every metric, from counts (N, K) of `MetricSet.count`."""
    values = metric_set.values(counts.sum(axis=0))
    resampled = metric_set.values(resampled_sums(counts, num_resamples, seed))
    return {name: Interval(float(values[name]), *bounds(resampled[name])) for name in values}


def paired_test(
    metric_set: MetricSet, first: Counts, second: Counts, *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, PairedDifference]:
    """Two-sided paired bootstrap test of two runs over the same utterances in the same order.

    `first` and `second` are (N, K). The differences of the resamples, centred on the observed one, show what
    chance does (Koehn, 2004, and Riezler and Maxwell, 2005; as sacrebleu's `--paired-bs`).
    """
    if first.shape != second.shape:
        raise ValueError(f"paired runs score the same utterances: {first.shape} against {second.shape} counts")
    both = np.stack([first.sum(axis=0), second.sum(axis=0)])
    # One seed: both runs see the same draws.
    drawn = np.stack([resampled_sums(counts, num_resamples, seed) for counts in (first, second)])
    observed, resampled = metric_set.values(both), metric_set.values(drawn)
    return {name: difference_of(np.diff(observed[name])[0], np.diff(resampled[name], axis=0)[0]) for name in observed}


def difference_of(observed: np.float64, resampled: np.ndarray) -> PairedDifference:
    as_extreme = np.abs(resampled - observed) >= abs(observed)
    p_value = (1 + as_extreme.sum()) / (1 + len(resampled))
    return PairedDifference(float(observed), *bounds(resampled), p_value=float(p_value))


def bounds(resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(resampled, PERCENTILES)
    return float(low), float(high)


def resampled_sums(counts: Counts, num_resamples: int, seed: int) -> Counts:
    """(num_resamples, K) sums of N rows drawn with replacement; all zero where there are no rows."""
    generator = np.random.default_rng(seed)
    num_utterances = max(len(counts), 1)
    rows = np.zeros((num_utterances, counts.shape[1]))
    rows[: len(counts)] = counts  # float64 multiplies faster, and is exact up to 2**53
    sums = np.empty((num_resamples, counts.shape[1]))
    for resample in sums:
        drawn = generator.integers(num_utterances, size=num_utterances)
        resample[:] = np.bincount(drawn, minlength=num_utterances) @ rows
    return sums.astype(np.int64)
