"""Tables and lines for people: the scores of a run, the files that were saved."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import Progress
from rich.table import Table

from sedtrain.evaluation.results import Evaluation, Results

RUN_FILES = (
    "model", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "results.json", "hypotheses.jsonl", "report.html", "metrics.csv",
    "tensorboard", "wandb", "config.yaml", "skipped.jsonl", "bad_steps.jsonl", "sedtrain.log",
)  # fmt: skip

logger = logging.getLogger(__name__)


def table(title: str, *headings: str, right: Collection[str] = ()) -> Table:
    """An empty table; columns named in `right` are right-aligned."""
    table = Table(title=title, title_justify="left", caption_justify="left", caption_style="")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left")
    return table


def scored(results: Results, evaluation: Evaluation, folder: Path, num_examples: int = 3) -> list[RenderableType]:
    """Scores, examples spread over the split, counts of skipped utterances, and files in the run's folder."""
    numbers = ("value", results.interval_title.replace(", by", ",\nby"))
    scores = table("", "metric", *numbers, right=numbers)
    for row in results.rows():
        scores.add_row(*row)
    examples = table("examples", "utterance", "reference", "hypothesis")
    step = max(results.num_utterances // num_examples, 1)
    for example in evaluation.hypotheses[::step][:num_examples]:
        examples.add_row(example.id, example.reference, example.hypothesis)
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in results.skipped.items()) or "no utterance"
    headline = f"{results.split}: {results.headline}"  # no title of the table, which would be cut to its width
    scored_as = "\n".join(results.scored_as())
    return [headline, scores, scored_as, examples, f"left out: {left_out}", saved_files(folder, RUN_FILES)]


def saved_files(folder: Path, names: Sequence[str]) -> str:
    """The folder, and those files of `names` that exist in it."""
    return f"saved in {folder}: " + ", ".join(name for name in names if (folder / name).exists())


def files(sizes: Mapping[str, int]) -> Table:
    """Files with their sizes in MB (10^6 bytes)."""
    listed = table("", "file", "MB", right=("MB",))
    for name, size in {**sizes, "together": sum(sizes.values())}.items():
        listed.add_row(name, f"{size / 1e6:,.3f}")
    return listed


def with_progress(names: Sequence[str], is_shown: bool) -> Iterator[str]:
    """Yields the names. With several names, a bar on standard error shows how many are done, if that is a terminal."""
    console = Console(stderr=True)
    shown = is_shown and len(names) > 1 and console.is_terminal
    with Progress(console=console, transient=True, redirect_stdout=False, disable=not shown) as bar:
        task = bar.add_task("transcribing", total=len(names))
        for name in names:
            yield name
            bar.advance(task)


def show(*contents: RenderableType) -> None:
    """Prints tables and lines to standard output and writes the same text to the log file."""
    for content in contents:
        Console(highlight=False, soft_wrap=isinstance(content, str), markup=False).print(content)
        plain = Console(width=120, no_color=True, force_terminal=False, markup=False)
        with plain.capture() as capture:
            plain.print(content)
        logger.debug("\n%s", capture.get())
