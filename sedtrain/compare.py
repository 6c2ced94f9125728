"""`task=compare`: compares runs with the first, as tables, compare.json and compare.html. Needs no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import RenderableType

from sedtrain.errors import UserError
from sedtrain.evaluation import html
from sedtrain.evaluation.comparison import Comparison, compare_runs
from sedtrain.evaluation.differences import Change, Group, Origin
from sedtrain.evaluation.metrics import title_of
from sedtrain.evaluation.results import percent
from sedtrain.evaluation.scored_runs import ScoredRun, printable
from sedtrain.run_dir import write_json
from sedtrain.terminal import saved_files, show, table

MAX_RUNS = 20
HEADINGS = ("run", "value", "95 % interval", "difference", "its 95 % interval", "p, t-test", "p, swaps", "p, corrected")
HOW = """
Each run is compared with the first; differences are in points (percent). Two paired tests resample the units of the
intervals: a t-test on the jackknife, and approximate randomisation, which swaps the runs' units at random. The verdict takes
the larger p-value of the two, corrected for the number of comparisons (Holm); below 0.05 it calls the runs different. The
first metric decides: p-values are not corrected for the number of metrics.
"""


def compare(folders: Sequence[str], run_dir: Path) -> None:
    """Compares runs by their results.json and hypotheses.jsonl, each with the first. Raises UserError."""
    places = [Path(folder).expanduser().resolve() for folder in folders]
    if len({*places}) < len(places) or len(places) > MAX_RUNS:
        wrong, write = "a run is named twice, or there are too many", f"write 2 to {MAX_RUNS} different folders"
        raise UserError("runs", list(folders), wrong, write)
    comparison = compare_runs([ScoredRun.read(folder) for folder in folders], short_names(places))
    write_json(run_dir / "compare.json", {**asdict(comparison), "verdicts": comparison.verdicts()})
    write_comparison(run_dir / "compare.html", comparison)
    show(*tables(comparison), saved_files(run_dir, ["compare.html", "compare.json", "sedtrain.log"]))


def short_names(places: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart, without control characters."""
    number = next(n for n in range(1, 1000) if len({place.parts[-n:] for place in places}) == len(places))
    return [printable("/".join(place.parts[-number:])) for place in places]


def tables(comparison: Comparison) -> list[RenderableType]:
    """Tables and lines for the terminal; the verdicts come last, above the prompt."""
    numbers = ("value and\n95 % interval", "difference and\n95 % interval", "p, t", "p, swaps", "p, Holm")
    shown: list[RenderableType] = [f"{comparison.headline()}, {comparison.units}"]
    for metric in comparison.values:
        scores = table(title_of(metric), "run", *numbers, right=numbers)
        for name, value, interval, difference, its_interval, *p_values in run_rows(comparison, metric):
            scores.add_row(name, f"{value}\n{interval}", f"{difference}\n{its_interval}".strip(), *p_values)
        shown.append(scores)
    for name, origin in zip(comparison.names[1:], comparison.origins, strict=True):
        for what, groups in origin.groups.items():
            headings = ("utterances", comparison.names[0], name, "points")
            rows = table(f"{title_of(comparison.ranking)} by {what}", what, *headings, right=headings)
            for row in group_rows(groups):
                rows.add_row(*map(printable, row))
            shown.append(rows)
    return [*shown, *comparison.scored_as, *comparison.notes, *comparison.verdicts()]


# --- compare.html


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Writes one self-contained HTML file."""
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
    """One row per run: value and interval; for all but the first also the difference from the first, with its tests."""
    rows = []
    for number, (name, value) in enumerate(zip(comparison.names, comparison.values[metric], strict=True)):
        tests: tuple[str, ...] = ("",) * 5
        if number:
            found = comparison.differences[metric][number - 1]
            interval = f"{points(found.paired.low)} to {points(found.paired.high)}"
            p_values = found.paired.p_value, found.p_swaps, found.p_value
            tests = (points(found.paired.difference), interval, *map(p_value_text, p_values))
        rows.append((name, percent(value.value), value.ends, *tests))
    return rows


def group_rows(groups: Iterable[Group]) -> list[tuple[str, ...]]:
    return [
        (group.name, f"{group.num_utterances:,}", percent(group.first), percent(group.other), points(group.points))
        for group in groups
    ]


def points(fraction: float) -> str:
    return f"{100 * fraction:+.2f}"


def p_value_text(p_value: float | None) -> str:
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
    moved = f"Points: the change of {title} from {first} to {other} that these utterances alone cause."
    where = html.headed(f"Where {other} differs from {first}", html.quiet(moved) if origin.groups else "")
    return where + html.row(*tables) + changed_utterances(first, other, title, origin.changes)


def changed_utterances(first: str, other: str, title: str, changes: Sequence[Change]) -> str:
    articles = []
    for change in changes:
        written = {first: change.utterance.hypothesis, other: change.hypothesis}
        texts = html.definitions({"reference": change.utterance.reference, **written})
        score = f"{title} {percent(change.first)} → {percent(change.other)}"
        articles.append(html.article(change.utterance.id, score, texts))
    heading = f"The {len(articles)} utterances that changed most"
    return f"<section>{html.headed(heading, *articles)}</section>" if articles else ""
