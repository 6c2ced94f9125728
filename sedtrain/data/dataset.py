"""The utterances of a split, read and decoded in the workers."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from math import inf
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from sedtrain.batch import Batch, Skipped, Utterance
from sedtrain.data.audio import UNREADABLE
from sedtrain.data.augment import Augment
from sedtrain.data.collate import Collator
from sedtrain.data.corpus import Parts, Reference
from sedtrain.data.readers import BrokenFile
from sedtrain.errors import UserError

ROUNDED = 0.01  # seconds by which audio may be longer than its header says, once it is resampled


class SplitDataset(Dataset[Batch]):
    """Item `(epoch, [reference, ...])` is a Batch.

    kept: the seconds of each utterance that is used; of a stream nothing is known ahead
    keep_decoded_hours: what is not longer is decoded once and kept in memory
    max_seconds: longer audio is left out, although its header or a column of lengths gave it as shorter
    """

    def __init__(
        self,
        parts: Parts,
        kept: Mapping[Reference, float],
        collator: Collator,
        keep_decoded_hours: float,
        augment: Augment | None = None,
        max_seconds: float = inf,
    ) -> None:
        self.parts, self.collator, self.augment, self.max_seconds = parts, collator, augment, max_seconds
        self.references, self.seconds = list(kept), list(kept.values())
        self.keeps_decoded = bool(kept) and self.total_seconds() <= 3600 * keep_decoded_hours
        self.decoded: dict[Reference, Utterance | Skipped] = {}

    def __len__(self) -> int:
        return len(self.references)

    def total_seconds(self) -> float:
        return sum(self.seconds)

    @property
    def longest(self) -> float:
        """The factor by which an utterance may become longer than it is stored."""
        return self.augment.longest if self.augment else 1.0

    def __getitem__(self, drawn: tuple[int, list[Reference]]) -> Batch:
        epoch, references = drawn
        read = [self.read(reference) for reference in references]
        utterances = [result for result in read if isinstance(result, Utterance)]
        return self.collator(
            [self.augment(utterance, epoch) for utterance in utterances] if self.augment else utterances,
            [result for result in read if isinstance(result, Skipped)],
        )

    def num_tokens(self, part: int, indices: Sequence[int]) -> list[int]:
        """Of the targets of some rows of a part."""
        return [self.collator.num_tokens(text) for text in self.parts[part].texts(indices)]

    def all_num_tokens(self) -> list[int]:
        """Of the targets of all utterances, in order."""
        by_part = {
            part: self.num_tokens(part, [index for _, index in references])
            for part, references in groupby(self.references, itemgetter(0))
        }
        return [number for numbers in by_part.values() for number in numbers]

    def audio_of(self, id: str) -> tuple[NDArray[np.float32], int]:
        """The decoded samples (S,) of an utterance and their rate."""
        rows = next(rows for rows in self.parts if id in rows.index_of)
        utterance = rows.utterance(rows.index_of[id], self.collator.sampling_rate)
        return utterance.audio.numpy(), utterance.sampling_rate

    def read(self, reference: Reference) -> Utterance | Skipped:
        if not self.keeps_decoded:
            return self.decode(reference)
        if reference not in self.decoded:
            self.decoded[reference] = self.decode(reference)
        return self.decoded[reference]

    def decode(self, reference: Reference) -> Utterance | Skipped:
        """In a worker an error would lose its class, so audio that cannot be decoded is a value."""
        part, index = reference
        try:
            rows = self.parts[part]
        except (BrokenFile, UserError) as error:  # it was there when the batches were planned
            gone = self.parts.parts[part]
            return Skipped(f"{gone.name}-{index}", "unreadable shard", str(error), gone.place)
        try:
            utterance = rows.utterance(index, self.collator.sampling_rate)
        except UNREADABLE as error:
            return rows.skipped(index, getattr(error, "reason", "undecodable audio"), str(error))
        if utterance.seconds > self.max_seconds + ROUNDED:
            return rows.skipped(index, "too long", f"{utterance.seconds:.2f} s > data.max_seconds={self.max_seconds}")
        return utterance
