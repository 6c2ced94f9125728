"""Builds Lightning's data loaders for the splits of one dataset or of a mix of datasets."""

import hashlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from math import inf
from pathlib import Path
from typing import Any, Literal, cast

import lightning
import numpy as np
import torch

from sedtrain.annotations import checked
from sedtrain.batch import Batch, Skipped, Utterance
from sedtrain.data.augment import Augment
from sedtrain.data.buckets import Bounds
from sedtrain.data.collate import Collator
from sedtrain.data.corpus import Corpus
from sedtrain.data.dataset import BatchesWithEpoch, SplitDataset
from sedtrain.data.limits import Limits
from sedtrain.data.memory import return_freed_memory
from sedtrain.data.readers import cache_folder
from sedtrain.data.sampler import Position
from sedtrain.data.skipped import SkippedUtterances
from sedtrain.data.source import sources_of
from sedtrain.data.streaming import StreamedBatches
from sedtrain.data.workers import Loader, start_worker, usual_workers
from sedtrain.errors import UserError
from sedtrain.ranges import Count, CountOrZero, Fraction, NonNegative, Positive, UpTo1000, UpTo1000OrZero

BATCHES_UNTIL_ROOM = 8


class SpeechTextDataModule(lightning.LightningDataModule):
    """Loads, filters and batches the splits of one dataset, or of several.

    `build` sets `collator` (features, labels, padding) before it asks for the first loader.

    conf/data_settings.yaml explains the options and their units.

    columns: the columns of audio, transcription and translation; if they exist, also of id, speaker, language and
        seconds; for segments of long recordings, of start and end, or of start and seconds
    mix: several datasets by name, each with its `weight` and the options that differ from the common ones
    batches: replaces batch_seconds, batch_tokens and num_buckets: a file that task=fit_batches wrote, or a list of
        buckets. A bucket gives the most `seconds` and target `tokens` of an utterance, and the `utterances` of a batch
    folder: the folder of the run, where `skipped.jsonl` is written
    """

    @checked("data.")
    def __init__(
        self,
        path: str | None,
        columns: Mapping[str, str | None],
        target: Literal["transcription", "translation"] = "transcription",
        name: str | None = None,
        format: str | None = None,
        audio_folder: str | None = None,
        train_split: str = "train",
        validation_split: str = "validation",
        test_split: str = "test",
        language: str | None = None,
        tags: bool = False,
        mix: Mapping[str, Mapping[str, Any]] | None = None,
        temperature: Positive = 1.0,
        streaming: bool = False,
        block_utterances: Count = 4096,
        batch_seconds: Positive = 24.0,
        batch_tokens: Count | None = None,
        num_buckets: UpTo1000 = 30,
        batches: str | Sequence[Mapping[str, float]] | None = None,
        min_seconds: NonNegative = 0.05,
        max_seconds: Positive = 30.0,
        min_characters: CountOrZero = 1,
        max_characters: Count = 10_000,
        keep_decoded_hours: NonNegative = 2.0,
        cache_features: bool = False,
        cache_gb: Positive = 50.0,
        on_bad_utterance: Literal["skip", "error"] = "skip",
        max_bad_fraction: Fraction = 0.1,
        num_workers: UpTo1000OrZero | None = None,
        seed: int = 0,
        folder: str = ".",
    ) -> None:
        super().__init__()
        splits = {"train_split": train_split, "validation_split": validation_split, "test_split": test_split}
        common = {"path": path, "name": name, "format": format, "columns": columns, "audio_folder": audio_folder}
        sources = sources_of(mix, {**common, **splits, "target": target, "language": language})
        if streaming and temperature != 1:
            wrong = "the sizes of streamed datasets, which it needs, are not known"
            write = "write data.mix.NAME.weight of each dataset, or data.streaming=false"
            raise UserError("data.temperature", temperature, wrong, write)
        self.tags = tags
        self.bounds = Bounds.of(batch_seconds, batch_tokens, num_buckets, batches)
        self.num_workers = usual_workers() if num_workers is None else num_workers
        self.keep_decoded_hours, self.seed = keep_decoded_hours, seed
        self.cache_features, self.cache_gb = cache_features, cache_gb
        self.skipped = SkippedUtterances(Path(folder) / "skipped.jsonl", on_bad_utterance, max_bad_fraction)
        self.limits = Limits(min_seconds, max_seconds, min_characters, max_characters)
        run_key = hashlib.sha256(f"{platform.node()} {Path(folder).absolute()}".encode()).hexdigest()[:16]
        copies = cache_folder("streams") / run_key  # each machine makes and removes its own
        block_rows = block_utterances if streaming else None
        self.corpus = Corpus(sources, self.limits, self.skipped, temperature, block_rows, copies, batch_seconds)
        self.num_batches = 0  # loaded so far in this process
        self.position: Position | None = None
        self.train_batches: BatchesWithEpoch | StreamedBatches | None = None
        self.collator: Collator | None = None
        self.augment: Augment | None = None
        self.kept_split = cache(self.load_split)

    def texts(self, split: str) -> Iterator[str]:
        return self.corpus.texts(split)

    def split(self, split: str, augment: Augment | None = None) -> SplitDataset:
        """The rows of a split, loaded once and kept."""
        return self.kept_split(split, augment)

    def load_split(self, split: str, augment: Augment | None = None) -> SplitDataset:
        assert self.collator is not None, "build hands the collator over"
        return SplitDataset(
            self.corpus.parts(split),
            None if self.corpus.is_streamed(split) else self.corpus.kept(split),
            self.collator,
            0 if self.num_workers else self.keep_decoded_hours,
            augment,
            self.corpus.limits_of(split),
            is_scored=split != "train",
        )

    def batches_of(
        self, dataset: SplitDataset, *, shuffle: bool, over_ranks: bool, most: float = inf
    ) -> BatchesWithEpoch:
        """Batches of a split; with `over_ranks`, only the batches of this rank.

        most: leaves out longer utterances, in seconds
        """
        kept = dataset.kept
        if most < inf:
            kept = kept[np.round(kept.seconds, 2) <= most]
        rank, num_ranks = self.own_rank() if over_ranks else (0, 1)
        return BatchesWithEpoch(
            dataset, kept, self.bounds, shuffle=shuffle, seed=self.seed, rank=rank, num_ranks=num_ranks
        )

    def own_rank(self) -> tuple[int, int]:
        """This rank and the number of ranks."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def stream(self) -> StreamedBatches:
        """This rank's batches of a training corpus that is streamed, or that differs between epochs."""
        dataset = self.split("train", self.augment)
        return StreamedBatches(dataset, self.corpus, self.bounds, self.seed, *self.own_rank())

    def batch_sizes(self) -> str:
        """The size of training batches as text."""
        if self.bounds.buckets is None:
            each = (
                f", {self.collator.max_seconds:g} s for each utterance" if self.collator and self.collator.pads else ""
            )
            return f"{self.bounds.batch_seconds:g} s of audio{each}"
        sizes = [bucket.utterances for bucket in self.bounds.buckets]
        return f"{min(sizes):,} to {max(sizes):,} utterances, by {len(sizes)} buckets of data.batches"

    def loader(self, batches: BatchesWithEpoch | StreamedBatches) -> Loader:
        return Loader(
            batches.dataset,
            batch_size=None,
            sampler=batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # else every new iterator would advance the global generator, which dropout uses
        )

    def batches(self, split: str, most: float = inf) -> Iterator[Batch]:
        """Yields all batches of a split, on any rank; notes the utterances that cannot be read.

        most: leaves longer utterances, in seconds, to `long_utterances`
        """
        for batch in self.loader(self.batches_of(self.split(split), shuffle=False, over_ranks=False, most=most)):
            self.skipped.note_decoded(split, len(batch) + len(batch.skipped), batch.skipped)
            self.make_room()
            yield batch

    def make_room(self, at_once: bool = False) -> None:
        """Returns freed memory every few batches; else batches of many shapes leave half of all memory unused in 500 steps."""
        self.num_batches += 1
        if at_once or self.num_batches % BATCHES_UNTIL_ROOM == 0:
            return_freed_memory()

    def long_utterances(self, split: str, most: float) -> Iterator[Utterance]:
        """Yields the utterances of a split that are longer than `most` seconds; notes the unreadable ones."""
        dataset = self.split(split)
        for part, row, _ in dataset.kept[np.round(dataset.kept.seconds, 2) > most].tolist():
            found = dataset.decode((part, row), of_any_length=True)
            self.skipped.note_decoded(split, 1, [found] if isinstance(found, Skipped) else [])
            if isinstance(found, Utterance):
                yield found

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Notes utterances that could not be decoded; all ranks call it equally often.

        On a CPU, measured batches need the memory that was free when they were measured. So freed memory is returned
        before each of them.
        """
        if self.trainer and self.trainer.strategy.root_device.type == "cpu":
            self.make_room(at_once=self.bounds.buckets is not None)
        split = "train" if self.trainer is None or self.trainer.training else "validation"
        over_ranks = self.over_ranks if self.trainer and self.trainer.world_size > 1 else None
        self.skipped.note_decoded(split, len(batch) + len(batch.skipped), batch.skipped, over_ranks)
        return batch

    def over_ranks(self, numbers: list[int]) -> list[int]:
        """The sums of numbers over all ranks."""
        assert self.trainer is not None
        own = torch.tensor(numbers, device=self.trainer.strategy.root_device)
        summed: torch.Tensor = self.trainer.strategy.reduce(own, reduce_op="sum")
        return summed.tolist()

    def train_dataloader(self) -> Loader:
        batches: BatchesWithEpoch | StreamedBatches
        if self.corpus.has_length():
            batches = self.batches_of(self.split("train", self.augment), shuffle=True, over_ranks=True)
        else:
            batches = self.stream()
        if self.trainer:
            batches.set_epoch(self.trainer.current_epoch)  # workers fetch batches before Lightning sets the epoch
        if self.position and self.position["epoch"] >= batches.epoch:
            batches.load_state_dict(self.position)
        self.train_batches = batches
        return self.loader(batches)

    def val_dataloader(self) -> Loader:
        return self.loader(self.batches_of(self.split("validation"), shuffle=False, over_ranks=True))

    def state_dict(self) -> dict[str, Any]:
        """The position of training in the data: only numbers and seeds, no audio."""
        if self.train_batches is None or self.trainer is None:
            return {}
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        return dict(self.train_batches.state_dict(done))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = cast(Position, state_dict) if state_dict else None
