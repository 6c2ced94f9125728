"""The splits of one dataset as Lightning's loaders of Batch."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import lightning
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from sedtrain.batch import Batch, Skipped, UserError, Utterance, require
from sedtrain.data.augment import Augment
from sedtrain.data.batching import BatchesWithEpoch, DurationBatches, Position
from sedtrain.data.clips import UNREADABLE
from sedtrain.data.collate import Collator
from sedtrain.data.columns import Columns
from sedtrain.data.sources import UtteranceRows, load_rows
from sedtrain.text import encode_target

logger = logging.getLogger(__name__)


class SplitDataset(Dataset[Batch]):
    """The utterances of one split that are not too long, too short or without text; item `(epoch, [i, j, ...])` is a Batch."""

    def __init__(
        self,
        rows: UtteranceRows,
        kept: Mapping[int, float],
        collator: Collator,
        keep_decoded_hours: float,
        augment: Augment | None = None,
    ) -> None:
        self.rows, self.collator, self.augment = rows, collator, augment
        self.indices, self.seconds = list(kept), list(kept.values())
        self.keeps_decoded = self.total_seconds() <= 3600 * keep_decoded_hours
        self.decoded: dict[int, Utterance | Skipped] = {}

    def __len__(self) -> int:
        return len(self.indices)

    def total_seconds(self) -> float:
        return sum(self.seconds)

    def __getitem__(self, drawn: tuple[int, list[int]]) -> Batch:
        epoch, numbers = drawn
        read = [self.read(self.indices[number]) for number in numbers]
        utterances = [result for result in read if isinstance(result, Utterance)]
        return self.collator(
            [self.augment(utterance, epoch) for utterance in utterances] if self.augment else utterances,
            [result for result in read if isinstance(result, Skipped)],
        )

    def num_tokens(self) -> list[int]:
        """Of the targets of all utterances, in order."""
        collator, texts = self.collator, self.rows.texts()
        targets = (encode_target(collator.tokenizer, texts[i], collator.decoder_start_token_id) for i in self.indices)
        return [len(target) for target in targets]

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
            reason = getattr(error, "reason", "undecodable audio")
            return Skipped(self.rows.id(index), reason, getattr(error, "error_string", str(error)))


class SpeechTextDataModule(lightning.LightningDataModule):
    """Loads, filters and batches the splits of one dataset.

    `collator` (features, labels, padding) is handed over by `build` before the first loader is asked for.

    path, name: `spoken_digits`, a file, a folder or a Hub id; the Hub's name of a configuration
    columns: which column holds audio, transcription, translation, and where they exist id, speaker, language, seconds,
        and for a part of a long recording start and end, or start and seconds
    audio_folder: where relative paths of audio files begin, which must not leave it; else the folder of `path`
    target: which of the columns transcription and translation is the text to learn
    batch_seconds, batch_tokens: audio and, if given, target tokens per batch and rank, padding included
    num_buckets: of utterances of similar length; a batch is of one of them
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
        audio_folder: str | None = None,
        train_split: str = "train",
        validation_split: str = "validation",
        test_split: str = "test",
        batch_seconds: float = 24.0,
        batch_tokens: int | None = None,
        num_buckets: int = 30,
        min_seconds: float = 0.05,
        max_seconds: float = 30.0,
        keep_decoded_hours: float = 2.0,
        on_bad_utterance: Literal["skip", "error"] = "skip",
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
        require(min_seconds >= 0, "data.min_seconds", min_seconds, "0 or more")
        require(max_seconds > min_seconds, "data.max_seconds", max_seconds, f"above data.min_seconds, {min_seconds}")
        require(keep_decoded_hours >= 0, "data.keep_decoded_hours", keep_decoded_hours, "0 or more")
        require(num_workers >= 0, "data.num_workers", num_workers, "0 or more")
        self.columns = Columns.of(columns, target)
        self.path, self.name, self.audio_folder = path, name, audio_folder
        self.splits = {"train": train_split, "validation": validation_split, "test": test_split}
        self.batch_seconds, self.min_seconds, self.max_seconds = batch_seconds, min_seconds, max_seconds
        self.batch_tokens, self.num_buckets = batch_tokens, num_buckets
        self.position: Position | None = None
        self.train_batches: DurationBatches | None = None
        self.on_bad_utterance, self.num_workers, self.seed = on_bad_utterance, num_workers, seed
        self.keep_decoded_hours = keep_decoded_hours
        self.skipped_file = Path(folder) / "skipped.jsonl"
        self.skipped: Counter[str] = Counter()
        self.noted: set[Skipped] = set()
        self.collator: Collator | None = None
        self.augment: Augment | None = None
        self.rows = cache(self.load_rows)
        self.kept = cache(self.find_kept)
        self.split = cache(self.load_split)

    def load_rows(self, split: str) -> UtteranceRows:
        """`split` is train, validation or test."""
        rows = load_rows(self.path, self.splits[split], self.name)
        folder = None if self.audio_folder is None else Path(self.audio_folder).expanduser()
        return UtteranceRows(rows, self.columns, self.path, self.splits[split], folder)

    def load_split(self, split: str, augment: Augment | None = None) -> SplitDataset:
        assert self.collator is not None, "build hands the collator over"
        return SplitDataset(self.rows(split), self.kept(split), self.collator, self.keep_decoded_hours, augment)

    def refuse_unusable(self, splits: Iterable[str]) -> None:
        """Raises one UserError of everything that is wrong with these splits."""
        errors = []
        for split in dict.fromkeys(splits):
            try:
                self.kept(split)
            except UserError as error:
                errors.append(error)
        if errors:
            wrong, instead = (dict.fromkeys(each) for each in zip(*(error.args for error in errors), strict=True))
            raise UserError("\n".join(wrong), "; ".join(instead)) from errors[0]

    def find_kept(self, split: str) -> dict[int, float]:
        """The seconds of each row that is not too long, too short or without text, by its index.

        Raises UserError when nothing is left of the split.
        """
        rows = self.rows(split)
        kept: dict[int, float] = {}
        skipped: list[Skipped] = []
        for index, (seconds, text) in enumerate(zip(rows.seconds(), rows.texts(), strict=True)):
            if reason := rows.problem(index, seconds) or self.reason_to_skip(seconds, text):
                skipped.append(Skipped(rows.id(index), *reason))
            else:
                assert seconds is not None
                kept[index] = seconds
        self.note_skipped(skipped)
        if not kept:
            raise UserError(
                f"data.path={self.path}: none of the {len(rows)} utterances of {self.splits[split]!r} can be used "
                f"({', '.join(f'{count} {reason}' for reason, count in Counter(each.reason for each in skipped).items())})",
                "data.min_seconds, data.max_seconds and data.columns that fit this dataset",
            )
        return kept

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
                lines.writelines(json.dumps(utterance._asdict()) + "\n" for utterance in skipped)

    def batches_of(self, dataset: SplitDataset, *, shuffle: bool, over_ranks: bool) -> DurationBatches:
        """The batches of the whole split, or with `over_ranks` this rank's, bounded for audio as long as it may get."""
        trainer = self.trainer if over_ranks else None
        longest = dataset.augment.longest if dataset.augment else 1.0
        return DurationBatches(
            longest * np.array(dataset.seconds),
            self.batch_seconds,
            shuffle=shuffle,
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            num_ranks=trainer.world_size if trainer else 1,
            tokens=None if self.batch_tokens is None else dataset.num_tokens(),
            batch_tokens=self.batch_tokens,
            num_buckets=self.num_buckets,
        )

    def loader(self, dataset: SplitDataset, batches: DurationBatches) -> DataLoader[Batch]:
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=BatchesWithEpoch(batches),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def batches(self, split: str) -> Iterator[Batch]:
        """The whole split; what cannot be read is noted."""
        dataset = self.split(split)
        for batch in self.loader(dataset, self.batches_of(dataset, shuffle=False, over_ranks=False)):
            self.note_skipped(batch.skipped)
            yield batch

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        self.note_skipped(batch.skipped)
        return batch

    def train_dataloader(self) -> DataLoader[Batch]:
        dataset = self.split("train", self.augment)
        batches = self.batches_of(dataset, shuffle=True, over_ranks=True)
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
