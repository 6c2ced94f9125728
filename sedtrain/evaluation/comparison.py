"""Compares runs over the same utterances: paired tests against the first run, and where the difference comes from.

Shapes: N common utterances, K counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sedtrain.errors import UserError
from sedtrain.evaluation.differences import Origin, origin
from sedtrain.evaluation.metric_set import MetricSet
from sedtrain.evaluation.metrics import Counts, title_of
from sedtrain.evaluation.results import BestHypothesis, scored_as
from sedtrain.evaluation.scored_runs import ScoredRun
from sedtrain.evaluation.statistics import (
    LEVEL,
    Interval,
    PairedDifference,
    Units,
    chances_of_swaps,
    confidence_intervals,
    holm,
    paired_test,
    smallest_chance,
    sums_of_units,
)
from sedtrain.text.normalizers import normalizer

WRITE = "compare runs of the same data, split and normalizer; task=evaluate scores a run again"


@dataclass(frozen=True)
class Difference:
    """A run minus the first run in one metric.

    p_swaps: p-value of approximate randomisation; None for too few units
    p_value: the larger p-value of both tests, after Holm's correction for several runs
    """

    paired: PairedDifference
    p_swaps: float | None
    p_value: float
    is_better: bool

    def verdict(self, run: str, first: str) -> str:
        """A sentence such as `B is better: 1.20 points, p = 0.003`."""
        p_value = "p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.3f}"
        if not self.p_value < LEVEL:  # or NaN
            return f"no difference shown between {run} and {first} ({p_value})"
        points = f"{100 * abs(self.paired.difference):.2f} points"
        return f"{run if self.is_better else first} is better: {points}, {p_value}"


@dataclass(frozen=True)
class Comparison:
    """Several runs over their common utterances; every other run is compared with the first.

    values:      the interval of each run, by metric
    differences: the difference of each other run, by metric
    origins:     for each other run, where its difference comes from, in points of the metric `ranking`
    left_out:    for each run, the number of utterances that another run lacks
    """

    names: list[str]
    split: str
    data: str
    num_utterances: int
    units: str
    scored_as: list[str]
    values: Mapping[str, list[Interval]]
    differences: Mapping[str, list[Difference]]
    ranking: str
    origins: list[Origin]
    left_out: list[int]
    notes: list[str]

    def headline(self) -> str:
        """The number of compared utterances, and how many more each run has."""
        others = ", ".join(f"{n:,} of {name}" for n, name in zip(self.left_out, self.names, strict=True) if n)
        left_out = f" ({others} left out: another run lacks them)" if others else ""
        return f"{self.split}: {self.num_utterances:,} utterances in common{left_out}"

    def verdicts(self) -> list[str]:
        """A line for each metric and each other run."""
        return [
            f"{title_of(metric)}: {difference.verdict(name, self.names[0])}"
            for metric, differences in self.differences.items()
            for name, difference in zip(self.names[1:], differences, strict=True)
        ]


def compare_runs(runs: Sequence[ScoredRun], names: list[str]) -> Comparison:
    """Compares runs by the metrics that all of them have. Raises UserError if they did not score the same texts."""
    refuse_different(runs)
    common = [each for id, each in runs[0].utterances.items() if all(id in run.utterances for run in runs)]
    if not common:
        raise UserError("runs", names, "these runs have no utterance in common: their ids differ", WRITE)
    refuse_other_references(runs, names, common)
    metric_set = MetricSet(common_metrics(runs, names), normalizer(runs[0].normalizer["name"]), runs[0].tokenize)
    texts = [[run.utterances[each.id].hypothesis for each in common] for run in runs]
    references, speakers = [each.reference for each in common], speakers_of(runs, common)
    counts = counts_of_runs(metric_set, references, texts)
    intervals = [confidence_intervals(metric_set, each, speakers) for each in counts]
    first = counts[0]
    return Comparison(
        names=names,
        split=runs[0].split,
        data=runs[0].data,
        num_utterances=len(common),
        units=str(Units.of(speakers)),
        scored_as=scored_as(metric_set.metrics, runs[0].normalizer, metric_set.signatures()),
        values={name: [each[name] for each in intervals] for name in metric_set.metrics},
        differences=differences_of(metric_set, first, counts[1:], speakers),
        ranking=metric_set.ranking(),
        origins=[
            origin(metric_set, common, speakers, each, first, of_run)
            for each, of_run in zip(texts[1:], counts[1:], strict=True)
        ],
        left_out=[len(run.utterances) - len(common) for run in runs],
        notes=notes_of(runs, names, metric_set, Units.of(speakers), len(sums_of_units(first, speakers))),
    )


def counts_of_runs(metric_set: MetricSet, references: list[str], texts: list[list[str]]) -> list[Counts]:
    """(N, K) counts of each run; a text equal to the first run's is not counted again."""
    first = metric_set.count(references, texts[0])
    counts = [first]
    for hypotheses in texts[1:]:
        rows = first.copy()
        changed = [row for row, text in enumerate(hypotheses) if text != texts[0][row]]
        rows[changed] = metric_set.count([references[row] for row in changed], [hypotheses[row] for row in changed])
        counts.append(rows)
    return counts


def speakers_of(runs: Sequence[ScoredRun], common: Sequence[BestHypothesis]) -> list[str | None]:
    """The speaker of each utterance, from the first run that knows one."""
    return [
        next((run.utterances[each.id].speaker for run in runs if run.utterances[each.id].speaker), None)
        for each in common
    ]


# --- what may be compared


def refuse_different(runs: Sequence[ScoredRun]) -> None:
    first = runs[0]
    for run in runs[1:]:
        for what in ("split", "normalizer"):
            values = getattr(first, what), getattr(run, what)
            if values[0] != values[1]:
                shown = [" ".join(each.values()) if isinstance(each, Mapping) else each for each in values]
                wrong = f"its {what} is {shown[1]!r}, that of {first.folder} is {shown[0]!r}"
                raise UserError("runs", str(run.folder), wrong, WRITE)
        for name in first.signatures.keys() & run.signatures.keys():
            if first.signatures[name] != run.signatures[name]:
                wrong = f"its {name} is {run.signatures[name]}, that of {first.folder} is {first.signatures[name]}"
                raise UserError(
                    "runs", str(run.folder), wrong, "score both by the same sacrebleu and metrics.bleu.tokenize"
                )


def refuse_other_references(runs: Sequence[ScoredRun], names: list[str], common: Sequence[BestHypothesis]) -> None:
    for run in runs[1:]:
        other = [each.id for each in common if run.utterances[each.id].reference != each.reference]
        if other:
            number = f"{len(other):,} of {len(common):,} common utterances"
            wrong = f"{number} have other references than in {names[0]}: {other[0]!r}"
            raise UserError("runs", str(run.folder), wrong, WRITE)


def common_metrics(runs: Sequence[ScoredRun], names: list[str]) -> list[str]:
    metrics = [name for name in runs[0].metrics if all(name in run.metrics for run in runs)]
    if not metrics:
        wrong = f"no metric is common to all: {'; '.join(f'{run.folder} has {run.metrics}' for run in runs)}"
        raise UserError("runs", names, wrong, "score both by the same: task=evaluate checkpoint=RUN metrics=[NAME]")
    return metrics


def notes_of(
    runs: Sequence[ScoredRun], names: list[str], metric_set: MetricSet, units: Units, num_units: int
) -> list[str]:
    others = [
        name for name in dict.fromkeys(name for run in runs for name in run.own) if name not in metric_set.metrics
    ]
    data = {run.data for run in runs}
    notes = [f"not compared, as these need the user's function: {', '.join(others)}"] if others else []
    notes += [f"the runs name their data differently: {'; '.join(sorted(data))}"] if len(data) > 1 else []
    if smallest_chance(num_units) >= LEVEL:
        notes.append(
            f"{num_units} {units.resampled}s are too few for random swaps to show anything: the t-test alone decides"
        )
    return notes


# --- tests


def differences_of(
    metric_set: MetricSet, first: Counts, others: Sequence[Counts], speakers: Sequence[str | None]
) -> dict[str, list[Difference]]:
    """Every other run against the first, in every metric; p-values are corrected for the number of runs (Holm)."""
    paired = [paired_test(metric_set, first, each, speakers) for each in others]
    swaps = [chances_of_swaps(metric_set, first, each, speakers) for each in others]
    found = {}
    for name, metric in metric_set.metrics.items():
        corrected = holm(
            [max(test[name].p_value, swap.get(name, 0.0)) for test, swap in zip(paired, swaps, strict=True)]
        )
        found[name] = [
            Difference(test[name], swap.get(name), p_value, (test[name].difference > 0) == metric.higher_is_better)
            for test, swap, p_value in zip(paired, swaps, corrected, strict=True)
        ]
    return found
