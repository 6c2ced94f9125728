"""Groups of utterances, by duration, length, speaker, language and dataset: their scores, and where two runs differ.

Shapes: N utterances, K counts.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sedtrain.evaluation import html
from sedtrain.evaluation.intervals import Interval, confidence_intervals
from sedtrain.evaluation.metrics import METRICS, Counts, MetricSet, word_pairs
from sedtrain.evaluation.results import BestHypothesis, Evaluation, percent
from sedtrain.text.normalizers import Normalizer

NUM_RANGES, NUM_NAMES = 6, 10  # groups by a number, and the worst of those by a name
NUM_GROUPS, NUM_CONFUSIONS, NUM_CHANGED = 12, 12, 20  # by which two runs differ most

Groups = list[tuple[str, list[int]]]
"""Names of groups and the rows of their utterances."""


def by_number(values: Sequence[float | None]) -> Groups:
    """Groups of about equal size, in order; none where a value is missing."""
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
    """A figure for each numeric property and a table for each name, where utterances differ in it.

    num_words: of each reference
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
        """The worst groups, and all others as one."""
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


# --- where the difference between two runs comes from


@dataclass(frozen=True)
class Group:
    """Utterances that have something in common: values of both runs, and the points of the whole difference they explain."""

    name: str
    num_utterances: int
    first: float
    other: float
    points: float


@dataclass(frozen=True)
class Change:
    """An utterance that two runs write differently; values of the metric that ranks utterances."""

    utterance: BestHypothesis
    hypothesis: str
    first: float
    other: float


@dataclass(frozen=True)
class Origin:
    """The origin of the difference between a run and the first.

    groups:     by what they have in common: length, speaker, language
    confusions: reference word, hypothesis word, times in the first run and in the other, those that changed most first
    changes:    utterances that changed most
    """

    groups: Mapping[str, list[Group]]
    confusions: list[tuple[str, str, int, int]]
    changes: list[Change]


def origin(
    metric_set: MetricSet,
    utterances: Sequence[BestHypothesis],
    speakers: Sequence[str | None],
    hypotheses: Sequence[str],
    first: Counts,
    other: Counts,
) -> Origin:
    """Groups, confusions and utterances in which a run and the first differ most."""
    keys: dict[str, Sequence[str | None]] = {
        "length": length_groups(first[:, 0]),
        "speaker": list(speakers),
        "language": [each.language for each in utterances],
    }
    groups = {
        what: groups_of(metric_set, names, first, other, all_in_order=what == "length")
        for what, names in keys.items()
        if len({*names} - {None}) > 1
    }
    name = metric_set.ranking()
    values = [metric_set.values(counts)[name] for counts in (first, other)]
    changed = [row for row, each in enumerate(utterances) if each.hypothesis != hypotheses[row]]
    most = sorted(changed, key=lambda row: (-abs(values[1][row] - values[0][row]), -int(first[row, 0])))[:NUM_CHANGED]
    changes = [Change(utterances[row], hypotheses[row], float(values[0][row]), float(values[1][row])) for row in most]
    both = [(utterances[row].reference, utterances[row].hypothesis, hypotheses[row]) for row in changed]
    return Origin(
        groups, changed_confusions(both, metric_set.normalize), [each for each in changes if each.first != each.other]
    )


def length_groups(words: Counts) -> list[str]:
    """The group of each utterance, of about equal size, such as `4–6 words` of the reference."""
    names = [""] * len(words)
    for span, rows in by_number(words.tolist()):
        for row in rows:
            names[row] = f"{span} word{'' if span == '1' else 's'}"
    return names


def groups_of(
    metric_set: MetricSet, names: Sequence[str | None], first: Counts, other: Counts, all_in_order: bool
) -> list[Group]:
    """Groups of utterances by name: all by their shortest length, or those that explain most and the rest as one.

    The points of a group are how the whole value changes where only its utterances come from the other run.
    """
    rows = dict(by_name(names))
    ranking, total = metric_set.ranking(), first.sum(axis=0)
    before = float(metric_set.values(total)[ranking])

    def group(name: str, of_group: list[int]) -> Group:
        sums = first[of_group].sum(axis=0), other[of_group].sum(axis=0)
        own, others, moved = (float(metric_set.values(each)[ranking]) for each in (*sums, total - sums[0] + sums[1]))
        return Group(name, len(of_group), own, others, moved - before)

    if all_in_order:
        return [group(name, rows[name]) for name in sorted(rows, key=lambda name: int(first[rows[name], 0].min()))]
    groups = sorted((group(*each) for each in rows.items()), key=lambda each: -abs(each.points))
    rest = [row for each in groups[NUM_GROUPS:] for row in rows[each.name]]
    return [*groups[:NUM_GROUPS], *([group(f"{len(groups) - NUM_GROUPS:,} others", rest)] if rest else [])]


def changed_confusions(texts: Iterable[tuple[str, str, str]], normalize: Normalizer) -> list[tuple[str, str, int, int]]:
    """Pairs of words whose number changed most, of references and what both runs wrote."""
    counts: tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]] = (Counter(), Counter())
    for reference, *hypotheses in texts:
        for counter, hypothesis in zip(counts, hypotheses, strict=True):
            counter.update(pair for pair in word_pairs(reference, hypothesis, normalize) if pair[0] != pair[1])
    before, after = counts
    most = sorted({*before, *after}, key=lambda pair: (-abs(after[pair] - before[pair]), pair))[:NUM_CONFUSIONS]
    return [(*pair, before[pair], after[pair]) for pair in most if before[pair] != after[pair]]
