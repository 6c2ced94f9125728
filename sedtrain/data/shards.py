"""The files that a split is stored in, each opened by itself: what a stream reads one after the other."""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet
from aiohttp import ClientError
from filelock import FileLock

from sedtrain.data.readers import PROBLEM
from sedtrain.data.sources import (
    TABLES,
    TARS,
    expanded,
    is_pattern,
    local_path,
    one_line,
    pattern_files,
    readable,
    readable_cells,
    split_files,
    table_rows,
    tar_rows,
)
from sedtrain.data.utterances import as_text, check_columns
from sedtrain.errors import UserError

BUILDERS = {"parquet", "json", "csv", "webdataset"}  # of `datasets`, whose files are read alike here
NUM_ATTEMPTS = 5
FIRST_PAUSE = 1.0  # seconds, doubled after every failure


class BrokenShard(Exception):
    """A file that is there, but holds nothing that can be read."""


@dataclass(frozen=True)
class Shard:
    """One file of a split.

    place:  its path or URL
    name:   what its rows are named after, unlike those of all others
    copies: the folder of everything that has been fetched or converted, of which each shard has a folder
    """

    place: str
    name: str
    copies: Path

    @property
    def copy(self) -> Path:
        return self.copies / hashlib.sha256(self.place.encode()).hexdigest()[:32]

    @property
    def is_remote(self) -> bool:
        return "://" in self.place

    def rows(self) -> datasets.Dataset:
        """Raises BrokenShard, and UserError where a file cannot be fetched."""
        datasets.disable_progress_bars()
        if self.place.endswith(TARS) and not self.is_remote:
            with whole():
                return tar_rows(self.place, [Path(self.place)])
        with self.lock():  # nobody removes a copy that another has half made
            file = self.fetched() if self.is_remote else Path(self.place)
            with whole():
                return (
                    tar_rows(self.place, [file], self.copy) if file.name.endswith(TARS) else table_rows(file, self.copy)
                )

    def lock(self) -> FileLock:
        """Held by one of the processes that stream for the same run on a machine; it may take it twice."""
        self.copies.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{self.copy}.lock", is_singleton=True)

    def texts(self, column: str) -> Iterator[str]:
        """The texts of a column, of Parquet without reading or fetching the others.

        Raises as `rows` does, and UserError where there are rows but no such column.
        """
        if not self.place.endswith(".parquet"):
            rows = self.rows()
            if set(rows.column_names) - {PROBLEM}:
                check_columns({"text": column}, rows.features, self.place)
                yield from map(as_text, rows[column])
            return
        with whole(), fsspec.open(self.place) as file, self.parquet(file) as table:
            schema, is_there = table.schema_arrow, column in table.schema_arrow.names
            for batch in table.iter_batches(columns=[column]) if is_there else ():
                yield from map(as_text, readable_cells(batch.column(column)))
            is_there |= not table.metadata.num_rows
        if not is_there:
            check_columns({"text": column}, datasets.Features.from_arrow_schema(schema), self.place)

    def parquet(self, file: IO[bytes]) -> pa.parquet.ParquetFile:
        """The file as it is opened, or a copy of it where a server does not give parts of it."""
        try:
            return pa.parquet.ParquetFile(file)
        except ValueError:
            return pa.parquet.ParquetFile(self.fetched() if self.is_remote else self.place)

    def fetch_ahead(self) -> None:
        """Begins to fetch a remote file; what goes wrong is told when the file is needed."""

        def fetch_quietly() -> None:
            with suppress(UserError):
                self.fetched()

        if self.is_remote and not self.copy.exists():
            Thread(target=fetch_quietly, daemon=True).start()

    def fetched(self) -> Path:
        """A copy of the remote file, fetched once by all processes of a machine."""
        file = self.copy / Path(self.place).name
        with self.lock():
            self.copy.mkdir(exist_ok=True)
            if not file.exists():
                fetch(self.place, file)
        return file

    def remove_copy(self) -> None:
        if self.copy.exists():
            with self.lock():
                shutil.rmtree(self.copy, ignore_errors=True)  # another process may have done it by now


@contextmanager
def whole() -> Iterator[None]:
    """What cannot be read while it lasts is a BrokenShard."""
    try:
        yield
    except (ValueError, OSError, pa.ArrowException, datasets.exceptions.DatasetGenerationError) as error:
        raise BrokenShard(one_line(error)) from error


def fetch(url: str, file: Path) -> None:
    """Raises UserError when the last attempt fails; nothing incomplete is left under the name of `file`."""
    incomplete = file.with_name(f"{file.name}.incomplete")
    pause = FIRST_PAUSE
    for attempt in range(1, NUM_ATTEMPTS + 1):
        try:
            filesystem, name = fsspec.url_to_fs(url)
            filesystem.get_file(name, str(incomplete))
            incomplete.rename(file)
            return
        except (OSError, ClientError, TimeoutError) as error:
            if attempt == NUM_ATTEMPTS or isinstance(error, FileNotFoundError):
                raise UserError(
                    f"data.path: {url} cannot be fetched ({one_line(error)})", "a URL that can be reached"
                ) from error
        time.sleep(pause)
        pause *= 2


def shards_of(path: str, split: str, name: str | None, copies: Path) -> list[Shard]:
    """The files of one split, or of several joined by +, in the order of their names; none where it is not stored in files.

    Raises UserError where the split is missing, or a part of it is asked for.
    """
    if "[" in split:
        raise UserError(
            f"{split!r} is a part of a split, which neither a stream nor a URL has",
            "data.streaming=false of what is not on a server, or a split of its own",
        )
    found = [place for each in split.split("+") for place in places(path, each, name)]
    return [Shard(place, name, copies) for place, name in zip(found, names_of(found), strict=True)]


def names_of(places: list[str]) -> list[str]:
    """Of each file its name, without what says its format; with its folders where those are not different."""
    short = [without_format(Path(place).name) for place in places]
    if len(set(short)) == len(short):
        return short
    common = os.path.commonpath([os.path.dirname(place) for place in places])
    return [without_format(os.path.relpath(place, common)) for place in places]


def without_format(name: str) -> str:
    return next((name.removesuffix(each) for each in (*TARS, *TABLES) if name.endswith(each)), name)


def places(path: str, split: str, name: str | None) -> list[str]:
    if "://" in path:
        return list(expanded(path.replace("{split}", split)))
    where = local_path(path)
    if is_pattern(path):
        return sorted(map(str, pattern_files(path, split)))
    if where.is_file():
        return [str(where)]
    if where.is_dir() and (files := split_files(where, split)):
        return list(map(str, files))
    if (where / "dataset_dict.json").is_file() or (where / "state.json").is_file():
        return []
    with readable(path, split):
        return list(listed_files(path, split, name))


def listed_files(path: str, split: str, name: str | None) -> Iterator[str]:
    """What `datasets` finds on the Hub or in a folder, where it is of a format that is read here."""
    where = local_path(path)
    hub_id, _, revision = path.partition("@")
    if where.exists():
        builder = datasets.load_dataset_builder(str(where), name)
    else:
        builder = datasets.load_dataset_builder(hub_id, name, revision=revision or None)
    files = builder.config.data_files or {}
    if builder.name in BUILDERS and split in files:
        yield from map(str, files[split])
