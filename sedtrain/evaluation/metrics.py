"""WER, CER, BLEU and chrF as counts: whole numbers that add up over utterances, batches and ranks.

WER and CER rewrite both texts by a normalizer; BLEU and chrF take them untouched, as sacrebleu does.

A new metric is a row of METRICS and its name in TRANSCRIPTION or TRANSLATION: how an utterance is counted, and the
value of summed counts. Validation, results, intervals, reports and the search take it from there. The first name of
the two decides which validation is the best; the report ranks utterances by WER, or else by chrF.

Shapes: N utterances, K counts (the words of the reference, at least 1, then the counts of each metric in turn).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein

from sedtrain.text.normalizers import Normalizer, collapse_whitespace, find, normalizer

Counts = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]

TRANSCRIPTION = ("wer", "cer")
TRANSLATION = ("bleu", "chrf")


@dataclass(frozen=True)
class Metric:
    """One metric.

    title: name in reports
    count: reference and hypothesis -> `num_counts` whole numbers
    value: summed counts (..., num_counts) -> fractions (...), not percent
    signature: how sacrebleu describes it; None for a metric of normalized texts, in which single spaces separate words
    """

    title: str
    num_counts: int
    higher_is_better: bool
    count: Callable[[str, str], Sequence[int]]
    value: Callable[[Counts], Values]
    signature: Callable[[], str] | None = None


def count_edits(reference: Sequence[str], hypothesis: Sequence[str]) -> tuple[int, int, int, int]:
    """Substitutions, deletions, insertions and hits of a shortest alignment."""
    kinds = [kind for kind, _, _ in Levenshtein.editops(reference, hypothesis).as_list()]
    substitutions, deletions, insertions = map(kinds.count, ("replace", "delete", "insert"))
    return substitutions, deletions, insertions, len(reference) - substitutions - deletions


def error_rate(counts: Counts) -> Values:
    """Errors per unit of the references; the number of insertions where these are empty, as in jiwer."""
    substitutions, deletions, insertions, hits = np.moveaxis(counts, -1, 0)
    rate: Values = (substitutions + deletions + insertions) / np.maximum(substitutions + deletions + hits, 1)
    return rate


def overlap_metric(title: str, num_counts: int, **options: str) -> Metric:
    """A metric of sacrebleu, by its title and options there; its methods for statistics that add up have underscores."""

    @cache
    def scorer() -> Any:
        import sacrebleu.metrics

        return getattr(sacrebleu.metrics, title.upper())(**options)

    def count(reference: str, hypothesis: str) -> Sequence[int]:
        statistics: list[int] = scorer()._extract_corpus_statistics([hypothesis], [[reference]])[0]
        return statistics

    def score(counts: Counts) -> float:
        return float(min(scorer()._compute_score_from_stats(counts.tolist()).score / 100, 1.0))

    def value(counts: Counts) -> Values:
        return np.apply_along_axis(score, -1, counts) if counts.size else np.zeros(counts.shape[:-1])

    def signature() -> str:
        scorer().num_refs = 1
        return str(scorer().get_signature())

    return Metric(title, num_counts, higher_is_better=True, count=count, value=value, signature=signature)


METRICS = {
    "wer": Metric("WER", 4, False, lambda reference, text: count_edits(reference.split(), text.split()), error_rate),
    "cer": Metric("CER", 4, False, count_edits, error_rate),
    "bleu": overlap_metric("BLEU", num_counts=10),  # orders 1 to 4, exponential smoothing
    "chrf": overlap_metric("chrF", num_counts=18),  # character orders 1 to 6, beta 2, no word orders
}


class MetricSet:
    """Several metrics: counts of texts, values of summed counts.

    normalize: rewrites the texts of WER and CER; `lowercase` if not given
    tokenize:  sacrebleu's tokenizer for BLEU
    Raises UserError for an unknown metric.
    """

    def __init__(self, names: Sequence[str], normalize: Normalizer | None = None, tokenize: str = "13a") -> None:
        self.metrics = {name: find(METRICS, name, "metric", "metrics") for name in names}
        if "bleu" in self.metrics:
            self.metrics["bleu"] = overlap_metric("BLEU", METRICS["bleu"].num_counts, tokenize=tokenize)
        self.normalize = normalizer("lowercase") if normalize is None else normalize
        widths = (metric.num_counts for metric in self.metrics.values())
        self._edges = np.cumsum([1, *widths]).tolist()
        self.num_counts: int = self._edges[-1]

    def count(self, references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
        """(N, K) counts, one row for each utterance. Words are what white space separates."""
        rows = []
        for texts in zip(references, hypotheses, strict=True):
            normalized = [collapse_whitespace(self.normalize(text)) for text in texts]
            counts = [metric.count(*(texts if metric.signature else normalized)) for metric in self.metrics.values()]
            num_words = max(len(normalized[0].split()), 1)
            rows.append([num_words, *(number for of_metric in counts for number in of_metric)])
        return np.array(rows, dtype=np.int64).reshape(len(rows), self.num_counts)

    def values(self, counts: Counts) -> dict[str, Values]:
        """Metrics by name, each (...), of summed counts (..., K); NaN where no utterance was counted."""
        columns = zip(self.metrics.items(), pairwise(self._edges), strict=True)
        counted = counts[..., 0] > 0
        return {
            name: np.where(counted, metric.value(counts[..., first:last]), np.nan)
            for (name, metric), (first, last) in columns
        }

    def signatures(self) -> dict[str, str]:
        """The description by sacrebleu of each metric that is one of its own."""
        return {name: metric.signature() for name, metric in self.metrics.items() if metric.signature}


class CorpusMetrics:
    """Metrics of a corpus in constant memory: K whole numbers, whatever its size."""

    def __init__(self, metric_set: MetricSet) -> None:
        self.metric_set = metric_set
        self.reset()

    def reset(self) -> None:
        self._counts: Counts = np.zeros(self.metric_set.num_counts, dtype=np.int64)

    def update(self, references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
        """Adds utterances and returns their counts (N, K), which intervals need."""
        rows = self.metric_set.count(references, hypotheses)
        self._counts += rows.sum(axis=0)
        return rows

    def counts(self) -> Counts:
        """(K,) sums so far. Added over ranks and handed to `set_counts`, they give all ranks the same metrics."""
        return self._counts.copy()

    def set_counts(self, counts: npt.ArrayLike) -> None:
        """Replaces the sums by an array or a CPU tensor (K,)."""
        self._counts = np.asarray(counts).astype(np.int64).reshape(self.metric_set.num_counts)

    def compute(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.metric_set.values(self._counts).items()}
