"""Tables for people: what will be trained, and what came out."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.table import Table

from sedtrain.evaluation.evaluate import Evaluation
from sedtrain.training.finetune import PartPlan
from sedtrain.training.fit_batches import Budget, Fitted

logger = logging.getLogger(__name__)


def plan(parts: Sequence[PartPlan], facts: Mapping[str, str]) -> Table:
    """What each part of the model does, and below it the facts of the run."""
    table = Table(title="what will be trained", title_justify="left", caption_justify="left", caption_style="")
    table.add_column("part", no_wrap=True)
    for heading in ("trainable", "frozen", "peak learning rate", "from step"):
        table.add_column(heading, justify="right")
    for part in parts:
        rates = [f"{rate:.2g}" for rate in part.learning_rates]
        steps = [f"{step:,}" for step in part.steps]
        table.add_row(part.name, f"{part.num_trainable:,}", f"{part.num_frozen:,}", ends(rates), ends(steps))
    trainable, frozen = sum(part.num_trainable for part in parts), sum(part.num_frozen for part in parts)
    table.add_section()
    table.add_row("all", f"{trainable:,}", f"{frozen:,}")
    table.caption = "\n".join(f"{name:<16}{fact}" for name, fact in facts.items())
    return table


def ends(values: Sequence[str]) -> str:
    """The first and the last of some values in order; nothing where there is none."""
    return " to ".join(dict.fromkeys([*values[:1], *values[-1:]]))


def scores(evaluation: Evaluation, split: str) -> Table:
    table = Table(title=f"{split}: {len(evaluation.hypotheses)} utterances", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, interval in evaluation.metrics.items():
        table.add_row(name, f"{100 * interval.value:.2f} %", f"{100 * interval.low:.2f} to {100 * interval.high:.2f} %")
    return table


def examples(evaluation: Evaluation, number: int = 3) -> Table:
    """References beside their hypotheses, spread over the split."""
    table = Table(title="examples", title_justify="left")
    for heading in ("utterance", "reference", "hypothesis"):
        table.add_column(heading)
    step = max(len(evaluation.hypotheses) // number, 1)
    for each in evaluation.hypotheses[::step][:number]:
        table.add_row(each.id, each.reference, each.hypothesis)
    return table


def batches(found: Sequence[Fitted], budget: Budget) -> Table:
    """The largest batch of each bucket, and what a step on it took."""
    table = Table(title="the largest batches that fit", title_justify="left", caption_justify="left", caption_style="")
    for heading in ("seconds up to", "tokens up to", "utterances", "audio", "peak memory", "speed"):
        table.add_column(heading, justify="right")
    for (seconds, tokens, utterances), peak_gb, speed in found:
        audio = f"{seconds * utterances:,.0f} s"
        table.add_row(f"{seconds:g}", f"{tokens}", f"{utterances:,}", audio, f"{peak_gb:.2f} GB", f"{speed:,.0f} s/s")
    table.caption = f"into {budget.text}\nspeed: seconds of audio per second, of one step"
    return table


def left_out(counts: Mapping[str, int]) -> str:
    """How many utterances were not used, by reason."""
    return "left out: " + (", ".join(f"{count:,} {reason}" for reason, count in counts.items()) or "no utterance")


def places(folder: Path, names: Sequence[str]) -> str:
    """Where things were saved, of those that are there."""
    return f"saved in {folder}: " + ", ".join(name for name in names if (folder / name).exists())


def show(*contents: RenderableType) -> None:
    """Prints tables and lines to standard output and writes the same text to the log file."""
    for content in contents:
        Console(highlight=False, soft_wrap=isinstance(content, str), markup=False).print(content)
        plain = Console(width=120, no_color=True, force_terminal=False, markup=False)
        with plain.capture() as capture:
            plain.print(content)
        logger.debug("\n%s", capture.get())
