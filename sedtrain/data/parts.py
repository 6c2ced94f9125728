"""What a split is made of: one dataset or a mix of several, each in one piece or in the shards that it is stored in."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa

from sedtrain.data.columns import Columns
from sedtrain.data.formats import split_files
from sedtrain.data.manifests import PROBLEM
from sedtrain.data.rows import UtteranceRows
from sedtrain.data.shards import Shard, shards_of
from sedtrain.data.sources import load_rows, local_path

Reference = tuple[int, int]
"""An utterance: the number of its part, and its row there."""


@dataclass(frozen=True)
class Source:
    """One dataset.

    splits: its own names of train, validation and test; None where it has no part in one
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

    def whole(self, split: str) -> list["Part"]:
        """A split, which is train, validation or test, in one piece."""
        name = self.splits[split]
        return [] if name is None else [Part(self, name)]

    def shards(self, split: str, copies: Path) -> list["Part"]:
        """The files of the split, or the whole of it; copies: where what is fetched or converted is kept."""
        name = self.splits[split]
        if name is None:
            return []
        found = shards_of(self.path, name, self.name, copies)
        return [Part(self, name, shard) for shard in found] or self.whole(split)


@dataclass(frozen=True)
class Part:
    """Rows that are opened together: a split of a source, or one shard of it."""

    source: Source
    split: str
    shard: Shard | None = None

    @property
    def name(self) -> str:
        """What rows without an id are named after."""
        return self.split if self.shard is None else self.shard.name

    @property
    def place(self) -> str | None:
        """The file or the URL, where it is one."""
        return file_of(self.source.path, self.split) if self.shard is None else self.shard.place

    def open(self) -> UtteranceRows:
        """Raises UserError where there is nothing, or no rows of utterances, BrokenShard where a file cannot be read."""
        source = self.source
        if self.shard is None:
            rows = load_rows(source.path, self.split, source.name)
        else:
            rows = with_columns(self.shard.rows(), source.columns)
        return UtteranceRows(
            rows,
            source.columns,
            source.path,
            self.name,
            None if source.audio_folder is None else Path(source.audio_folder).expanduser(),
            f"{source.label}/" if source.label else "",
            source.language,
            source.task,
            self.place,
        )


def with_columns(rows: datasets.Dataset, columns: Columns) -> datasets.Dataset:
    """Rows of an empty file, or of lines of which none can be read, with the columns of the others, all null."""
    if set(rows.column_names) - {PROBLEM}:
        return rows
    used = dict.fromkeys(column for column in vars(columns).values() if column)
    problems = {PROBLEM: rows[PROBLEM][:]} if len(rows) else {}
    return datasets.Dataset(pa.table({**{column: pa.nulls(len(rows)) for column in used}, **problems}))


def file_of(path: str, split: str) -> str | None:
    """The file of a folder that a split is stored in, where it is one."""
    where = local_path(path)
    files = split_files(where, split.partition("[")[0]) if where.is_dir() else []
    return str(files[0]) if len(files) == 1 else None


class Parts(Sequence[UtteranceRows]):
    """The rows of each part, opened when they are asked for.

    num_rows: how many of them stay open at least; None: all
    """

    def __init__(self, parts: Iterable[Part], num_rows: int | None = None) -> None:
        self.parts, self.num_rows = list(parts), num_rows
        self.opened: OrderedDict[int, UtteranceRows] = OrderedDict()

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> UtteranceRows:  # type: ignore[override]
        if number not in self.opened:
            self.opened[number] = self.parts[number].open()
            if self.num_rows is not None:
                self.close_oldest(self.num_rows)
        self.opened.move_to_end(number)
        return self.opened[number]

    def close_oldest(self, num_rows: int) -> None:
        left = sum(map(len, self.opened.values()))
        for number, rows in list(self.opened.items())[:-1]:
            left -= len(rows)
            if left < num_rows:
                break
            del self.opened[number]

    def fetch_ahead(self, number: int) -> None:
        if shard := self.parts[number].shard:
            shard.fetch_ahead()

    def remove_copy(self, number: int) -> None:
        """What was fetched or converted to open this part is removed; it can be opened anew."""
        self.opened.pop(number, None)
        if shard := self.parts[number].shard:
            shard.remove_copy()
