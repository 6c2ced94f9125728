"""The largest batch of each bucket of durations that memory holds, found by a few steps each."""

import logging
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from omegaconf import DictConfig

from sedtrain.batch import UserError, require
from sedtrain.data.batching import SHORTEST_SECONDS
from sedtrain.data.buckets import Bucket, Floats, Integers, bucket_edges
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.data.streaming import Place
from sedtrain.memory import OutOfMemory
from sedtrain.peak_memory import Memory, memory_of
from sedtrain.run import TrainingRun
from sedtrain.trial_steps import Trial, TrialSteps

logger = logging.getLogger(__name__)

MARGIN = 0.1  # of the memory, kept free: batches of many shapes leave gaps that batches of one shape do not
AIM = 0.97  # of the rest: what the next trial is to take, by a line through those before it
TOLERANCE = 0.04  # of a batch: what it may miss to the largest
GROWTH = 4  # from one trial to the next at most, since the line may be wrong
NUM_BY_LINE = 6  # trials; then the interval is halved
COMMON = 0.99  # of a bucket's texts, which stay in it; the few longer ones would make its batches small for all
SAMPLE_BYTES = 4
GB = 1e9

WRITE_MORE = "or memory_gb=MORE where there is more"


class Shape(NamedTuple):
    """What the utterances of a bucket have at most, and how many make a batch of all there are."""

    seconds: float
    tokens: int
    utterances: int


class Fitted(NamedTuple):
    """A bucket, and what a step on its batch took."""

    bucket: Bucket
    peak_gb: float
    audio_seconds_per_second: float


class Budget(NamedTuple):
    """Bytes that may be taken, and how a person is told."""

    usable: float
    told: str


def fitted_batches(cfg: DictConfig, run: TrainingRun) -> tuple[list[Fitted], Budget]:
    """The buckets, from short to long; the longest is measured first, so that what does not fit at all is told at once.

    Raises UserError where memory cannot be measured, or does not suffice.
    """
    device = run.trainer.strategy.root_device
    memory, num_ranks = memory_of(device), run.trainer.world_size
    budget = budget_of(cfg.memory_gb, memory, device.type, kept_audio(run.data) if device.type == "cpu" else 0)
    seconds, tokens = lengths(run.data, cfg.inspect_utterances)
    longest = Shape(float(seconds.max()), int(tokens.max()), ceil(len(seconds) / num_ranks))
    logger.info("measuring batches of up to %g s and %d tokens, with %s", *longest[:2], budget.told)
    steps = TrialSteps(cfg, run, memory)
    best = search(steps, longest, budget, guess=1)
    edges = bucket_edges(seconds, best.utterances * longest.seconds, run.data.num_buckets)
    shapes = shapes_of(seconds, tokens, edges, num_ranks)
    found: list[Fitted] = []
    for number, shape in enumerate(reversed(shapes), start=1):
        if found or best.utterances > shape.utterances:
            before = found[0].bucket.seconds if found else longest.seconds
            best = search(steps, shape, budget, guess=round(best.utterances * before / shape.seconds))
        found.insert(0, fitted(shape, best))
        logger.info("%s (%d of %d)", sentence(found[0]), number, len(shapes))
    return found, budget


def budget_of(memory_gb: float | None, memory: Memory, device: str, kept: float) -> Budget:
    """What steps may take: `memory_gb`, else all of a GPU; less a margin, and less what is kept beside them."""
    available = memory.available()
    if memory_gb is None and device == "cpu":
        raise UserError(
            "memory_gb=null: nobody says how much of this machine's memory training may take",
            f"memory_gb=NUMBER, for the whole process; {available / GB:.0f} are free",
        )
    require(memory_gb is None or memory_gb > 0, "memory_gb", memory_gb, "a number above 0")
    whole = available if memory_gb is None else memory_gb * GB
    if whole > available:
        raise UserError(
            f"memory_gb={memory_gb:g}: only {available / GB:.1f} GB are free", f"memory_gb={0.9 * available / GB:.0f}"
        )
    told = f"{whole / GB:.3g} GB on the {device.upper()} ({100 * MARGIN:.0f} % kept free"
    told += f", {kept / GB:.2f} GB for audio that is kept decoded)" if kept else ")"
    return Budget((1 - MARGIN) * whole - kept, told)


def kept_audio(data: SpeechTextDataModule) -> float:
    """Bytes of decoded audio that this process will keep."""
    assert data.collator is not None
    splits = [data.split("validation")]
    if not data.corpus.streaming:
        splits.append(data.split("train", data.augment))
    seconds = sum(split.total_seconds() for split in splits if split.keeps_decoded)
    return seconds * data.collator.sampling_rate * SAMPLE_BYTES


def lengths(data: SpeechTextDataModule, most: int | None) -> tuple[Floats, Integers]:
    """Seconds, rounded up, and target tokens of the training utterances; of a stream, of its first blocks.

    A stream may have others, which are as long as `data.max_seconds` at most: one such utterance is added.
    """
    seconds: list[float] = []
    tokens: list[int] = []
    if data.corpus.streaming:
        dataset, batches = data.stream(counts_tokens=True)
        place, end = None, Place(0, 0)
        while place != end and (most is None or len(seconds) < most):
            place = end
            block = batches.stream.read_block(0, place)
            seconds, tokens, end = seconds + block.seconds, tokens + (block.tokens or []), block.end
        seconds, tokens = [*seconds, data.limits.max_seconds / dataset.longest], [*tokens, max(tokens, default=1)]
    else:
        dataset = data.split("train", data.augment)
        seconds, tokens = dataset.seconds, dataset.all_num_tokens()
    longest = np.maximum(dataset.longest * np.array(seconds), SHORTEST_SECONDS)
    return np.ceil(100 * longest) / 100, np.array(tokens)


def shapes_of(seconds: Floats, tokens: Integers, edges: Floats, num_ranks: int) -> list[Shape]:
    """Of each bucket; its tokens are what nearly all its texts have at most, and no less than in the bucket before it."""
    bucket = np.searchsorted(edges, seconds)
    common = [np.quantile(tokens[bucket == i], COMMON, method="higher") for i in range(len(edges))]
    most_tokens = np.maximum.accumulate([*common[:-1], tokens.max()])
    placed = np.maximum(bucket, np.searchsorted(most_tokens, tokens))
    numbers = np.bincount(placed, minlength=len(edges))
    rows = zip(edges.tolist(), most_tokens.tolist(), numbers.tolist(), strict=True)
    return [Shape(edge, most, ceil(number / num_ranks)) for edge, most, number in rows if number]


def search(steps: TrialSteps, shape: Shape, budget: Budget, guess: int) -> Trial:
    """The largest batch of a shape that fits. Raises UserError where none does."""
    try:
        best = largest(lambda number: steps.trial(*shape[:2], number), budget.usable, shape.utterances, guess)
    except OutOfMemory as error:
        raise nothing_left(steps.memory.taken(), budget) from error
    if best.at_rest > budget.usable:
        raise nothing_left(best.at_rest, budget)
    if best.peak is None or best.peak > budget.usable:
        takes = "more" if best.peak is None else f"{best.peak / GB:.2f} GB"
        raise UserError(
            f"not even one utterance of {shape.seconds:g} s and {shape.tokens} target tokens fits into {budget.told}: "
            f"its step takes {takes}",
            f"data.max_seconds=LESS, activation_checkpointing=true, trainer.precision=bf16-mixed, {WRITE_MORE}",
        )
    return best


def nothing_left(taken: float, budget: Budget) -> UserError:
    return UserError(
        f"the model with its gradients, the optimizer's state and the libraries takes {taken / GB:.2f} GB, of {budget.told}",
        f"a smaller model, finetune=lora, data.keep_decoded_hours=0, {WRITE_MORE}",
    )


def largest(measure: Callable[[int], Trial], usable: float, most: int, guess: int) -> Trial:
    """The largest batch that was measured to fit; the trial of one utterance where not even that does."""
    trials: list[Trial] = []
    best: Trial | None = None
    high, number = most + 1, min(max(guess, 1), most)
    while True:
        trial = measure(number)
        trials.append(trial)
        if trial.peak is not None and trial.peak <= usable:
            best = trial
        else:
            high = number
        low = best.utterances if best else 0
        number = next_number(trials, low, high, usable)
        if high - low <= 1 or number - low <= TOLERANCE * low:
            return best or trial


def next_number(trials: Sequence[Trial], low: int, high: int, usable: float) -> int:
    """Between `low` utterances, which fit, and `high`, which do not: where the line through the nearest trials says."""
    points = {0: trials[-1].at_rest, **{each.utterances: each.peak for each in trials if each.peak is not None}}
    below, above = sorted(n for n in points if n <= low), sorted(n for n in points if n >= high)
    nearest = [*below[-1:], *above[:1]] if above else below[-2:]
    steepness = (points[nearest[-1]] - points[nearest[0]]) / max(nearest[-1] - nearest[0], 1)
    if len(trials) > NUM_BY_LINE or steepness <= 0:
        number = (low + high) // 2
    else:
        number = int(nearest[0] + (AIM * usable - points[nearest[0]]) / steepness)
    return max(min(number, high - 1, GROWTH * low or high - 1), low + 1)


def fitted(shape: Shape, trial: Trial) -> Fitted:
    bucket = Bucket(shape.seconds, shape.tokens, trial.utterances)
    return Fitted(bucket, (trial.peak or 0) / GB, trial.utterances * shape.seconds / trial.seconds)


def sentence(found: Fitted) -> str:
    seconds, tokens, utterances = found.bucket
    return (
        f"up to {seconds:g} s and {tokens} tokens: batches of {utterances:,}, {found.peak_gb:.2f} GB, "
        f"{found.audio_seconds_per_second:.0f} s/s"
    )


def write_batches(file: Path, found: Sequence[Fitted], budget: Budget, command: str) -> None:
    """What `data.batches` takes, with what was measured as comments."""
    rows = [
        f"- {{seconds: {each.bucket.seconds:g}, tokens: {each.bucket.tokens}, utterances: {each.bucket.utterances}}}"
        f"   # {each.peak_gb:.2f} GB, {each.audio_seconds_per_second:.0f} s/s"
        for each in found
    ]
    head = [f"# The largest batches that fit into {budget.told}", f"# {command}"]
    file.write_text("\n".join([*head, *rows]) + "\n", encoding="utf-8")
