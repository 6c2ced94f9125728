"""Metrics with the values of jiwer and sacrebleu, from counts that add up over utterances, batches and ranks.

WER, CER, MER and WIL compare normalized texts; BLEU, chrF and TER compare texts as they are, as sacrebleu does.

A new metric is a row of METRICS, which counts an utterance and gives the value of summed counts, and a file in conf/metrics.
Validation, results, intervals, reports, comparisons and the search take it from there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein

from sedtrain.text.normalizers import Normalizer

Counts = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]

TRANSCRIPTION = ("wer", "cer")
EDITS = ("substitutions", "deletions", "insertions", "hits")


@dataclass(frozen=True)
class Metric:
    """One metric.

    title: name in reports
    counted: names of its counts
    count: reference and hypothesis -> one whole number for each name in `counted`
    value: summed counts (..., number of counts) -> fractions (...), not percent
    signature: sacrebleu's description of the metric; None for a metric of normalized texts
    of_words: `count` takes lists of words; else texts, where single spaces separate the words of normalized ones
    """

    title: str
    counted: tuple[str, ...]
    higher_is_better: bool
    count: Callable[[Any, Any], Sequence[int]]
    value: Callable[[Counts], Values]
    signature: Callable[[], str] | None = None
    of_words: bool = False


def count_edits(reference: Sequence[str], hypothesis: Sequence[str]) -> tuple[int, int, int, int]:
    """Substitutions, deletions, insertions and hits of a shortest alignment."""
    edits, longer = Levenshtein.editops(reference, hypothesis), len(reference) - len(hypothesis)
    insertions = max(-longer, 0)
    if len(edits) > abs(longer) + 1:  # else the lengths determine the kinds
        insertions = [kind for kind, _, _ in edits.as_list()].count("insert")
    deletions = insertions + longer
    substitutions = len(edits) - insertions - deletions
    return substitutions, deletions, insertions, len(reference) - substitutions - deletions


def error_rate(counts: Counts) -> Values:
    """Errors per word or character of the references; if these are empty, the number of insertions, as in jiwer."""
    substitutions, deletions, insertions, hits = np.moveaxis(counts, -1, 0)
    rate: Values = (substitutions + deletions + insertions) / np.maximum(substitutions + deletions + hits, 1)
    return rate


def match_error_rate(counts: Counts) -> Values:
    """Errors per aligned pair."""
    rate: Values = counts[..., :3].sum(axis=-1) / np.maximum(counts.sum(axis=-1), 1)
    return rate


def information_lost(counts: Counts) -> Values:
    """1 - (hits / words of the references) · (hits / words of the hypotheses)."""
    substitutions, deletions, insertions, hits = np.moveaxis(counts, -1, 0).astype(np.float64)
    words = (substitutions + deletions + hits) * (substitutions + insertions + hits)
    lost: Values = np.where(counts.any(axis=-1), 1 - hits**2 / np.maximum(words, 1), 0.0)
    return lost


def sacrebleu_metric(title: str, counted: tuple[str, ...], higher_is_better: bool = True, **options: str) -> Metric:
    """A metric of sacrebleu, by its title and options there. Only its private methods give statistics that add up."""

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
    """The metrics of a configuration for a target, the deciding one first: by name, whether higher is better.

    None where the configuration does not say.
    """
    return {
        name: METRICS[name].higher_is_better if name in METRICS else node.get("higher_is_better")
        for name, node in metrics.items()
        if node is not None and node.get("target") in (None, target)
    }


def title_of(name: str) -> str:
    return METRICS[name].title if name in METRICS else name


def word_pairs(reference: str, hypothesis: str, normalize: Normalizer) -> Iterator[tuple[str, str]]:
    """Words of both texts in the pairs of the word error rate; "" stands for a missing word."""
    words = normalize(reference).split(), normalize(hypothesis).split()
    for edit in Levenshtein.opcodes(*words):
        sides = words[0][edit.src_start : edit.src_end], words[1][edit.dest_start : edit.dest_end]
        yield from zip_longest(*sides, fillvalue="")
