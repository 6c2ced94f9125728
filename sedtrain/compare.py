"""`task=compare`: which of several runs is better, and where; as tables, compare.json and compare.html. Needs no torch."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import RenderableType

from sedtrain.errors import UserError
from sedtrain.evaluation.comparison import Comparison, compare_runs
from sedtrain.evaluation.comparison_page import group_rows, run_rows, write_comparison
from sedtrain.evaluation.metrics import title_of
from sedtrain.evaluation.scored_runs import ScoredRun, printable
from sedtrain.run_dir import write_json
from sedtrain.terminal import saved_files, show, table

MAX_RUNS = 20


def compare(folders: Sequence[str], run_dir: Path) -> None:
    """Compares runs by their results.json and hypotheses.jsonl, each with the first. Raises UserError."""
    places = [Path(each).expanduser().resolve() for each in folders]
    if len({*places}) < len(places) or len(places) > MAX_RUNS:
        wrong, write = "a run is named twice, or there are too many", f"write 2 to {MAX_RUNS} different folders"
        raise UserError("runs", list(folders), wrong, write)
    comparison = compare_runs([ScoredRun.read(each) for each in folders], short_names(places))
    write_json(run_dir / "compare.json", {**asdict(comparison), "verdicts": comparison.verdicts()})
    write_comparison(run_dir / "compare.html", comparison)
    show(*tables(comparison), saved_files(run_dir, ["compare.html", "compare.json", "sedtrain.log"]))


def short_names(places: Sequence[Path]) -> list[str]:
    """The last parts of paths that tell them apart, without what a terminal would act on."""
    number = next(n for n in range(1, 1000) if len({each.parts[-n:] for each in places}) == len(places))
    return [printable("/".join(each.parts[-number:])) for each in places]


def tables(comparison: Comparison) -> list[RenderableType]:
    """Tables and lines for the terminal; the verdicts come last, where they are seen."""
    numbers = ("value and\n95 % interval", "difference and\n95 % interval", "p, t", "p, swaps", "p, Holm")
    shown: list[RenderableType] = [f"{comparison.headline()}, {comparison.units}"]
    for metric in comparison.values:
        scores = table(title_of(metric), "run", *numbers, right=numbers)
        for name, value, ends, difference, of_difference, *p_values in run_rows(comparison, metric):
            scores.add_row(name, f"{value}\n{ends}", f"{difference}\n{of_difference}".strip(), *p_values)
        shown.append(scores)
    for name, origin in zip(comparison.names[1:], comparison.origins, strict=True):
        for what, groups in origin.groups.items():
            headings = ("utterances", comparison.names[0], name, "points")
            rows = table(f"{title_of(comparison.ranking)} by {what}", what, *headings, right=headings)
            for row in group_rows(groups):
                rows.add_row(*map(printable, row))
            shown.append(rows)
    return [*shown, *comparison.scored_as, *comparison.notes, *comparison.verdicts()]
