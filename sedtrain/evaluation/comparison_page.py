"""Writes compare.html: verdicts, values with intervals and tests, and where the difference comes from."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from sedtrain.evaluation import html
from sedtrain.evaluation.comparison import Comparison
from sedtrain.evaluation.groups import Change, Group, Origin
from sedtrain.evaluation.metrics import title_of
from sedtrain.evaluation.results import percent

HEADINGS = ("run", "value", "95 % interval", "difference", "its 95 % interval", "p, t-test", "p, swaps", "p, corrected")
HOW = """
Differences are those from the first run, in points (percent). Two paired tests resample the units of the intervals: a t-test
of the jackknife, and approximate randomisation, which swaps the runs' units at random. The verdict takes the larger of both
p-values, corrected for the number of runs that are compared with the first (Holm), and calls it a difference below 0.05.
Metrics are not corrected for each other: the first decides.
"""


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Writes one HTML file without links to anything outside it."""
    title = f"{' and '.join([', '.join(comparison.names[:-1]), comparison.names[-1]])}: comparison"
    facts = {
        "data": comparison.data,
        "utterances": comparison.headline(),
        "tests and intervals": comparison.units,
        "scored as": "; ".join(comparison.scored_as),
        **{f"note {number}": note for number, note in enumerate(comparison.notes, 1)},
    }
    sections = [html.bullets(comparison.verdicts()), html.definitions(facts)]
    for metric in comparison.values:
        rows = html.table(HEADINGS, run_rows(comparison, metric))
        sections.append(html.headed(title_of(metric), html.wide(rows)))
    sections.append(html.quiet(HOW))
    for name, origin in zip(comparison.names[1:], comparison.origins, strict=True):
        sections.append(origin_sections(comparison.names[0], name, title_of(comparison.ranking), origin))
    html.write_page(path, title, sections)


def run_rows(comparison: Comparison, metric: str) -> list[tuple[str, ...]]:
    """A row for each run: value and interval, and of each but the first the difference with its tests."""
    rows = []
    for number, (name, value) in enumerate(zip(comparison.names, comparison.values[metric], strict=True)):
        tests: tuple[str, ...] = ("",) * 5
        if number:
            each = comparison.differences[metric][number - 1]
            ends = f"{points(each.paired.low)} to {points(each.paired.high)}"
            p_values = each.paired.p_value, each.p_swaps, each.p_value
            tests = (points(each.paired.difference), ends, *map(chance, p_values))
        rows.append((name, percent(value.value), value.ends, *tests))
    return rows


def group_rows(groups: Iterable[Group]) -> list[tuple[str, ...]]:
    return [
        (each.name, f"{each.num_utterances:,}", percent(each.first), percent(each.other), points(each.points))
        for each in groups
    ]


def points(fraction: float) -> str:
    return f"{100 * fraction:+.2f}"


def chance(p_value: float | None) -> str:
    return "" if p_value is None else "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def origin_sections(first: str, other: str, title: str, origin: Origin) -> str:
    """Tables of groups and confusions, and the utterances that changed most."""
    tables = []
    for what, groups in origin.groups.items():
        rows = html.table((what, "utterances", first, other, "points"), group_rows(groups))
        tables.append(html.headed(f"{title} by {what}", html.wide(rows)))
    if origin.confusions:
        cells = [
            (said or "–", wrote or "–", f"{before:,}", f"{after:,}") for said, wrote, before, after in origin.confusions
        ]
        rows = html.table(("reference", "hypothesis", first, other), cells, num_texts=2)
        tables.append(html.headed("Confusions that changed most", html.wide(rows)))
    moved = f"Points: how far {other} moves the {title} of {first} by these utterances alone."
    where = html.headed(f"Where {other} differs from {first}", html.quiet(moved) if origin.groups else "")
    return where + html.row(*tables) + changed_utterances(first, other, title, origin.changes)


def changed_utterances(first: str, other: str, title: str, changes: Sequence[Change]) -> str:
    articles = []
    for each in changes:
        written = {first: each.utterance.hypothesis, other: each.hypothesis}
        texts = html.definitions({"reference": each.utterance.reference, **written})
        score = f"{title} {percent(each.first)} → {percent(each.other)}"
        articles.append(html.article(each.utterance.id, score, texts))
    heading = f"The {len(articles)} utterances that changed most"
    return f"<section>{html.headed(heading, *articles)}</section>" if articles else ""
