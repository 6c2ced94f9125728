"""Parts of datasets, opened when they are needed, and a split made of them, read and decoded in the workers."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset

from sedtrain.batch import Batch, Skipped, Utterance
from sedtrain.data.audio import UNREADABLE
from sedtrain.data.augment import Augment
from sedtrain.data.buckets import Floats, Integers
from sedtrain.data.collate import Collator
from sedtrain.data.paths import local_path, split_files
from sedtrain.data.readers import BrokenFile
from sedtrain.data.shards import Shard, shards_of
from sedtrain.data.skipped import Limits, too_long
from sedtrain.data.sources import load_rows
from sedtrain.data.utterances import CELLS_AT_ONCE, Columns, UtteranceRows, as_text
from sedtrain.errors import UserError

ROUNDED = 0.01  # seconds by which resampled audio may be longer than its header says

Reference = tuple[int, int]
"""An utterance: the number of its part, and its row there."""
References = NDArray[np.int32]
"""(N, 2) several of these."""


class Kept:
    """The utterances of a split that are used, in order: (N, 2) `references`, (N,) `seconds`."""

    def __init__(self, references: References, seconds: Floats) -> None:
        self.references, self.seconds = references, seconds

    @classmethod
    def of(cls, parts: Iterable[tuple[int, ArrayLike, ArrayLike]]) -> "Kept":
        """parts: the number of each, its rows, and the seconds of each row"""
        references, seconds = [np.empty((0, 2), np.int32)], [np.empty(0)]
        for part, rows, lengths in parts:
            indices = np.asarray(rows, np.int32)
            references.append(np.column_stack([np.full_like(indices, part), indices]))
            seconds.append(np.asarray(lengths, np.float64))
        return cls(np.concatenate(references), np.concatenate(seconds))

    def __len__(self) -> int:
        return len(self.references)

    def part(self, number: int) -> slice:
        """The place of the utterances of a part."""
        return slice(*np.searchsorted(self.references[:, 0], [number, number + 1]))

    def chunks(self) -> Iterator[tuple[int, list[int]]]:
        """Parts and rows, in order; as many at a time as may be Python values at once."""
        for part in np.unique(self.references[:, 0]).tolist():
            rows = self.references[self.part(part), 1]
            for first in range(0, len(rows), CELLS_AT_ONCE):
                yield part, rows[first : first + CELLS_AT_ONCE].tolist()

    def among(self, part: int, rows: Integers) -> tuple[Integers, Floats]:
        """Those rows of a part that are used, and their seconds."""
        place = self.part(part)
        known, seconds = self.references[place, 1], self.seconds[place]
        is_known = np.isin(rows, known)
        return rows[is_known], seconds[np.searchsorted(known, rows[is_known])]

    def leave_out(self, unwanted: NDArray[np.bool_]) -> None:
        self.references, self.seconds = self.references[~unwanted], self.seconds[~unwanted]


@dataclass(frozen=True)
class Source:
    """One dataset.

    splits: its own names of train, validation and test; None for a split that it does not have
    weight: how often its training split is seen in an epoch
    label:  its name in a mix, which its ids begin with
    """

    path: str
    columns: Columns
    splits: Mapping[str, str | None]
    name: str | None = None
    audio_folder: str | None = None
    weight: float = 1.0
    label: str = ""
    language: str | None = None
    task: str = "transcribe"

    def parts(self, split: str, copies: Path | None = None) -> list["Part"]:
        """A split, which is train, validation or test, as one part, or as one for each of its files.

        copies: where files are opened one by one, the folder of what is fetched or converted for that
        """
        name = self.splits[split]
        if name is None:
            return []
        shards = shards_of(self.path, name, self.name, copies) if copies else []
        return [Part(self, name, shard) for shard in shards] or [Part(self, name)]


@dataclass(frozen=True)
class Part:
    """Rows that are opened together: one shard of a split of a dataset, or the split where it has no shards."""

    source: Source
    split: str
    shard: Shard | None = None

    @property
    def name(self) -> str:
        """The name that rows without an id begin with."""
        return self.split if self.shard is None else self.shard.name

    @property
    def path(self) -> str | None:
        """The file or URL, where it is a single one."""
        return file_of(self.source.path, self.split) if self.shard is None else self.shard.place

    def open(self) -> UtteranceRows:
        """Raises UserError where there are no rows of utterances, BrokenFile for a file that cannot be read."""
        source = self.source
        rows = load_rows(source.path, self.split, source.name) if self.shard is None else self.shard.rows()
        return UtteranceRows(
            rows,
            source.columns,
            source.path,
            self.name,
            None if source.audio_folder is None else Path(source.audio_folder).expanduser(),
            f"{source.label}/" if source.label else "",
            source.language,
            source.task,
            self.path,
        )

    def texts(self, role: str) -> Iterator[str]:
        """The column of a role as text; of a Parquet file, without reading the others. Raises as `open` does."""
        if self.shard is None:
            return map(as_text, self.open().cells(role))
        return self.shard.texts(getattr(self.source.columns, role))


def file_of(path: str, split: str) -> str | None:
    """The file of a folder that holds a split, where it is a single one."""
    folder = local_path(path)
    files = split_files(folder, split.partition("[")[0]) if folder.is_dir() else []
    return str(files[0]) if len(files) == 1 else None


class Parts(Sequence[UtteranceRows]):
    """The rows of each part, opened when they are asked for.

    num_rows: parts stay open that have at least so many rows together; None: all parts
    """

    def __init__(self, parts: Iterable[Part], num_rows: int | None = None) -> None:
        self.parts, self.num_rows = list(parts), num_rows
        self.opened: OrderedDict[int, UtteranceRows] = OrderedDict()

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> UtteranceRows:  # type: ignore[override]
        if number not in self.opened:
            self.opened[number] = self.parts[number].open()
            self.close_oldest()
        self.opened.move_to_end(number)
        return self.opened[number]

    def close_oldest(self) -> None:
        num_open = sum(map(len, self.opened.values()))
        for number, rows in list(self.opened.items())[:-1]:
            num_open -= len(rows)
            if self.num_rows is None or num_open < self.num_rows:
                break
            del self.opened[number]

    def fetch_ahead(self, number: int) -> None:
        if shard := self.parts[number].shard:
            shard.fetch_ahead()

    def remove_copy(self, number: int) -> None:
        """Removes what was fetched or converted to open this part; it can be opened anew."""
        self.opened.pop(number, None)
        if shard := self.parts[number].shard:
            shard.remove_copy()


NUM_COUNTED = 2000  # texts whose tokens are counted for a mean


class SplitDataset(Dataset[Batch | UserError]):
    """Item `(epoch, [reference, ...])` is a Batch; a UserError is handed on.

    kept:               the utterances that are used; None for a stream, of which they are not known before
    keep_decoded_hours: a split that is not longer is decoded once and kept in memory
    limits:             audio that turns out longer is left out, although its header or column said otherwise
    is_scored:          audio without a sound is used, and audio that the encoder cannot take is left out
    """

    def __init__(
        self,
        parts: Parts,
        kept: Kept | None,
        collator: Collator,
        keep_decoded_hours: float,
        augment: Augment | None = None,
        limits: Limits | None = None,
        is_scored: bool = False,
    ) -> None:
        self.parts, self.collator, self.augment = parts, collator, augment
        self.limits, self.is_scored = limits or Limits(0.0, inf), is_scored
        self.kept = Kept.of([]) if kept is None else kept
        self.keeps_decoded = kept is not None and self.total_seconds() <= 3600 * keep_decoded_hours
        self.decoded: dict[Reference, Utterance | Skipped] = {}

    def __len__(self) -> int:
        return len(self.kept)

    def total_seconds(self) -> float:
        return float(self.kept.seconds.sum())

    @property
    def longest(self) -> float:
        """The factor by which augmentation may lengthen an utterance."""
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

    def num_tokens(self, part: int, indices: Sequence[int]) -> list[int]:
        """Target tokens of some rows of a part."""
        return [self.collator.num_tokens(text) for text in self.parts[part].texts(indices)]

    def all_num_tokens(self) -> Integers:
        """(N,) target tokens of all utterances."""
        numbers = (number for chunk in self.kept.chunks() for number in self.num_tokens(*chunk))
        return np.fromiter(numbers, np.int64, len(self))

    def tokens_per_second(self) -> float:
        """The mean of some thousand utterances."""
        step = len(self) // NUM_COUNTED + 1
        counted = Kept(self.kept.references[::step], self.kept.seconds[::step])
        return sum(sum(self.num_tokens(*chunk)) for chunk in counted.chunks()) / float(counted.seconds.sum())

    def utterance_of(self, id: str) -> Utterance:
        found = ((rows, rows.index_of(id)) for rows in self.parts)
        rows, index = next((rows, index) for rows, index in found if index is not None)
        return rows.utterance(index, self.collator.sampling_rate, True)

    def audio_of(self, id: str) -> tuple[NDArray[np.float32], int]:
        """The decoded samples (S,) of an utterance and their rate."""
        utterance = self.utterance_of(id)
        return utterance.audio.numpy(), utterance.sampling_rate

    def batch_of(self, id: str, text: str) -> Batch:
        """An utterance as a batch of its own, with `text` instead of its reference."""
        return self.collator([replace(self.utterance_of(id), text=text)])

    def read(self, reference: Reference) -> Utterance | Skipped:
        if not self.keeps_decoded:
            return self.decode(reference)
        if reference not in self.decoded:
            self.decoded[reference] = self.decode(reference)
        return self.decoded[reference]

    def decode(self, reference: Reference, of_any_length: bool = False) -> Utterance | Skipped:
        """The decoded utterance, or why there is none: as a value, since an error would lose its class in a worker."""
        part, index = reference
        try:
            rows = self.parts[part]
        except (BrokenFile, UserError) as error:  # it could be read when the batches were planned
            broken = self.parts.parts[part]
            return Skipped(f"{broken.name}-{index}", "unreadable shard", str(error), broken.path)
        try:
            utterance = rows.utterance(index, self.collator.sampling_rate, self.is_scored)
        except UNREADABLE as error:
            return rows.skipped(index, getattr(error, "reason", "undecodable audio"), str(error))
        if of_any_length:
            return utterance
        if utterance.seconds > self.limits.max_seconds + ROUNDED:
            return rows.skipped(index, *too_long(utterance.seconds, self.limits.max_seconds, self.limits.longest))
        if self.is_scored and round(utterance.seconds, 2) > (longest := self.collator.max_seconds):
            return rows.skipped(index, *too_long(utterance.seconds, longest, "the limit of the encoder"))
        return utterance
