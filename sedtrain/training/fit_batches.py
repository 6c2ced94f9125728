"""The largest batch of each bucket of durations that memory holds, found by a few steps each."""

import copy
import gc
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import lightning
import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from sedtrain.batch import Batch
from sedtrain.data.buckets import Bucket, Floats, Integers, bucket_edges
from sedtrain.data.collate import Collator
from sedtrain.data.datamodule import SpeechTextDataModule, return_freed_memory
from sedtrain.data.sampler import SHORTEST_SECONDS
from sedtrain.data.streaming import BlockStart
from sedtrain.errors import UserError, require
from sedtrain.run_dir import write_whole
from sedtrain.training.averaging import EMA
from sedtrain.training.module import OutOfMemory, SpeechSeq2SeqModule
from sedtrain.training.run import TrainingRun

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


NEW_PEAK = "5"  # what has Linux forget the peak, proc(5)


class Memory(Protocol):
    """Memory that can be measured, in bytes."""

    def available(self) -> int:
        """What this process has and could still get."""

    def forget(self) -> None:
        """Gives back what is not in use, and begins a new peak."""

    def taken(self) -> int: ...

    def peak(self) -> int:
        """The most that was taken since `forget`."""


class ProcessMemory:
    """The resident memory of this process, weights and libraries included: what Linux counts where it ends a process.

    Linux keeps the peak, so that nothing is missed between two looks. The processes that load data are not in it.
    Raises UserError where there is no such count.
    """

    def __init__(self) -> None:
        try:
            CLEAR.write_text(NEW_PEAK)
            self.taken()
        except (OSError, AttributeError) as error:
            raise UserError(
                f"task=fit_batches: this system does not count the peak of a process's memory ({error})",
                "the same command on Linux, or trainer.accelerator=cuda",
            ) from error

    def available(self) -> int:
        return kilobytes(Path("/proc/meminfo"), "MemAvailable") + self.taken()

    def forget(self) -> None:
        gc.collect()
        return_freed_memory()
        CLEAR.write_text(NEW_PEAK)

    def taken(self) -> int:
        return kilobytes(STATUS, "VmRSS")

    def peak(self) -> int:
        return kilobytes(STATUS, "VmHWM")


class GpuMemory:
    """What PyTorch has reserved of a GPU; of the rest, what other processes leave is available."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def available(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] + self.taken()

    def forget(self) -> None:
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def taken(self) -> int:
        return torch.cuda.memory_reserved(self.device)

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_reserved(self.device)


def memory_of(device: torch.device) -> Memory:
    """Raises UserError where memory cannot be measured."""
    if device.type == "cuda":
        return GpuMemory(device)
    if device.type == "cpu":
        return ProcessMemory()
    raise UserError(
        f"task=fit_batches: the memory of {device.type} cannot be measured", "trainer.accelerator=cuda or =cpu"
    )


def kilobytes(file: Path, name: str) -> int:
    """A value of a file of /proc, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", file.read_text(), re.MULTILINE)
    return int(found[1]) * 1024  # type: ignore[index]  # AttributeError would hide that there is none


SMALL_STEPS = 2  # before the one that is measured: gradients and the optimizer's state are there by then


@dataclass(frozen=True)
class Trial:
    """A step on a batch of so many utterances.

    peak:    bytes, None where memory ran out
    at_rest: bytes that were taken before the step, by weights, gradients and all the rest
    seconds: the step took
    """

    utterances: int
    peak: int | None
    at_rest: int
    seconds: float


class TrialSteps:
    """Steps as one process of the run makes them once all that is ever to move moves, with no layer left out by chance."""

    def __init__(self, run: TrainingRun, make_trainer: Callable[..., lightning.Trainer], memory: Memory) -> None:
        self.run, self.make_trainer, self.memory = run, make_trainer, memory
        run.module.scheduler = standing_still
        run.finetuning.starts = dict.fromkeys(run.finetuning.starts, 0)
        for part in (run.saved.model.encoder, run.saved.model.decoder):
            for name in part.config.to_dict():
                if name.endswith("layerdrop"):
                    setattr(part.config, name, 0.0)

    def trial(self, seconds: float, tokens: int, utterances: int) -> Trial:
        """A step on utterances of this length. Raises OutOfMemory where memory runs out even before."""
        module, collator = untouched(self.run.module), self.run.data.collator
        assert collator is not None
        module.zero_grad(set_to_none=True)
        self.memory.forget()
        steps = [noise(collator, 1.0, 2, 1)] * SMALL_STEPS + [noise(collator, seconds, tokens, utterances)]
        watch = Watch(self.memory)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # training itself says once what there is to say
                self.trainer(watch).fit(module, DataLoader(steps, batch_size=None))  # type: ignore[arg-type]
        except OutOfMemory:
            if watch.at_rest is None:
                raise
        assert watch.at_rest is not None
        return Trial(utterances, watch.peak, watch.at_rest, watch.seconds)

    def trainer(self, watch: "Watch") -> lightning.Trainer:
        """The run's own, for a few steps of one process."""
        device = self.run.trainer.strategy.root_device
        callbacks = [each for each in self.run.callbacks if isinstance(each, EMA)]
        return self.make_trainer(
            devices=1 if device.index is None else [device.index],
            num_nodes=1,
            max_steps=SMALL_STEPS + 1,
            max_epochs=None,
            max_time=None,
            limit_train_batches=None,
            limit_val_batches=0,
            val_check_interval=None,
            accumulate_grad_batches=1,
            callbacks=[*callbacks, self.run.finetuning, watch],
            default_root_dir=self.run.folder,
            logger=False,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )


class Watch(lightning.Callback):
    """What the last step took, of memory and of time."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.at_rest: int | None = None
        self.peak: int | None = None
        self.started = self.seconds = 0.0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx == SMALL_STEPS:
            self.memory.forget()
            self.at_rest, self.started = self.memory.taken(), perf_counter()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Raises UserError where the steps were without effect, so that a real one takes more."""
        if batch_idx == SMALL_STEPS:
            self.peak, self.seconds = self.memory.peak(), perf_counter() - self.started
            if not all(optimizer.state for optimizer in trainer.optimizers):
                raise UserError(
                    "task=fit_batches: no step on noise has a finite gradient, so that the optimizer never begins",
                    "trainer.precision=bf16-mixed or 32-true",
                )


def untouched(module: SpeechSeq2SeqModule) -> SpeechSeq2SeqModule:
    """The same module around the same model, to be fitted once: FSDP marks what it has cut, and refuses to cut it again."""
    twin = copy.copy(module)
    vars(twin).update({name: copy.copy(value) for name, value in vars(module).items() if isinstance(value, dict)})
    return twin


def standing_still(optimizer: Optimizer, num_training_steps: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.0)


def noise(collator: Collator, seconds: float, tokens: int, utterances: int) -> Batch:
    """Utterances of noise with texts of two tokens in turn, which CTC can align."""
    features = collator.features(0.1 * torch.randn(round(seconds * collator.sampling_rate)))
    inputs = features.expand(utterances, *features.shape).contiguous()
    special = set(collator.tokenizer.all_special_ids)
    ordinary = [id for id in range(len(collator.tokenizer)) if id not in special][:2]
    return Batch(
        inputs=inputs.transpose(1, 2) if collator.time_is_last else inputs,
        attention_mask=torch.ones(utterances, len(features), dtype=torch.long),
        labels=torch.tensor((ordinary * tokens)[:tokens]).expand(utterances, tokens).contiguous(),
        ids=["noise"] * utterances,
        texts=[""] * utterances,
        seconds=utterances * seconds,
    )


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


def fitted_batches(
    run: TrainingRun,
    make_trainer: Callable[..., lightning.Trainer],
    memory_gb: float | None,
    max_utterances: int | None,
) -> tuple[list[Fitted], Budget]:
    """The buckets, from short to long; the longest is measured first, so that what does not fit at all is told at once.

    make_trainer: makes the run's own Trainer with some arguments replaced
    memory_gb: what training may take; None: all of a GPU
    max_utterances: of a stream, how many are read for their lengths; None: all

    Raises UserError where memory cannot be measured, or does not suffice.
    """
    device = run.trainer.strategy.root_device
    memory, num_ranks = memory_of(device), run.trainer.world_size
    budget = budget_of(memory_gb, memory, device.type, kept_audio(run.data) if device.type == "cpu" else 0)
    seconds, tokens = lengths(run.data, max_utterances)
    longest = Shape(float(seconds.max()), int(tokens.max()), ceil(len(seconds) / num_ranks))
    logger.info("measuring batches of up to %g s and %d tokens, with %s", *longest[:2], budget.told)
    steps = TrialSteps(run, make_trainer, memory)
    best = search(steps, longest, budget, guess=1)
    edges = bucket_edges(seconds, best.utterances * longest.seconds, run.data.bounds.num_buckets)
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
        start, end = None, BlockStart(0, 0)
        while start != end and (most is None or len(seconds) < most):
            start = end
            block = batches.stream.read_block(0, start)
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
    write_whole(file, "\n".join([*head, *rows]) + "\n")
