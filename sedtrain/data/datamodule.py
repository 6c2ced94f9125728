"""The splits of one dataset, or of a mix of several, as Lightning's loaders of Batch."""

import ctypes
import hashlib
import os
import platform
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any, Literal, cast

import datasets
import lightning
import numpy as np
import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader

from sedtrain.batch import Batch
from sedtrain.data.augment import Augment
from sedtrain.data.buckets import buckets_of
from sedtrain.data.collate import Collator
from sedtrain.data.corpus import Corpus, Parts, learnt_pairs, refuse_unlearnt, sources_of
from sedtrain.data.dataset import SplitDataset
from sedtrain.data.sampler import BatchesWithEpoch, DurationBatches, Position
from sedtrain.data.skipped import SkippedUtterances
from sedtrain.data.streaming import Stream, StreamedBatches
from sedtrain.data.utterances import Limits
from sedtrain.errors import UserError, require


def return_freed_memory() -> None:
    """Hands what this process has freed back to Linux; the C library would keep it, in gaps that larger tensors do not fit.

    Training on batches of many shapes takes half as much again without it.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


TO_TRAINING = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


LOOK_EVERY_SECONDS = 0.2


class Loader(DataLoader[Batch]):
    """A DataLoader whose workers begin with SIGTERM blocked, and so do the threads that libraries start in them."""

    def __iter__(self) -> Any:
        with sigterm_blocked():
            return super().__iter__()


@contextmanager
def sigterm_blocked() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(worker_id: int) -> None:
    """What a DataLoader's worker does first."""
    pl_worker_init_function(worker_id)
    for each in TO_TRAINING:
        signal.signal(each, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # in a thread that does not block it
        Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


def end_with(parent: int) -> None:
    """Ends the process at the SIGTERM of its parent, by which a DataLoader ends workers that are stuck, and after its death.

    A worker holds the connections of its parent open, so that other ranks would not learn of that death before.
    """
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, LOOK_EVERY_SECONDS)
        if received and received.si_pid == parent:
            break
    os._exit(0)


def copies_of(folder: str) -> Path:
    """Where a run keeps what it has fetched of streams; each machine makes and removes its own."""
    run_key = hashlib.sha256(f"{platform.node()} {Path(folder).absolute()}".encode()).hexdigest()[:16]
    return Path(datasets.config.HF_DATASETS_CACHE) / "sedtrain" / "streams" / run_key


class SpeechTextDataModule(lightning.LightningDataModule):
    """Loads, filters and batches the splits of one dataset, or of several.

    `collator` (features, labels, padding) is handed over by `build` before the first loader is asked for.

    path, name: `spoken_digits`, a file, a folder, a pattern of files, a URL or a Hub id; the Hub's name of a configuration
    columns: which column holds audio, transcription, translation, and where they exist id, speaker, language, seconds,
        and for a part of a long recording start and end, or start and seconds
    audio_folder: where relative paths of audio files begin, which must not leave it; else the folder of `path`
    target: which of the columns transcription and translation is the text to learn
    language: of the texts that have no column of it
    tags: whether targets begin with tokens of language and task, such as <|de|><|translate|>; once trained, a model knows
    mix: several datasets by name, each with what it does not share with the others: path, name, columns, audio_folder,
        target, language, names of splits (null: it has none), and `weight`, how often an epoch sees its training split
    temperature: shares of the datasets in an epoch are as size ** (1 / temperature); at 1 each utterance is seen once
    streaming: training reads shard after shard; nothing is read, fetched or converted before it is needed
    block_utterances: of a stream, how many are shuffled and batched together
    batch_seconds, batch_tokens: audio and, if given, target tokens per batch and rank, padding included
    num_buckets: of utterances of similar length; a batch is of one of them
    batches: instead of these three, in training: a file of task=fit_batches, or what stands in it; a list of buckets, each
        with the `seconds` and target `tokens` that its utterances have at most, and how many `utterances` make a batch
    min_seconds, max_seconds: shorter and longer utterances are skipped
    keep_decoded_hours: without workers, a split of at most so many hours is decoded once and kept in memory (230 MB an
        hour); workers decode anew, or each would keep a copy
    min_characters, max_characters: utterances with shorter and longer texts are skipped
    on_bad_utterance: `skip` counts them, lists them in `skipped.jsonl` and goes on; `error` stops at the first
    max_bad_fraction: where more of a split is skipped, of 100 utterances at least, training stops: dirt is rarely so much,
        while a wrong column or folder is at once; what is shorter or longer than the limits does not count
    """

    def __init__(
        self,
        path: str | None,
        columns: Mapping[str, str | None],
        target: Literal["transcription", "translation"] = "transcription",
        name: str | None = None,
        audio_folder: str | None = None,
        train_split: str = "train",
        validation_split: str = "validation",
        test_split: str = "test",
        language: str | None = None,
        tags: bool = False,
        mix: Mapping[str, Mapping[str, Any]] | None = None,
        temperature: float = 1.0,
        streaming: bool = False,
        block_utterances: int = 4096,
        batch_seconds: float = 24.0,
        batch_tokens: int | None = None,
        num_buckets: int = 30,
        batches: str | Sequence[Mapping[str, float]] | None = None,
        min_seconds: float = 0.05,
        max_seconds: float = 30.0,
        min_characters: int = 1,
        max_characters: int = 10_000,
        keep_decoded_hours: float = 2.0,
        on_bad_utterance: Literal["skip", "error"] = "skip",
        max_bad_fraction: float = 0.1,
        num_workers: int = 0,
        seed: int = 0,
        folder: str = ".",
    ) -> None:
        super().__init__()
        require(batch_seconds > 0, "data.batch_seconds", batch_seconds, "a number above 0")
        require(
            batch_tokens is None or batch_tokens > 0, "data.batch_tokens", batch_tokens, "a number above 0, or null"
        )
        require(num_buckets >= 1, "data.num_buckets", num_buckets, "1 or more")
        require(block_utterances >= 1, "data.block_utterances", block_utterances, "1 or more")
        require(temperature > 0, "data.temperature", temperature, "a number above 0")
        require(0 <= max_bad_fraction <= 1, "data.max_bad_fraction", max_bad_fraction, "a fraction from 0 to 1")
        require(keep_decoded_hours >= 0, "data.keep_decoded_hours", keep_decoded_hours, "0 or more")
        require(num_workers >= 0, "data.num_workers", num_workers, "0 or more")
        splits = {"train_split": train_split, "validation_split": validation_split, "test_split": test_split}
        common = {"path": path, "name": name, "columns": columns, "audio_folder": audio_folder}
        sources = sources_of(mix, {**common, **splits, "target": target, "language": language})
        if streaming and temperature != 1:
            raise UserError(
                f"data.temperature={temperature}: nobody knows how large streamed datasets are",
                "data.mix.NAME.weight of each dataset, or data.streaming=false",
            )
        self.tags, self.block_utterances = tags, block_utterances
        self.batch_seconds, self.batch_tokens, self.num_buckets = batch_seconds, batch_tokens, num_buckets
        self.buckets = None if batches is None else buckets_of(batches)
        self.keep_decoded_hours, self.num_workers, self.seed = keep_decoded_hours, num_workers, seed
        self.skipped = SkippedUtterances(Path(folder) / "skipped.jsonl", on_bad_utterance, max_bad_fraction)
        self.limits = Limits(min_seconds, max_seconds, min_characters, max_characters)
        self.corpus = Corpus(sources, self.limits, self.skipped, temperature, streaming, copies_of(folder))
        self.position: Position | None = None
        self.train_batches: BatchesWithEpoch | StreamedBatches | None = None
        self.collator: Collator | None = None
        self.augment: Augment | None = None
        self.split = cache(self.load_split)

    def load_split(self, split: str, augment: Augment | None = None) -> SplitDataset:
        assert self.collator is not None, "build hands the collator over"
        return SplitDataset(
            self.corpus.parts(split),
            self.corpus.kept(split),
            self.collator,
            0 if self.num_workers else self.keep_decoded_hours,
            augment,
            self.limits.max_seconds,
        )

    def batches_of(self, dataset: SplitDataset, *, shuffle: bool, over_ranks: bool) -> BatchesWithEpoch:
        """The batches of the whole split, or with `over_ranks` this rank's, bounded for audio as long as it may get.

        Those that train, which are shuffled, are cut by `data.batches` where it is given.
        """
        trainer = self.trainer if over_ranks else None
        buckets = self.buckets if shuffle else None
        batches = DurationBatches(
            dataset.longest * np.array(dataset.seconds),
            self.batch_seconds,
            shuffle=shuffle,
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            num_ranks=trainer.world_size if trainer else 1,
            tokens=dataset.all_num_tokens() if buckets or self.batch_tokens else None,
            batch_tokens=self.batch_tokens,
            num_buckets=self.num_buckets,
            buckets=buckets,
        )
        return BatchesWithEpoch(batches, dataset.references)

    def stream(self, counts_tokens: bool) -> tuple[SplitDataset, StreamedBatches]:
        """This rank's batches of a training corpus that is streamed, or whose epochs differ."""
        assert self.collator is not None, "build hands the collator over"
        num_rows = self.block_utterances if self.corpus.streaming else None
        if num_rows is None:
            dataset = self.split("train", self.augment)
        else:
            parts = Parts(self.corpus.shards(), 2 * num_rows)
            dataset = SplitDataset(parts, {}, self.collator, 0, self.augment, self.limits.max_seconds)
        stream = Stream(dataset, self.corpus, num_rows, self.seed, counts_tokens=counts_tokens)
        return dataset, StreamedBatches(
            stream,
            self.batch_seconds,
            self.batch_tokens,
            self.num_buckets,
            self.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            num_ranks=self.trainer.world_size if self.trainer else 1,
            buckets=self.buckets,
        )

    def batch_sizes(self) -> str:
        """For people: what a training batch holds."""
        if self.buckets is None:
            return f"{self.batch_seconds:g} s of audio"
        sizes = [bucket.utterances for bucket in self.buckets]
        return f"{min(sizes):,} to {max(sizes):,} utterances, by {len(sizes)} buckets of data.batches"

    def loader(self, dataset: SplitDataset, batches: BatchesWithEpoch | StreamedBatches) -> DataLoader[Batch]:
        return Loader(
            dataset,
            batch_size=None,
            sampler=batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # else every new iterator would draw from the one that dropout draws from
        )

    def batches(self, split: str) -> Iterator[Batch]:
        """The whole split; what cannot be read is noted."""
        dataset = self.split(split)
        return_freed_memory()
        for batch in self.loader(dataset, self.batches_of(dataset, shuffle=False, over_ranks=False)):
            self.skipped.decoded(split, len(batch) + len(batch.skipped), batch.skipped)
            yield batch

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Notes what could not be decoded; all ranks come here equally often.

        On a CPU, batches that were measured find the memory as it was then: without what those before them have freed.
        """
        if self.buckets is not None and self.trainer and self.trainer.strategy.root_device.type == "cpu":
            return_freed_memory()
        split = "train" if self.trainer is None or self.trainer.training else "validation"
        over_ranks = self.over_ranks if self.trainer and self.trainer.world_size > 1 else None
        self.skipped.decoded(split, len(batch) + len(batch.skipped), batch.skipped, over_ranks)
        return batch

    def over_ranks(self, numbers: list[int]) -> list[int]:
        """Their sums over all ranks."""
        assert self.trainer is not None
        here = torch.tensor(numbers, device=self.trainer.strategy.root_device)
        summed: torch.Tensor = self.trainer.strategy.reduce(here, reduce_op="sum")
        return summed.tolist()

    def train_dataloader(self) -> DataLoader[Batch]:
        batches: BatchesWithEpoch | StreamedBatches
        if self.corpus.has_length():
            dataset = self.split("train", self.augment)
            batches = self.batches_of(dataset, shuffle=True, over_ranks=True)
        else:
            dataset, batches = self.stream(counts_tokens=bool(self.buckets or self.batch_tokens))
        if self.trainer:
            batches.set_epoch(self.trainer.current_epoch)  # workers fetch before Lightning says it
        if self.position and self.position["epoch"] >= batches.epoch:
            batches.load_state_dict(self.position)
        self.train_batches = batches
        return self.loader(dataset, batches)

    def val_dataloader(self) -> DataLoader[Batch]:
        dataset = self.split("validation")
        return self.loader(dataset, self.batches_of(dataset, shuffle=False, over_ranks=True))

    def state_dict(self) -> dict[str, Any]:
        """Where training stands in the data: positions and seeds, no samples."""
        if self.train_batches is None or self.trainer is None:
            return {}
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        return dict(self.train_batches.state_dict(done))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = cast(Position, state_dict) if state_dict else None

    def learnt_pairs(self) -> set[tuple[str, str]]:
        """Languages and tasks of the training texts. Raises UserError where nothing says the language."""
        return learnt_pairs(self.corpus)

    def refuse_unlearnt(self, splits: Iterable[str]) -> None:
        """Raises UserError where a split asks a model with tags for what it never learnt to write."""
        if self.collator is not None and self.collator.tags is not None:
            refuse_unlearnt(self.corpus, splits, self.collator.tags)

    def texts(self, split: str) -> Iterator[str]:
        """All target texts of train, validation or test."""
        return self.corpus.texts(split)
