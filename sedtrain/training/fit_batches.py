"""Finds the largest batch of each duration bucket that fits into memory, by trial steps on noise."""

import logging
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from lightning import Trainer

from sedtrain.data.buckets import Bucket, Floats, Integers, bucket_edges
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.data.sampler import SHORTEST_SECONDS
from sedtrain.data.streaming import BlockStart
from sedtrain.errors import UserError
from sedtrain.ranges import Positive
from sedtrain.run_dir import write_whole
from sedtrain.training.memory import MemoryMeter, OutOfMemory, memory_meter
from sedtrain.training.memory_trials import Trial, TrialSteps
from sedtrain.training.run import TrainingRun

logger = logging.getLogger(__name__)

MARGIN = 0.1
"""Fraction of memory that stays free: batches of many shapes fragment memory, trials of one shape do not."""
TOLERANCE = 0.05
"""The batch that is found may be smaller than the largest that fits by this fraction."""
TEXT_QUANTILE = 0.99
"""Fraction of a bucket's texts within its token limit; a few longer texts move up, so that they shrink no other batch."""
SAMPLE_BYTES = 4
GB = 1e9
WRITE_MORE = "or memory_gb=MORE, if the machine has more"


class Budget(NamedTuple):
    """Bytes that a step may take, the `memory_gb` they come from, and both as text."""

    usable: float
    memory_gb: float | None
    text: str


class Fitted(NamedTuple):
    """A bucket, and the memory and speed of a step on its batch."""

    bucket: Bucket
    peak_gb: float
    audio_seconds_per_second: float

    def __str__(self) -> str:
        return f"{self.peak_gb:.2f} GB, {self.audio_seconds_per_second:.0f} s/s"


def fitted_batches(
    run: TrainingRun, make_trainer: Callable[..., Trainer], memory_gb: Positive | None, max_utterances: int | None
) -> tuple[list[Fitted], Budget]:
    """The largest batch of each bucket, from short to long. Long buckets are measured first: they may not fit at all.

    make_trainer: makes the run's own Trainer with some arguments replaced
    memory_gb: limit of training; None: the whole GPU
    max_utterances: number read from a stream to learn their lengths; None: all

    Raises UserError if memory cannot be measured or is too small.
    """
    device, num_ranks = run.trainer.strategy.root_device, run.trainer.world_size
    memory = memory_meter(device)
    budget = budget_of(memory_gb, memory, device.type, kept_audio(run.data) if device.type == "cpu" else 0)
    seconds, tokens = lengths(run.data, max_utterances)
    longest = Bucket(float(seconds.max()), int(tokens.max()), ceil(len(seconds) / num_ranks))
    logger.info("measuring batches of up to %g s and %d tokens, with %s", longest.seconds, longest.tokens, budget.text)
    steps = TrialSteps(run, make_trainer, memory)
    best, measured = largest_batch(steps, longest, budget, guess=1), longest.seconds
    edges = bucket_edges(seconds, best.utterances * measured, run.data.bounds.num_buckets)
    buckets = nonempty_buckets(edges, seconds, tokens, num_ranks)
    found: list[Fitted] = []
    for number, bucket in enumerate(reversed(buckets), start=1):
        if found or best.utterances > bucket.utterances:
            best = largest_batch(steps, bucket, budget, guess=round(best.utterances * measured / bucket.seconds))
            measured = bucket.seconds
        speed = best.utterances * bucket.seconds / best.seconds
        found.insert(0, Fitted(bucket._replace(utterances=best.utterances), (best.peak or 0) / GB, speed))
        size = f"up to {bucket.seconds:g} s and {bucket.tokens} tokens: batches of {best.utterances:,}"
        logger.info("%s, %s (%d of %d)", size, found[0], number, len(buckets))
    return found, budget


def write_batches(file: Path, found: Sequence[Fitted], budget: Budget, command: str) -> None:
    """Writes the buckets for `data.batches`, with memory and speed as comments."""
    lines = [f"# The largest batches that fit into {budget.text}", f"# {command}"]
    for fitted in found:
        seconds, tokens, utterances = fitted.bucket
        lines.append(f"- {{seconds: {seconds:g}, tokens: {tokens}, utterances: {utterances}}}   # {fitted}")
    write_whole(file, "\n".join(lines) + "\n")


def budget_of(memory_gb: float | None, memory: MemoryMeter, device: str, kept: float) -> Budget:
    """Memory for steps: `memory_gb` or the whole GPU, less MARGIN and the `kept` bytes of decoded audio."""
    available = memory.available()
    if memory_gb is None and device == "cpu":
        wrong = "on a CPU the search needs a memory limit"
        instead = f"write memory_gb=NUMBER, for the whole process; {available / GB:.0f} are free"
        raise UserError("memory_gb", None, wrong, instead)
    whole = available if memory_gb is None else memory_gb * GB
    if whole > available:
        wrong, instead = f"only {available / GB:.1f} GB are free", f"write memory_gb={0.9 * available / GB:.0f}"
        raise UserError("memory_gb", memory_gb, wrong, instead)
    text = f"{whole / GB:.3g} GB on the {device.upper()} ({100 * MARGIN:.0f} % kept free"
    text += f", {kept / GB:.2f} GB for audio that is kept decoded)" if kept else ")"
    return Budget((1 - MARGIN) * whole - kept, memory_gb, text)


def kept_audio(data: SpeechTextDataModule) -> float:
    """Bytes of decoded audio that this process will keep in memory."""
    assert data.collator is not None
    splits = [data.split("validation")]
    if not data.corpus.streaming:
        splits.append(data.split("train", data.augment))
    seconds = sum(split.total_seconds() for split in splits if split.keeps_decoded)
    return seconds * data.collator.sampling_rate * SAMPLE_BYTES


def lengths(data: SpeechTextDataModule, max_utterances: int | None) -> tuple[Floats, Integers]:
    """Seconds (rounded up to 0.01) and target tokens of the training utterances; a stream's come from its first blocks.

    Later utterances of a stream may be longer, so one of `data.max_seconds` is added.
    """
    if data.corpus.streaming:
        batches = data.stream()
        dataset = batches.dataset
        listed: list[float] = []
        tokens: list[int] = []
        start, end = None, BlockStart(0, 0)
        while start != end and (max_utterances is None or len(tokens) < max_utterances):
            start = end
            kept, end = batches.read_block(0, start)
            listed += kept.seconds.tolist()
            tokens += dataset.num_tokens(kept).tolist()
        tokens.append(max(tokens, default=1))
        seconds = np.array([*listed, data.limits.max_seconds / dataset.longest])
    else:
        dataset = data.split("train", data.augment)
        seconds, tokens = dataset.kept.seconds, dataset.num_tokens(dataset.kept).tolist()
    longest = np.maximum(dataset.longest * seconds, SHORTEST_SECONDS)
    return np.ceil(100 * longest) / 100, np.array(tokens)


def nonempty_buckets(edges: Floats, seconds: Floats, tokens: Integers, num_ranks: int) -> list[Bucket]:
    """The buckets that hold utterances; the batch of each is one rank's share of them.

    A bucket's token limit covers TEXT_QUANTILE of its texts, and never falls from one bucket to the next.
    """
    group = np.searchsorted(edges, seconds)
    common = [np.quantile(tokens[group == i], TEXT_QUANTILE, method="higher") for i in range(len(edges))]
    most_tokens = np.maximum.accumulate([*common[:-1], tokens.max()])
    group = np.maximum(group, np.searchsorted(most_tokens, tokens))
    sizes = np.bincount(group, minlength=len(edges))
    rows = zip(edges.tolist(), most_tokens.tolist(), sizes.tolist(), strict=True)
    return [Bucket(edge, most, ceil(size / num_ranks)) for edge, most, size in rows if size]


def largest_batch(steps: TrialSteps, bucket: Bucket, budget: Budget, guess: int) -> Trial:
    """The largest batch of a bucket that fits, at most all its utterances. Raises UserError if none fits."""
    seconds, tokens, most = bucket
    try:
        best = largest(lambda number: steps.trial(seconds, tokens, number), budget.usable, most, guess)
    except OutOfMemory:
        best = Trial(0, None, steps.memory.used(), 0.0)
    if not best.utterances or best.at_rest > budget.usable:
        wrong = "the model with its gradients, the optimizer's state and the libraries takes "
        wrong += f"{best.at_rest / GB:.2f} GB, of {budget.text}"
        instead = f"write a smaller model, finetune=lora, data.keep_decoded_hours=0, {WRITE_MORE}"
        raise UserError("memory_gb", budget.memory_gb, wrong, instead)
    if best.peak is None or best.peak > budget.usable:
        wrong = f"not even one utterance of {seconds:g} s and {tokens} target tokens fits into {budget.text}"
        wrong += f": its step takes {'more' if best.peak is None else f'{best.peak / GB:.2f} GB'}"
        write = (
            f"write data.max_seconds=LESS, activation_checkpointing=true, trainer.precision=bf16-mixed, {WRITE_MORE}"
        )
        raise UserError("memory_gb", budget.memory_gb, wrong, write)
    return best


def largest(measure: Callable[[int], Trial], usable: float, most: int, guess: int) -> Trial:
    """The largest batch of at most `most` utterances that fits, to within TOLERANCE; one utterance if none fits.

    Doubles its steps away from `guess` until one batch fits and one does not, then halves the interval between them.
    Ends early at a batch that fills the memory to within TOLERANCE.
    """
    best: Trial | None = None
    number, too_large = min(max(guess, 1), most), most + 1
    step = max(1, int(TOLERANCE * number))
    while True:
        trial = measure(number)
        if trial.peak is None or trial.peak > usable:
            too_large = number
        else:
            best = trial
            if trial.peak - trial.at_rest >= (1 - TOLERANCE) * (usable - trial.at_rest):
                return best
        fitting = best.utterances if best else 0
        if too_large - fitting <= 1 + TOLERANCE * fitting:
            return best or trial
        if best is None:
            number = max(too_large - step, 1)
        elif too_large > most:
            number = min(fitting + step, most)
        else:
            number = (fitting + too_large) // 2
        step *= 2
