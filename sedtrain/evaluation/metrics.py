"""Metrics as counts: whole numbers that add up over utterances, batches and ranks; values equal those of jiwer and sacrebleu.

WER, CER, MER and WIL rewrite both texts by a normalizer; BLEU, chrF and TER take them untouched, as sacrebleu does.

A new metric is a row of METRICS and a file in conf/metrics: how an utterance is counted, and the value of summed counts.
Validation, results, intervals, reports, comparisons and the search take it from there.

Shapes: N utterances, K counts (the words of the reference, at least 1, then the counts of each metric in turn).
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise, starmap, zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein

from sedtrain.errors import UserError, one_line
from sedtrain.text.normalizers import Normalizer, find, normalizer

Counts = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]

TRANSCRIPTION = ("wer", "cer")
TRANSLATION = ("bleu", "chrf")
EDITS = ("substitutions", "deletions", "insertions", "hits")
TEXTS_AT_ONCE = 250  # whose words are in memory together

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metric:
    """One metric.

    title: name in reports
    counted: names of its counts
    count: reference and hypothesis -> as many whole numbers; each is a list of words for a metric of words, else a text
    value: summed counts (..., number of counts) -> fractions (...), not percent
    signature: how sacrebleu describes it; None for a metric of normalized texts, in which single spaces separate words
    """

    title: str
    counted: tuple[str, ...]
    higher_is_better: bool
    count: Callable[[Any, Any], Sequence[int]]
    value: Callable[[Counts], Values]
    signature: Callable[[], str] | None = None
    of_words: bool = False


@dataclass(frozen=True)
class OwnMetric:
    """A user's function of all references and hypotheses, as they are, to a number; nothing of it adds up.

    higher_is_better: None where nobody said
    signature: what it is, for results
    """

    name: str
    function: Callable[[list[str], list[str]], Any]
    signature: str
    higher_is_better: bool | None = None

    def value(self, references: Sequence[str], hypotheses: Sequence[str]) -> float:
        """Its value of a corpus in alphabetical order, however it was shared among ranks. Raises UserError where it fails."""
        pairs = sorted(zip(references, hypotheses, strict=True))
        try:
            return float(self.function([pair[0] for pair in pairs], [pair[1] for pair in pairs]))
        except Exception as error:
            wrong = f"it fails with {type(error).__name__}: {one_line(error, 300)}"
            write = "it takes a list of references and a list of hypotheses, and returns a number"
            raise UserError(f"metrics.{self.name}", self.signature, wrong, write) from error


def count_edits(reference: Sequence[str], hypothesis: Sequence[str]) -> tuple[int, int, int, int]:
    """Substitutions, deletions, insertions and hits of a shortest alignment."""
    edits, longer = Levenshtein.editops(reference, hypothesis), len(reference) - len(hypothesis)
    insertions = max(-longer, 0)
    if len(edits) > abs(longer) + 1:  # else the lengths say all
        insertions = [kind for kind, _, _ in edits.as_list()].count("insert")
    deletions = insertions + longer
    substitutions = len(edits) - insertions - deletions
    return substitutions, deletions, insertions, len(reference) - substitutions - deletions


def error_rate(counts: Counts) -> Values:
    """Errors per unit of the references; the number of insertions where these are empty, as in jiwer."""
    substitutions, deletions, insertions, hits = np.moveaxis(counts, -1, 0)
    rate: Values = (substitutions + deletions + insertions) / np.maximum(substitutions + deletions + hits, 1)
    return rate


def match_error_rate(counts: Counts) -> Values:
    """Errors per pair of the alignment."""
    rate: Values = counts[..., :3].sum(axis=-1) / np.maximum(counts.sum(axis=-1), 1)
    return rate


def information_lost(counts: Counts) -> Values:
    """One less the product of the shares of the references' and of the hypotheses' words that are hits."""
    substitutions, deletions, insertions, hits = np.moveaxis(counts, -1, 0).astype(np.float64)
    words = (substitutions + deletions + hits) * (substitutions + insertions + hits)
    lost: Values = np.where(counts.any(axis=-1), 1 - hits**2 / np.maximum(words, 1), 0.0)
    return lost


def sacrebleu_metric(title: str, counted: tuple[str, ...], higher_is_better: bool = True, **options: str) -> Metric:
    """A metric of sacrebleu, by its title and options there; its methods for statistics that add up have underscores."""

    @cache
    def scorer() -> Any:
        import sacrebleu.metrics

        return getattr(sacrebleu.metrics, title.upper())(**options)

    def count(reference: str, hypothesis: str) -> Sequence[int]:
        statistics: list[int] = scorer()._extract_corpus_statistics([hypothesis], [[reference]])[0]
        return statistics

    def score(counts: Counts) -> float:
        value = float(scorer()._compute_score_from_stats(counts.tolist()).score) / 100
        return min(value, 1.0) if higher_is_better else value

    def value(counts: Counts) -> Values:
        return np.apply_along_axis(score, -1, counts) if counts.size else np.zeros(counts.shape[:-1])

    def signature() -> str:
        scorer().num_refs = 1
        return str(scorer().get_signature())

    return Metric(title, counted, higher_is_better, count, value, signature)


NGRAMS = (f"{what}_{order}" for order in range(1, 7) for what in ("hypothesis", "reference", "matches"))
BLEU = ("hypothesis_words", "reference_words", *(f"{what}_{n}" for what in ("matches", "ngrams") for n in range(1, 5)))
METRICS = {
    "wer": Metric("WER", EDITS, False, count_edits, error_rate, of_words=True),
    "cer": Metric("CER", EDITS, False, count_edits, error_rate),
    "mer": Metric("MER", EDITS, False, count_edits, match_error_rate, of_words=True),
    "wil": Metric("WIL", EDITS, False, count_edits, information_lost, of_words=True),
    "bleu": sacrebleu_metric("BLEU", BLEU),  # orders 1 to 4, exponential smoothing
    "chrf": sacrebleu_metric("chrF", tuple(NGRAMS)),  # character orders 1 to 6, beta 2, no word orders
    "ter": sacrebleu_metric("TER", ("edits", "reference_words"), higher_is_better=False),  # without case, as published
}


def chosen(metrics: Mapping[str, Any], target: str) -> dict[str, bool | None]:
    """Names of the metrics that `metrics` of a configuration gives a target, the one that decides first.

    Beside each, true if higher values are better, None where nobody said.
    """
    return {
        name: METRICS[name].higher_is_better if name in METRICS else node.get("higher_is_better")
        for name, node in metrics.items()
        if node is not None and node.get("target") in (None, target)
    }


def title_of(name: str) -> str:
    return METRICS[name].title if name in METRICS else name


class MetricSet:
    """Several metrics: counts of texts, values of summed counts.

    names:     those that add up
    normalize: rewrites the texts of metrics that are not sacrebleu's; `lowercase` if not given
    tokenize:  sacrebleu's tokenizer for BLEU
    own:       metrics that do not add up, by name
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
        """(N, K) counts, one row for each utterance. Words are what white space separates."""
        few = (slice(first, first + TEXTS_AT_ONCE) for first in range(0, max(len(references), 1), TEXTS_AT_ONCE))
        return np.concatenate([self._count_few(references[each], hypotheses[each]) for each in few])

    def _count_few(self, references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
        """Counts of few utterances: the words of all of them are in memory at once."""
        rewrite = self.normalize.rewrite
        words = [[rewrite(text).split() for text in side] for side in (references, hypotheses)]
        columns = [np.maximum(np.fromiter(map(len, words[0]), np.int64), 1)[:, None]]
        counted: dict[Any, Counts] = {}  # WER, MER and WIL share theirs
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
        """Metrics by name, each (...), of summed counts (..., K); NaN where no utterance was counted."""
        columns = zip(self.metrics.items(), pairwise(self._edges), strict=True)
        counted = counts[..., 0] > 0
        return {
            name: np.where(counted, metric.value(counts[..., first:last]), np.nan)
            for (name, metric), (first, last) in columns
        }

    def own_values(self, references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
        """Metrics that do not add up; NaN, with a warning, where one fails."""
        values = dict.fromkeys(self.own, math.nan)
        for name, metric in self.own.items() if references else ():
            try:
                values[name] = metric.value(references, hypotheses)
            except UserError as error:
                logger.warning("metrics.%s has no value: %s", name, error.wrong)
        return values

    def ranking(self) -> str:
        """The metric that ranks single utterances: BLEU says little of one."""
        return next(name for name in ("wer", "cer", "mer", "wil", "chrf", "ter", "bleu") if name in self.metrics)

    def named(self, counts: Sequence[int], name: str) -> dict[str, int]:
        """Counts of a metric by their names, from those of an utterance (K,)."""
        first = self._edges[list(self.metrics).index(name)]
        counted = self.metrics[name].counted
        return dict(zip(counted, map(int, counts[first : first + len(counted)]), strict=True))

    def signatures(self) -> dict[str, str]:
        """The description of each metric of texts as they are: by sacrebleu, or what the user named."""
        of_sacrebleu = {name: metric.signature() for name, metric in self.metrics.items() if metric.signature}
        return of_sacrebleu | {name: metric.signature for name, metric in self.own.items()}


class CorpusMetrics:
    """Metrics of a corpus in constant memory; `texts` are kept only for metrics that do not add up.

    counts: (K,) sums so far; added over all ranks, they give every rank the same metrics
    """

    def __init__(self, metric_set: MetricSet) -> None:
        self.metric_set = metric_set
        self.reset()

    def reset(self) -> None:
        self.counts: Counts = np.zeros(self.metric_set.num_counts, dtype=np.int64)
        self.texts: list[tuple[str, str]] = []

    def update(self, references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
        """Adds utterances and returns their counts (N, K), which intervals need."""
        rows = self.metric_set.count(references, hypotheses)
        self.counts = self.counts + rows.sum(axis=0)
        self.texts += zip(references, hypotheses, strict=True) if self.metric_set.own else ()
        return rows

    def compute(self) -> dict[str, float]:
        own = self.metric_set.own_values([text[0] for text in self.texts], [text[1] for text in self.texts])
        return {name: float(value) for name, value in self.metric_set.values(self.counts).items()} | own


def word_pairs(reference: str, hypothesis: str, normalize: Normalizer) -> Iterator[tuple[str, str]]:
    """The words in pairs, as the word error rate pairs them; "" for none."""
    words = normalize(reference).split(), normalize(hypothesis).split()
    for edit in Levenshtein.opcodes(*words):
        sides = words[0][edit.src_start : edit.src_end], words[1][edit.dest_start : edit.dest_end]
        yield from zip_longest(*sides, fillvalue="")
