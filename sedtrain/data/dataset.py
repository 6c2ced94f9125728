"""Reads and decodes the used utterances of a split, which consists of parts of datasets; runs in the workers."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset

from sedtrain.batch import Batch, Skipped, Utterance
from sedtrain.data.augment import Augment
from sedtrain.data.buckets import Bounds, Integers
from sedtrain.data.collate import Collator
from sedtrain.data.headers import RefusedAudio
from sedtrain.data.limits import WHOLE, Limits, too_long
from sedtrain.data.memory import return_freed_memory
from sedtrain.data.parts import Parts
from sedtrain.data.sampler import DurationBatches
from sedtrain.data.tables import BrokenFile
from sedtrain.data.utterances import CELLS_AT_ONCE
from sedtrain.errors import UserError

NUM_COUNTED = 2000  # texts that are tokenized for the mean of tokens per second
ROUNDED = 0.01  # seconds; resampled audio may be longer than its header says by this much

Reference = tuple[int, int]
"""An utterance: the number of its part, and its row there."""
KEPT = np.dtype([("part", np.int32), ("row", np.int32), ("seconds", np.float64)])
Kept = Any  # NumPy's annotations do not know the fields of a slice
"""(N,) the used utterances of a split, in order, as a record array of KEPT."""


def kept_rows(part: int, rows: Sequence[int] | Integers, seconds: ArrayLike) -> Kept:
    """Rows of one part with their seconds, as Kept."""
    kept = np.recarray(len(rows), dtype=KEPT)
    kept.part, kept.row, kept.seconds = part, rows, seconds
    return kept


def joined(several: Iterable[Kept]) -> Kept:
    return np.concatenate([kept_rows(0, [], []), *several]).view(np.recarray)


def chunks(kept: Kept) -> Iterator[tuple[int, Kept]]:
    """Yields parts and their utterances in order, at most CELLS_AT_ONCE at a time."""
    ends = np.flatnonzero(np.diff(kept.part, append=-1)) + 1  # end of each part
    for start, end in pairwise([0, *ends.tolist()]):
        for first in range(start, end, CELLS_AT_ONCE):
            yield int(kept.part[start]), kept[first : min(first + CELLS_AT_ONCE, end)]


def among(kept: Kept, part: int, rows: Integers) -> Kept:
    """The given rows of a part that are in `kept`, which has to be in order."""
    known = kept[slice(*np.searchsorted(kept.part, [part, part + 1]))]
    return known[np.searchsorted(known.row, rows[np.isin(rows, known.row)])]


class SplitDataset(Dataset[Batch | UserError]):
    """Item `(epoch, [reference, ...])` is a Batch; a UserError in place of an item is returned as it is.

    kept:               the used utterances; None for a stream, where they are not known beforehand
    keep_decoded_hours: a split up to this long is decoded once and kept in memory
    limits:             decoded audio beyond these is skipped, even if its header or column gave a shorter length
    is_scored:          True uses silent audio, and skips audio that is too long for the encoder
    """

    def __init__(
        self,
        parts: Parts,
        kept: Kept | None,
        collator: Collator,
        keep_decoded_hours: float,
        augment: Augment | None = None,
        limits: Limits = WHOLE,
        is_scored: bool = False,
    ) -> None:
        self.parts, self.collator, self.augment = parts, collator, augment
        self.limits, self.is_scored = limits, is_scored
        self.kept = joined([]) if kept is None else kept
        self.keeps_decoded = kept is not None and self.total_seconds() <= 3600 * keep_decoded_hours
        self.decoded: dict[Reference, Utterance | Skipped] = {}

    def __len__(self) -> int:
        return len(self.kept)

    def total_seconds(self) -> float:
        return float(self.kept.seconds.sum())

    @property
    def longest(self) -> float:
        """Largest factor by which augmentation may lengthen an utterance."""
        return self.augment.longest if self.augment else 1.0

    def __getitem__(self, drawn: tuple[int, list[Reference]] | UserError) -> Batch | UserError:
        if isinstance(drawn, UserError):
            return drawn
        epoch, references = drawn
        results = [self.read(reference) for reference in references]
        utterances = [result for result in results if isinstance(result, Utterance)]
        if self.augment:
            utterances = [self.augment(utterance, epoch) for utterance in utterances]
        return self.collator(utterances, [result for result in results if isinstance(result, Skipped)])

    def num_tokens(self, kept: Kept) -> Integers:
        """(N,) number of target tokens of each utterance."""
        texts = (text for part, some in chunks(kept) for text in self.parts[part].texts(some.row.tolist()))
        return np.fromiter(map(self.collator.num_tokens, texts), np.int64, len(kept))

    def tokens_per_second(self) -> float:
        """Mean number of target tokens per second over some thousand utterances."""
        step = len(self) // NUM_COUNTED + 1
        counted = self.kept[::step]
        return float(self.num_tokens(counted).sum() / counted.seconds.sum())

    def utterance_of(self, id: str) -> Utterance:
        found = ((rows, rows.index_of(id)) for rows in self.parts)
        rows, index = next((rows, index) for rows, index in found if index is not None)
        return rows.utterance(index, self.collator.sampling_rate, True)

    def audio_of(self, id: str) -> tuple[NDArray[np.float32], int]:
        """The decoded samples (S,) of an utterance and their sampling rate."""
        utterance = self.utterance_of(id)
        return utterance.audio.numpy(), utterance.sampling_rate

    def batch_of(self, id: str, text: str) -> Batch:
        """A batch of one utterance, with `text` in place of its reference."""
        return self.collator([replace(self.utterance_of(id), text=text)])

    def read(self, reference: Reference) -> Utterance | Skipped:
        if not self.keeps_decoded:
            return self.decode(reference)
        if reference not in self.decoded:
            self.decoded[reference] = self.decode(reference)
        return self.decoded[reference]

    def decode(self, reference: Reference, of_any_length: bool = False) -> Utterance | Skipped:
        """The decoded utterance, or the reason to skip it, as a value: a raised error would lose its class in a worker."""
        part, index = reference
        try:
            rows = self.parts[part]
        except (BrokenFile, UserError) as error:  # it was readable when the batches were planned
            broken = self.parts.parts[part]
            return Skipped(f"{broken.name}-{index}", "unreadable shard", str(error), broken.path)
        try:
            utterance = rows.utterance(index, self.collator.sampling_rate, self.is_scored)
        except RefusedAudio as error:
            return rows.skipped(index, error.reason, str(error))
        if of_any_length:
            return utterance
        if utterance.seconds > self.limits.max_seconds + ROUNDED:
            return rows.skipped(index, *too_long(utterance.seconds, self.limits.max_seconds, self.limits.longest))
        if self.is_scored and round(utterance.seconds, 2) > (longest := self.collator.max_seconds):
            return rows.skipped(index, *too_long(utterance.seconds, longest, "the limit of the model"))
        return utterance


class BatchesWithEpoch(DurationBatches):
    """Batches of references, each with its epoch. Workers outlive an epoch; only the batch tells them the next one.

    kept: the utterances; the bounds allow for the lengthening by the augmentation of `dataset`
    """

    def __init__(self, dataset: SplitDataset, kept: Kept, bounds: Bounds, **options: Any) -> None:
        tokens = dataset.num_tokens(kept) if bounds.buckets or bounds.batch_tokens else None
        super().__init__(dataset.longest * kept.seconds, bounds, tokens=tokens, **options)
        self.dataset, self.kept = dataset, kept

    def __iter__(self) -> Iterator[tuple[int, list[Reference]]]:
        epoch, batches = self.epoch, super().__iter__()
        return_freed_memory()  # left from making the order; the workers are forked next
        return ((epoch, self.kept[["part", "row"]][numbers].tolist()) for numbers in batches)
