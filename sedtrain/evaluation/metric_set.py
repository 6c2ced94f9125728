"""Several metrics of a corpus: they count its texts, and give the values of summed counts.

Shapes: N utterances, K counts (the words of the reference, at least 1, then the counts of each metric in turn).
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, starmap
from typing import Any

import numpy as np

from sedtrain.errors import UserError, one_line
from sedtrain.evaluation.metrics import BLEU, METRICS, Counts, Values, sacrebleu_metric
from sedtrain.text.normalizers import Normalizer, find, normalizer

TEXTS_AT_ONCE = 250  # texts split into words in memory at once

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OwnMetric:
    """A user's function from all references and hypotheses, not normalized, to a number; it has no counts to add up.

    higher_is_better: None if the user did not say
    signature: description for results
    """

    name: str
    function: Callable[[list[str], list[str]], Any]
    signature: str
    higher_is_better: bool | None = None

    def value(self, references: Sequence[str], hypotheses: Sequence[str]) -> float:
        """Its value for a corpus, sorted so that the split over ranks changes nothing. Raises UserError if it fails."""
        pairs = sorted(zip(references, hypotheses, strict=True))
        try:
            return float(self.function([pair[0] for pair in pairs], [pair[1] for pair in pairs]))
        except Exception as error:
            wrong = f"it fails with {type(error).__name__}: {one_line(error, 300)}"
            write = "it takes a list of references and a list of hypotheses, and returns a number"
            raise UserError(f"metrics.{self.name}", self.signature, wrong, write) from error


class MetricSet:
    """Several metrics that count texts, and metrics of the user's own.

    names:     names in METRICS
    normalize: rewrites texts, except for sacrebleu's metrics; `lowercase` if not given
    tokenize:  sacrebleu's tokenizer for BLEU
    own:       the user's own metrics
    Raises UserError for an unknown metric.
    """

    def __init__(
        self,
        names: Sequence[str],
        normalize: Normalizer | None = None,
        tokenize: str = "13a",
        own: Sequence[OwnMetric] = (),
    ) -> None:
        self.metrics = {name: find(METRICS, name, "metric", "metrics") for name in names}
        if "bleu" in self.metrics:
            self.metrics["bleu"] = sacrebleu_metric("BLEU", BLEU, tokenize=tokenize)
        self.own = {metric.name: metric for metric in own}
        self.normalize = normalizer("lowercase") if normalize is None else normalize
        widths = (len(metric.counted) for metric in self.metrics.values())
        self._edges = np.cumsum([1, *widths]).tolist()
        self.num_counts: int = self._edges[-1]

    def count(self, references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
        """(N, K) counts, one row per utterance. White space separates words."""
        few = (slice(first, first + TEXTS_AT_ONCE) for first in range(0, max(len(references), 1), TEXTS_AT_ONCE))
        return np.concatenate([self._count_few(references[each], hypotheses[each]) for each in few])

    def _count_few(self, references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
        """Counts of few utterances, whose words fit in memory together."""
        rewrite = self.normalize.rewrite
        words = [[rewrite(text).split() for text in side] for side in (references, hypotheses)]
        columns = [np.maximum(np.fromiter(map(len, words[0]), np.int64), 1)[:, None]]
        counted: dict[Any, Counts] = {}  # WER, MER and WIL share their counts
        for metric in self.metrics.values():
            key = metric.count, metric.of_words
            if key not in counted:
                texts: Any = (references, hypotheses) if metric.signature else words
                if not metric.signature and not metric.of_words:
                    texts = [map(" ".join, side) for side in words]
                numbers = chain.from_iterable(starmap(metric.count, zip(*texts, strict=True)))
                counted[key] = np.fromiter(numbers, np.int64).reshape(len(words[0]), len(metric.counted))
            columns.append(counted[key])
        return np.concatenate(columns, axis=1)

    def values(self, counts: Counts) -> dict[str, Values]:
        """Summed counts (..., K) -> values (...) by name; NaN where no utterance was counted."""
        columns = zip(self.metrics.items(), pairwise(self._edges), strict=True)
        counted = counts[..., 0] > 0
        return {
            name: np.where(counted, metric.value(counts[..., first:last]), np.nan)
            for (name, metric), (first, last) in columns
        }

    def own_values(self, references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
        """Values of the user's own metrics; NaN and a warning for one that fails."""
        values = dict.fromkeys(self.own, math.nan)
        for name, metric in self.own.items() if references else ():
            try:
                values[name] = metric.value(references, hypotheses)
            except UserError as error:
                logger.warning("metrics.%s has no value: %s", name, error.wrong)
        return values

    def ranking(self) -> str:
        """The metric that ranks single utterances: the first of METRICS, but BLEU, which says little about one, comes last."""
        return min((name for name in METRICS if name in self.metrics), key=lambda name: name == "bleu")

    def named(self, counts: Sequence[int], name: str) -> dict[str, int]:
        """Counts of one metric by their names, from the counts (K,) of an utterance."""
        first = self._edges[list(self.metrics).index(name)]
        counted = self.metrics[name].counted
        return dict(zip(counted, map(int, counts[first : first + len(counted)]), strict=True))

    def signatures(self) -> dict[str, str]:
        """Descriptions of the metrics that do not normalize: sacrebleu's, and the user's own."""
        of_sacrebleu = {name: metric.signature() for name, metric in self.metrics.items() if metric.signature}
        return of_sacrebleu | {name: metric.signature for name, metric in self.own.items()}


class CorpusMetrics:
    """Metrics of a corpus in constant memory; texts are kept only for the user's own metrics.

    counts: (K,) sums so far; the sum over all ranks gives every rank the same metrics
    """

    def __init__(self, metric_set: MetricSet) -> None:
        self.metric_set = metric_set
        self.reset()

    def reset(self) -> None:
        self.counts: Counts = np.zeros(self.metric_set.num_counts, dtype=np.int64)
        self.texts: list[tuple[str, str]] = []

    def update(self, references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
        """Adds utterances and returns their counts (N, K), from which intervals are computed."""
        rows = self.metric_set.count(references, hypotheses)
        self.counts = self.counts + rows.sum(axis=0)
        self.texts += zip(references, hypotheses, strict=True) if self.metric_set.own else ()
        return rows

    def compute(self) -> dict[str, float]:
        own = self.metric_set.own_values([text[0] for text in self.texts], [text[1] for text in self.texts])
        return {name: float(value) for name, value in self.metric_set.values(self.counts).items()} | own
