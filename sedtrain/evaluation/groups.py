"""Scores of groups of utterances: by duration, length, speaker, language and dataset."""

from collections.abc import Collection, Sequence

import numpy as np

from sedtrain.evaluation import html
from sedtrain.evaluation.metric_set import MetricSet
from sedtrain.evaluation.metrics import METRICS
from sedtrain.evaluation.results import Evaluation, percent
from sedtrain.evaluation.statistics import Interval, confidence_intervals

NUM_RANGES, NUM_NAMES = 6, 10  # most groups by a number; worst groups by a name that are shown

Groups = list[tuple[str, list[int]]]
"""Names of groups and the rows of their utterances."""


def by_number(values: Sequence[float | None]) -> Groups:
    """Groups of about equal size, in order; no groups if a value is missing."""
    numbers = np.array([value for value in values if value is not None])
    if len(numbers) < len(values):
        return []
    highest = np.unique(np.quantile(numbers, np.linspace(0, 1, NUM_RANGES + 1)[1:], method="higher"))
    members = [np.flatnonzero(np.searchsorted(highest, numbers) == group) for group in range(len(highest))]
    ends = [(numbers[rows].min(), numbers[rows].max()) for rows in members]
    labels = [
        "–".join(dict.fromkeys(f"{end:.{int(end < 10)}f}".removesuffix(".0") for end in of_group)) for of_group in ends
    ]
    return [(label, rows.tolist()) for label, rows in zip(labels, members, strict=True)]


def by_name(values: Sequence[str | None]) -> Groups:
    groups: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        groups.setdefault(value or "unknown", []).append(row)
    return list(groups.items())


def scores_by_group(
    name: str, metric_set: MetricSet, evaluation: Evaluation, num_words: Sequence[int], labels: Collection[str]
) -> list[str]:
    """A figure for each numeric property and a table for each named one, if utterances differ in it.

    num_words: words of each reference
    labels:    names of the datasets of a mix, with which ids begin
    """
    utterances, title = evaluation.hypotheses, METRICS[name].title
    prefixes = [each.id.partition("/")[0] for each in utterances]
    numbers = {
        "duration in seconds": by_number([each.seconds for each in utterances]),
        "words in the reference": by_number(num_words),
    }
    names = {
        "speaker": by_name(evaluation.speakers),
        "language": by_name([each.language for each in utterances]),
        "dataset": by_name([prefix if prefix in labels else None for prefix in prefixes]),
    }

    def interval(rows: list[int]) -> Interval:
        speakers = [utterances[row].speaker for row in rows]
        return confidence_intervals(metric_set, evaluation.counts[rows], speakers)[name]

    def figure(what: str, groups: Groups) -> str:
        intervals, caption = [interval(rows) for _, rows in groups], f"with 95 % intervals, {evaluation.units}"
        return html.bars_figure(caption, [label for label, _ in groups], intervals, what)

    def table(what: str, groups: Groups) -> str:
        """The worst groups, and the rest as one."""
        sums = np.stack([evaluation.counts[rows].sum(axis=0) for _, rows in groups])
        order = np.argsort(metric_set.values(sums)[name] * (1 if METRICS[name].higher_is_better else -1), kind="stable")
        shown, rest = ([groups[index] for index in part] for part in (order[:NUM_NAMES], order[NUM_NAMES:]))
        if rest:
            shown.append((f"the {len(rest):,} others", [row for _, rows in rest for row in rows]))
        scored = [(label, len(rows), interval(rows)) for label, rows in shown]
        cells = [(label, f"{number:,}", percent(each.value), each.ends) for label, number, each in scored]
        return html.table((what, "utterances", title, "95 % interval"), cells)

    return [
        html.headed(f"{title} by {what}", draw(what, groups))
        for draw, groupings in ((figure, numbers), (table, names))
        for what, groups in groupings.items()
        if len(groups) > 1
    ]
