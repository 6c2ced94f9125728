"""Tables for people: the plan of a training, the batches that fit."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from sedtrain.terminal import table
from sedtrain.training.finetune import PartPlan
from sedtrain.training.fit_batches import Budget, Fitted


def plan(parts: Sequence[PartPlan], facts: Mapping[str, str]) -> Table:
    """Table of how each part of the model is trained, and below it the facts of the run."""
    numbers = ("trainable", "frozen", "peak learning rate", "from step")
    rows = table("what will be trained", "part", *numbers, right=numbers)
    rows.columns[0].no_wrap = True
    for part in parts:
        rates, steps = [f"{rate:.2g}" for rate in part.learning_rates], [f"{step:,}" for step in part.steps]
        rows.add_row(part.name, f"{part.num_trainable:,}", f"{part.num_frozen:,}", ends(rates), ends(steps))
    rows.add_section()
    trainable, frozen = sum(part.num_trainable for part in parts), sum(part.num_frozen for part in parts)
    rows.add_row("all", f"{trainable:,}", f"{frozen:,}")
    rows.caption = "\n".join(f"{name:<16}{fact}" for name, fact in facts.items())
    return rows


def ends(values: Sequence[str]) -> str:
    """The first and the last of some values in order; nothing where there is none."""
    return " to ".join(dict.fromkeys([*values[:1], *values[-1:]]))


def batches(found: Sequence[Fitted], budget: Budget) -> Table:
    """The largest batch of each bucket, and what a step on it took."""
    headings = ("seconds up to", "tokens up to", "utterances", "audio", "peak memory", "speed")
    rows = table("the largest batches that fit", *headings, right=headings)
    for (seconds, tokens, utterances), peak_gb, speed in found:
        audio = f"{seconds * utterances:,.0f} s"
        rows.add_row(f"{seconds:g}", f"{tokens}", f"{utterances:,}", audio, f"{peak_gb:.2f} GB", f"{speed:,.0f} s/s")
    rows.caption = f"into {budget.text}\nspeed: seconds of audio per second, of one step"
    return rows
