"""The splits of one dataset as Lightning's loaders of Batch."""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Literal

import lightning
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from sedtrain.batch import Batch, Skipped, UserError, Utterance
from sedtrain.data.batching import DurationBatches
from sedtrain.data.collate import Collator
from sedtrain.data.sources import UNREADABLE, Columns, UtteranceRows, load_rows

logger = logging.getLogger(__name__)


class SplitDataset(Dataset[Batch]):
    """The utterances of one split that are not too long, too short or without text; item `[i, j, ...]` is a Batch."""

    def __init__(
        self,
        rows: UtteranceRows,
        kept: Mapping[int, float],
        collator: Collator,
        keep_decoded_hours: float,
    ) -> None:
        self.rows, self.collator = rows, collator
        self.indices, self.seconds = list(kept), list(kept.values())
        self.keeps_decoded = self.total_seconds() <= 3600 * keep_decoded_hours
        self.decoded: dict[int, Utterance | Skipped] = {}

    def __len__(self) -> int:
        return len(self.indices)

    def total_seconds(self) -> float:
        return sum(self.seconds)

    def __getitem__(self, numbers: list[int]) -> Batch:
        read = [self.read(self.indices[number]) for number in numbers]
        return self.collator(
            [result for result in read if isinstance(result, Utterance)],
            [result for result in read if isinstance(result, Skipped)],
        )

    def audio_of(self, id: str) -> tuple[NDArray[np.float32], int]:
        """The decoded samples (S,) of an utterance and their rate."""
        utterance = self.rows.utterance(self.rows.index_of[id], self.collator.sampling_rate)
        return utterance.audio.numpy(), utterance.sampling_rate

    def read(self, index: int) -> Utterance | Skipped:
        if not self.keeps_decoded:
            return self.decode(index)
        if index not in self.decoded:
            self.decoded[index] = self.decode(index)
        return self.decoded[index]

    def decode(self, index: int) -> Utterance | Skipped:
        """In a worker an error would lose its class, so audio that cannot be decoded is a value."""
        try:
            return self.rows.utterance(index, self.collator.sampling_rate)
        except UNREADABLE as error:
            return Skipped(self.rows.id(index), "undecodable audio", getattr(error, "error_string", str(error)))


class SpeechTextDataModule(lightning.LightningDataModule):
    """Loads, filters and batches the splits of one dataset.

    `collator` (features, labels, padding) is handed over by `build` before the first loader is asked for.

    path, name: `spoken_digits`, a file, a folder or a Hub id; the Hub's name of a configuration
    columns: which column holds audio, transcription, translation, and where they exist id, speaker, language, seconds
    target: which of the columns transcription and translation is the text to learn
    batch_seconds: audio per batch and rank, padding included
    min_seconds, max_seconds: shorter and longer utterances are skipped
    keep_decoded_hours: a split of at most so many hours is decoded once and kept in memory (230 MB an hour)
    on_bad_utterance: `skip` counts them, lists them in `skipped.jsonl` and goes on; `error` stops at the first
    """

    def __init__(
        self,
        path: str,
        columns: Mapping[str, str | None],
        target: Literal["transcription", "translation"] = "transcription",
        name: str | None = None,
        train_split: str = "train",
        validation_split: str = "validation",
        test_split: str = "test",
        batch_seconds: float = 24.0,
        min_seconds: float = 0.05,
        max_seconds: float = 30.0,
        keep_decoded_hours: float = 2.0,
        on_bad_utterance: Literal["skip", "error"] = "skip",
        num_workers: int = 0,
        seed: int = 0,
        folder: str = ".",
    ) -> None:
        super().__init__()
        self.columns = Columns.of(columns, target)
        self.path, self.name = path, name
        self.splits = {"train": train_split, "validation": validation_split, "test": test_split}
        self.batch_seconds, self.min_seconds, self.max_seconds = batch_seconds, min_seconds, max_seconds
        self.on_bad_utterance, self.num_workers, self.seed = on_bad_utterance, num_workers, seed
        self.keep_decoded_hours = keep_decoded_hours
        self.skipped_file = Path(folder) / "skipped.jsonl"
        self.skipped: Counter[str] = Counter()
        self.noted: set[Skipped] = set()
        self.collator: Collator | None = None
        self.rows = cache(self.load_rows)
        self.split = cache(self.load_split)

    def load_rows(self, split: str) -> UtteranceRows:
        """`split` is train, validation or test."""
        rows = load_rows(self.path, self.splits[split], self.name)
        return UtteranceRows(rows, self.columns, self.path, self.splits[split])

    def load_split(self, split: str) -> SplitDataset:
        """The filtered split; raises UserError when nothing is left of it."""
        assert self.collator is not None, "build hands the collator over"
        rows = self.rows(split)
        kept: dict[int, float] = {}
        skipped: list[Skipped] = []
        for index, (seconds, text) in enumerate(zip(rows.seconds(), rows.texts(), strict=True)):
            if reason := self.reason_to_skip(seconds, text):
                skipped.append(Skipped(rows.id(index), *reason))
            else:
                assert seconds is not None
                kept[index] = seconds
        self.note_skipped(skipped)
        if not kept:
            raise UserError(
                f"data.path={self.path}: none of the {len(rows)} utterances of {self.splits[split]!r} can be used "
                f"({', '.join(f'{count} {reason}' for reason, count in self.skipped.items())})",
                "data.min_seconds, data.max_seconds and data.columns that fit this dataset",
            )
        return SplitDataset(rows, kept, self.collator, self.keep_decoded_hours)

    def reason_to_skip(self, seconds: float | None, text: str) -> tuple[str, str] | None:
        if seconds is None:
            return "unreadable audio", ""
        if seconds < self.min_seconds:
            return "too short", f"{seconds:.2f} s < data.min_seconds={self.min_seconds}"
        if seconds > self.max_seconds:
            return "too long", f"{seconds:.2f} s > data.max_seconds={self.max_seconds}"
        return None if text.strip() else ("empty text", "")

    def note_skipped(self, skipped: list[Skipped]) -> None:
        """Counts, lists and, once per reason, tells of utterances that are left out; each of them once.

        Raises UserError where bad utterances are to stop the run.
        """
        skipped = [utterance for utterance in skipped if utterance not in self.noted]
        self.noted.update(skipped)
        for utterance in skipped:
            if self.on_bad_utterance == "error":
                raise UserError(
                    f"utterance {utterance.id!r}: {utterance.reason} {utterance.detail}".rstrip(),
                    "data.on_bad_utterance=skip to go on without it",
                )
            if not self.skipped[utterance.reason]:
                first = f"{utterance.id} {utterance.detail}".rstrip()
                logger.warning("skipping utterances: %s (first: %s)", utterance.reason, first)
            self.skipped[utterance.reason] += 1
        if skipped:
            with self.skipped_file.open("a") as lines:
                lines.writelines(json.dumps(asdict(utterance)) + "\n" for utterance in skipped)

    def loader(self, split: str, *, shuffle: bool = False, over_ranks: bool = False) -> DataLoader[Batch]:
        """The whole split in batches, or with `over_ranks` this rank's part of it."""
        dataset = self.split(split)
        trainer = self.trainer if over_ranks else None
        batches = DurationBatches(
            dataset.seconds,
            self.batch_seconds,
            shuffle=shuffle,
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            num_ranks=trainer.world_size if trainer else 1,
        )
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def batches(self, split: str) -> Iterator[Batch]:
        """The whole split; what cannot be read is noted."""
        for batch in self.loader(split):
            self.note_skipped(batch.skipped)
            yield batch

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        self.note_skipped(batch.skipped)
        return batch

    def train_dataloader(self) -> DataLoader[Batch]:
        return self.loader("train", shuffle=True, over_ranks=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self.loader("validation", over_ranks=True)
