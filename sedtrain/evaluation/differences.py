"""Finds where the difference between two runs comes from: groups of utterances, confused words, single utterances.

Shapes: N utterances, K counts.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sedtrain.evaluation.groups import by_name, by_number
from sedtrain.evaluation.metric_set import MetricSet
from sedtrain.evaluation.metrics import Counts, word_pairs
from sedtrain.evaluation.results import BestHypothesis
from sedtrain.text.normalizers import Normalizer

NUM_GROUPS, NUM_CONFUSIONS, NUM_CHANGED = 12, 12, 20  # shown, those that differ most


@dataclass(frozen=True)
class Group:
    """Utterances with something in common: the value of each run, and how much of the whole difference they explain."""

    name: str
    num_utterances: int
    first: float
    other: float
    points: float


@dataclass(frozen=True)
class Change:
    """An utterance that two runs write differently, with both values of the metric that ranks utterances."""

    utterance: BestHypothesis
    hypothesis: str
    first: float
    other: float


@dataclass(frozen=True)
class Origin:
    """The sources of the difference between a run and the first run.

    groups:     groups of utterances by length, speaker and language
    confusions: reference word, hypothesis word, and their number in the first and in the other run; largest change first
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
    """Groups, confusions and utterances in which a run differs most from the first."""
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
    """The group of each utterance by the length of its reference, such as `4–6 words`; groups are of about equal size."""
    names = [""] * len(words)
    for span, rows in by_number(words.tolist()):
        for row in rows:
            names[row] = f"{span} word{'' if span == '1' else 's'}"
    return names


def groups_of(
    metric_set: MetricSet, names: Sequence[str | None], first: Counts, other: Counts, all_in_order: bool
) -> list[Group]:
    """Groups of utterances by name: all, ordered by length; or those that explain most, and the rest as one.

    A group's points: the change of the whole value if only this group's utterances come from the other run.
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
    """Confused pairs of words whose number changed most; `texts` holds references and the texts of both runs."""
    counts: tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]] = (Counter(), Counter())
    for reference, *hypotheses in texts:
        for counter, hypothesis in zip(counts, hypotheses, strict=True):
            counter.update(pair for pair in word_pairs(reference, hypothesis, normalize) if pair[0] != pair[1])
    before, after = counts
    most = sorted({*before, *after}, key=lambda pair: (-abs(after[pair] - before[pair]), pair))[:NUM_CONFUSIONS]
    return [(*pair, before[pair], after[pair]) for pair in most if before[pair] != after[pair]]
