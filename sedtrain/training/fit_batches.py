"""Finds the largest batch of each bucket of durations that fits into memory, by steps on noise with the run's own Trainer."""

import copy
import gc
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from lightning import Callback, Trainer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from sedtrain.batch import Batch
from sedtrain.data.buckets import Bucket, Floats, Integers, bucket_edges
from sedtrain.data.collate import Collator
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.data.memory import return_freed_memory
from sedtrain.data.sampler import SHORTEST_SECONDS
from sedtrain.data.streaming import BlockStart
from sedtrain.errors import UserError
from sedtrain.ranges import Positive
from sedtrain.run_dir import write_whole
from sedtrain.training.averaging import EMA
from sedtrain.training.module import OutOfMemory, SpeechSeq2SeqModule
from sedtrain.training.run import TrainingRun

logger = logging.getLogger(__name__)

MARGIN = 0.1  # fraction of memory that is kept free: batches of many shapes leave gaps that batches of one shape do not
TOLERANCE = 0.05  # the largest batch that fits may be larger than the one that is found by this fraction
COMMON = 0.99  # fraction of a bucket's texts that its tokens hold: few longer ones would make its batches small for all
SMALL_STEPS = 2  # before the step that is measured: they make the gradients and the optimizer's state
SAMPLE_BYTES = 4
GB = 1e9
WRITE_MORE = "or memory_gb=MORE where there is more"
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
NEW_PEAK = "5"  # has Linux reset the peak, proc(5)


class ProcessMemory:
    """The resident memory of this process in bytes, weights and libraries included: Linux ends a process by this count.

    Linux keeps the peak, so that none is missed. Processes that load data are not counted.
    Raises UserError where there is no such count.
    """

    def __init__(self) -> None:
        try:
            CLEAR.write_text(NEW_PEAK)
            self.taken()
        except (OSError, IndexError) as error:
            wrong = f"this system does not count the peak of a process's memory ({error})"
            instead = "write the same command on Linux, or trainer.accelerator=cuda"
            raise UserError("task", "fit_batches", wrong, instead) from error

    def available(self) -> int:
        """Bytes that this process has or could still get."""
        return kilobytes(Path("/proc/meminfo"), "MemAvailable") + self.taken()

    def reset(self) -> None:
        """Gives back unused memory and starts a new peak."""
        gc.collect()
        return_freed_memory()
        CLEAR.write_text(NEW_PEAK)

    def taken(self) -> int:
        return kilobytes(STATUS, "VmRSS")

    def peak(self) -> int:
        return kilobytes(STATUS, "VmHWM")


class GpuMemory:
    """The bytes of a GPU that PyTorch has reserved; what other processes do not use is available."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def available(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] + self.taken()

    def reset(self) -> None:
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def taken(self) -> int:
        return torch.cuda.memory_reserved(self.device)

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_reserved(self.device)


def kilobytes(file: Path, name: str) -> int:
    """A value of a file of /proc, in bytes."""
    return 1024 * int(re.findall(rf"^{name}:\s+(\d+) kB$", file.read_text(), re.MULTILINE)[0])


Memory = ProcessMemory | GpuMemory


def memory_of(device: torch.device) -> Memory:
    """Raises UserError where memory cannot be measured."""
    if device.type not in ("cpu", "cuda"):
        instead = "write trainer.accelerator=cuda or trainer.accelerator=cpu"
        raise UserError("trainer.accelerator", device.type, "its memory cannot be measured", instead)
    return ProcessMemory() if device.type == "cpu" else GpuMemory(device)


class Budget(NamedTuple):
    """Bytes that a step may take, the `memory_gb` they come from, and both as text."""

    usable: float
    memory_gb: float | None
    text: str


class Trial(NamedTuple):
    """A measured step on a batch of so many utterances.

    peak:    bytes, None where memory ran out
    at_rest: bytes before the step: weights, gradients and all the rest
    seconds: duration of the step
    """

    utterances: int
    peak: int | None
    at_rest: int
    seconds: float


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
    """The largest batch of each bucket, from short to long; the longest is measured first, since it may not fit at all.

    make_trainer: makes the run's own Trainer with some arguments replaced
    memory_gb: what training may take; None: all of a GPU
    max_utterances: of a stream, how many are read for their lengths; None: all

    Raises UserError where memory cannot be measured, or does not suffice.
    """
    device, num_ranks = run.trainer.strategy.root_device, run.trainer.world_size
    memory = memory_of(device)
    budget = budget_of(memory_gb, memory, device.type, kept_audio(run.data) if device.type == "cpu" else 0)
    seconds, tokens = lengths(run.data, max_utterances)
    longest = Bucket(float(seconds.max()), int(tokens.max()), ceil(len(seconds) / num_ranks))
    logger.info("measuring batches of up to %g s and %d tokens, with %s", longest.seconds, longest.tokens, budget.text)
    steps = TrialSteps(run, make_trainer, memory)
    best, measured = search(steps, longest, budget, guess=1), longest.seconds
    edges = bucket_edges(seconds, best.utterances * measured, run.data.bounds.num_buckets)
    buckets = filled(edges, seconds, tokens, num_ranks)
    found: list[Fitted] = []
    for number, bucket in enumerate(reversed(buckets), start=1):
        if found or best.utterances > bucket.utterances:
            best = search(steps, bucket, budget, guess=round(best.utterances * measured / bucket.seconds))
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


def budget_of(memory_gb: float | None, memory: Memory, device: str, kept: float) -> Budget:
    """Memory that steps may take: `memory_gb`, else all of a GPU, less MARGIN and the bytes `kept` beside them."""
    available = memory.available()
    if memory_gb is None and device == "cpu":
        wrong = "nothing says how much memory training may take"
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
    """Bytes of decoded audio that this process will keep."""
    assert data.collator is not None
    splits = [data.split("validation")]
    if not data.corpus.streaming:
        splits.append(data.split("train", data.augment))
    seconds = sum(split.total_seconds() for split in splits if split.keeps_decoded)
    return seconds * data.collator.sampling_rate * SAMPLE_BYTES


def lengths(data: SpeechTextDataModule, max_utterances: int | None) -> tuple[Floats, Integers]:
    """Seconds, rounded up, and target tokens of the training utterances; of a stream, of its first blocks.

    Later utterances of a stream may last up to `data.max_seconds`: one of that length is added.
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


def filled(edges: Floats, seconds: Floats, tokens: Integers, num_ranks: int) -> list[Bucket]:
    """The buckets up to `edges` that hold utterances, and all their utterances on one rank as one batch.

    The tokens of a bucket hold nearly all its texts, and are no fewer than those of the bucket before it.
    """
    group = np.searchsorted(edges, seconds)
    common = [np.quantile(tokens[group == i], COMMON, method="higher") for i in range(len(edges))]
    most_tokens = np.maximum.accumulate([*common[:-1], tokens.max()])
    group = np.maximum(group, np.searchsorted(most_tokens, tokens))
    sizes = np.bincount(group, minlength=len(edges))
    rows = zip(edges.tolist(), most_tokens.tolist(), sizes.tolist(), strict=True)
    return [Bucket(edge, most, ceil(size / num_ranks)) for edge, most, size in rows if size]


def search(steps: "TrialSteps", bucket: Bucket, budget: Budget, guess: int) -> Trial:
    """The largest batch of a bucket that fits, of at most its utterances. Raises UserError where none does."""
    seconds, tokens, most = bucket
    try:
        best = largest(lambda number: steps.trial(seconds, tokens, number), budget.usable, most, guess)
    except OutOfMemory:
        best = Trial(0, None, steps.memory.taken(), 0.0)
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
    """The largest batch of at most `most` utterances that fits, to within TOLERANCE; one utterance where none fits.

    Steps away from `guess` double until one batch fits and another does not; then the interval between them is halved.
    Ends early where a batch fills the memory to within TOLERANCE.
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


class TrialSteps(Callback):
    """Steps as one process of the run makes them once every layer trains, with no layer dropped by chance."""

    def __init__(self, run: TrainingRun, make_trainer: Callable[..., Trainer], memory: Memory) -> None:
        self.run, self.make_trainer, self.memory = run, make_trainer, memory
        self.at_rest: int | None = None
        self.peak: int | None = None
        self.started = self.seconds = 0.0
        run.module.scheduler = lambda optimizer, num_training_steps: LambdaLR(optimizer, lambda step: 0.0)
        run.finetuning.starts = dict.fromkeys(run.finetuning.starts, 0)
        for component in (run.saved.model.encoder, run.saved.model.decoder):
            for name in component.config.to_dict():
                if name.endswith("layerdrop"):
                    setattr(component.config, name, 0.0)

    def trial(self, seconds: float, tokens: int, utterances: int) -> Trial:
        """Measures a step on utterances of this length. Raises OutOfMemory where memory runs out even before it."""
        module, collator = unsharded(self.run.module), self.run.data.collator
        assert collator is not None
        module.zero_grad(set_to_none=True)
        self.memory.reset()
        self.at_rest = self.peak = None
        batches = [noise(collator, 1.0, 2, 1)] * SMALL_STEPS + [noise(collator, seconds, tokens, utterances)]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # training itself shows them once
                self.trainer().fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
        except OutOfMemory:
            if self.at_rest is None:
                raise
        assert self.at_rest is not None
        return Trial(utterances, self.peak, self.at_rest, self.seconds)

    def trainer(self) -> Trainer:
        """The run's own Trainer, for a few steps of one process."""
        device = self.run.trainer.strategy.root_device
        return self.make_trainer(
            devices=1 if device.index is None else [device.index],
            num_nodes=1,
            fast_dev_run=SMALL_STEPS + 1,
            max_time=None,
            accumulate_grad_batches=1,
            callbacks=[*self.run.callbacks(EMA), self.run.finetuning, self],
            default_root_dir=self.run.folder,
            logger=False,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: object, batch: Batch, batch_idx: int) -> None:
        if batch_idx == SMALL_STEPS:
            self.memory.reset()
            self.at_rest, self.started = self.memory.taken(), perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: object, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Raises UserError where the optimizer skipped the steps; a real step takes more memory."""
        if batch_idx == SMALL_STEPS:
            self.peak, self.seconds = self.memory.peak(), perf_counter() - self.started
            if not all(optimizer.state for optimizer in trainer.optimizers):
                wrong = "no step on noise has a finite gradient, so that the optimizer never begins"
                write = "write trainer.precision=bf16-mixed or 32-true"
                raise UserError("trainer.precision", trainer.precision, wrong, write)


def unsharded(module: SpeechSeq2SeqModule) -> SpeechSeq2SeqModule:
    """A copy of the module around the same model, for one fit: FSDP marks a module, and refuses to shard it again."""
    twin = copy.copy(module)
    vars(twin).update({name: copy.copy(value) for name, value in vars(module).items() if isinstance(value, dict)})
    return twin


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
