"""WER, CER, BLEU and chrF as counts: whole numbers that add up over utterances, batches and ranks.

Shapes: N utterances, K counts (the first is the number of utterances, then those of each metric in turn).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import jiwer
import numpy as np
import numpy.typing as npt
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from sedtrain.text.normalizers import Normalizer, collapse_whitespace, normalizer, pick

Counts = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]

TRANSCRIPTION = ("wer", "cer")
TRANSLATION = ("bleu", "chrf")


@dataclass(frozen=True)
class Metric:
    """How one metric counts an utterance, and what sums of its counts are worth (a fraction, not percent)."""

    num_counts: int
    higher_is_better: bool
    count: Callable[[str, str], Sequence[int]]  # (reference, hypothesis) -> num_counts integers
    value: Callable[[Counts], Values]  # (..., num_counts) -> (...)


def _count_words(reference: str, hypothesis: str) -> Sequence[int]:
    edits = jiwer.process_words(reference, hypothesis)
    return edits.substitutions, edits.deletions, edits.insertions, edits.hits


def _count_characters(reference: str, hypothesis: str) -> Sequence[int]:
    edits = jiwer.process_characters(reference, hypothesis)
    return edits.substitutions, edits.deletions, edits.insertions, edits.hits


def _error_rate(counts: Counts) -> Values:
    """Errors per reference unit; where the reference is empty, the number of insertions, as jiwer has it."""
    substitutions, deletions, insertions, hits = np.moveaxis(counts, -1, 0)
    rate: Values = (substitutions + deletions + insertions) / np.maximum(substitutions + deletions + hits, 1)
    return rate


def _error_metric(count: Callable[[str, str], Sequence[int]]) -> Metric:
    return Metric(num_counts=4, higher_is_better=False, count=count, value=_error_rate)


def _overlap_metric(scorer: BLEU | CHRF, num_counts: int) -> Metric:
    """A metric of sacrebleu, which keeps the statistics that add up behind underscores."""

    def count(reference: str, hypothesis: str) -> Sequence[int]:
        statistics: list[int] = scorer._extract_corpus_statistics([hypothesis], [[reference]])[0]
        return statistics

    def score(counts: Counts) -> float:
        return min(scorer._compute_score_from_stats(counts.tolist()).score / 100, 1.0)

    def value(counts: Counts) -> Values:
        return np.apply_along_axis(score, -1, counts)

    return Metric(num_counts=num_counts, higher_is_better=True, count=count, value=value)


METRICS = {
    "wer": _error_metric(_count_words),
    "cer": _error_metric(_count_characters),
    "bleu": _overlap_metric(BLEU(), num_counts=10),  # 13a words, orders 1 to 4, exponential smoothing
    "chrf": _overlap_metric(CHRF(), num_counts=18),  # character orders 1 to 6, beta 2, no word orders
}


class MetricSet:
    """Several metrics under one normalizer: texts to counts, sums of counts to values."""

    def __init__(self, names: Sequence[str], normalize: Normalizer | None = None) -> None:
        """`normalize` is the `lowercase` normalizer if not given; a UserError names an unknown metric."""
        self.metrics = {name: pick(METRICS, name, "metric") for name in names}
        self.normalize = normalizer("lowercase") if normalize is None else normalize
        widths = (metric.num_counts for metric in self.metrics.values())
        self._edges = np.cumsum([1, *widths]).tolist()
        self.num_counts: int = self._edges[-1]

    def count(self, references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
        """(N, K) counts, one row for each utterance. Words are what whitespace separates."""
        pairs = zip(references, hypotheses, strict=True)
        rows = [self._count_utterance(reference, hypothesis) for reference, hypothesis in pairs]
        return np.array(rows, dtype=np.int64).reshape(len(rows), self.num_counts)

    def _count_utterance(self, reference: str, hypothesis: str) -> list[int]:
        reference, hypothesis = (collapse_whitespace(self.normalize(text)) for text in (reference, hypothesis))
        counts = [1]
        for metric in self.metrics.values():
            counts.extend(metric.count(reference, hypothesis))
        return counts

    def values(self, counts: Counts) -> dict[str, Values]:
        """Metric by name, each (...), of summed counts (..., K); NaN where no utterance was counted."""
        columns = zip(self.metrics.items(), pairwise(self._edges), strict=True)
        counted = counts[..., 0] > 0
        return {
            name: np.where(counted, metric.value(counts[..., first:last]), np.nan)
            for (name, metric), (first, last) in columns
        }


class CorpusMetrics:
    """The metrics of a corpus in constant memory: K whole numbers, whatever its size."""

    def __init__(self, metric_set: MetricSet) -> None:
        self.metric_set = metric_set
        self.reset()

    def reset(self) -> None:
        self._counts: Counts = np.zeros(self.metric_set.num_counts, dtype=np.int64)

    def update(self, references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
        """Add utterances; returns their own counts (N, K), to be kept by who wants intervals."""
        rows = self.metric_set.count(references, hypotheses)
        self._counts += rows.sum(axis=0)
        return rows

    def counts(self) -> Counts:
        """(K,) sums so far. Add them over ranks and hand the sums to `set_counts`: then all ranks agree."""
        return self._counts.copy()

    def set_counts(self, counts: npt.ArrayLike) -> None:
        """Take over sums, as an array or a CPU tensor (K,)."""
        self._counts = np.asarray(counts).astype(np.int64).reshape(self.metric_set.num_counts)

    def compute(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.metric_set.values(self._counts).items()}
