"""The files that a split is stored in, opened one by one, so that a stream can read one after the other."""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO
from urllib.parse import urlsplit

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet
from aiohttp import ClientError
from filelock import FileLock

from sedtrain.data.parquet import batches
from sedtrain.data.paths import expanded, files_of, local_path
from sedtrain.data.readers import READERS, BrokenFile, one_line, read_rows, suffix_of
from sedtrain.data.sources import hub_or_folder, is_saved, readable
from sedtrain.data.tables import PROBLEM, readable_cells
from sedtrain.data.utterances import as_text, check_columns
from sedtrain.errors import UserError

NUM_ATTEMPTS = 5
FIRST_PAUSE = 1.0  # seconds, doubled after every failure


@dataclass(frozen=True)
class Shard:
    """One file of a split.

    place:  its path or URL
    name:   begins the ids of its rows; no other shard of the split has it
    copies: the folder of all that is fetched or converted, in which each shard has a folder
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
        """Raises BrokenFile, and UserError for a file that cannot be fetched or is of no known format."""
        if not self.is_remote and suffix_of(self.place) == ".tar":
            return read_rows(Path(self.place))  # makes no copy but an index, which other runs can use
        with self.lock():  # no process removes a copy that another has half made
            return read_rows(self.fetched() if self.is_remote else Path(self.place), self.copy)

    def lock(self) -> FileLock:
        """A lock among the processes of a run on this machine; a process may take it twice."""
        self.copies.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{self.copy}.lock", is_singleton=True)

    def texts(self, column: str) -> Iterator[str]:
        """The texts of a column; of a Parquet file no other column is read or fetched.

        Raises as `rows` does, and UserError where there are rows but no such column.
        """
        if suffix_of(file_name(self.place)) != ".parquet":
            rows = self.rows()
            if set(rows.column_names) - {PROBLEM}:
                check_columns({"text": column}, rows.features, self.place)
                yield from map(as_text, rows[column])
            return
        try:
            with ExitStack() as opened:
                content, table = self.parquet(opened)
                schema, num_rows = table.schema_arrow, table.metadata.num_rows
                for group in range(table.num_row_groups) if column in schema.names else ():
                    for batch in batches(table, content, self.place, group, [column]):
                        yield from map(as_text, readable_cells(batch.column(column)))
        except UserError:
            raise
        except (ValueError, OSError, pa.ArrowException) as error:
            raise BrokenFile(self.place, error) from error
        if num_rows:
            check_columns({"text": column}, datasets.Features.from_arrow_schema(schema), self.place)

    def parquet(self, opened: ExitStack) -> tuple[IO[bytes], pa.parquet.ParquetFile]:
        """The opened file, or a copy of it if its server does not give parts of files."""
        content = opened.enter_context(fsspec.open(self.place))
        try:
            return content, opened.enter_context(pa.parquet.ParquetFile(content))
        except ValueError:
            copy = self.fetched() if self.is_remote else Path(self.place)
            content = opened.enter_context(copy.open("rb"))
            return content, opened.enter_context(pa.parquet.ParquetFile(content))

    def fetch_ahead(self) -> None:
        """Begins to fetch a remote file; an error is reported when the file is needed."""

        def fetch_quietly() -> None:
            with suppress(UserError):
                self.fetched()

        if self.is_remote and not self.copy.exists():
            Thread(target=fetch_quietly, daemon=True).start()

    def fetched(self) -> Path:
        """A copy of the remote file, fetched once by all processes of a machine."""
        file = self.copy / file_name(self.place)
        with self.lock():
            self.copy.mkdir(exist_ok=True)
            if not file.exists():
                fetch(self.place, file)
        return file

    def remove_copy(self) -> None:
        if self.copy.exists():
            with self.lock():
                shutil.rmtree(self.copy, ignore_errors=True)  # another process may have done it by now


def fetch(url: str, file: Path) -> None:
    """Raises UserError when the last attempt fails; nothing incomplete is left under the name of `file`."""
    incomplete = file.with_name(f"{file.name}.incomplete")
    for attempt in range(NUM_ATTEMPTS):
        try:
            filesystem, name = fsspec.url_to_fs(url)
            filesystem.get_file(name, str(incomplete))
            incomplete.rename(file)
            return
        except (OSError, ClientError, TimeoutError) as error:
            if attempt == NUM_ATTEMPTS - 1 or isinstance(error, FileNotFoundError):
                raise unreachable(url, error) from error
        time.sleep(FIRST_PAUSE * 2**attempt)


def unreachable(url: str, error: Exception) -> UserError:
    return UserError(
        "data.path", url, f"{url} cannot be fetched ({one_line(error)})", "write a URL that can be reached"
    )


def shards_of(path: str, split: str, name: str | None, copies: Path) -> list[Shard]:
    """The files of one split, or of several joined by +, in order; none for a split that is not stored in files.

    Raises UserError where the split is missing, or a slice of it is asked for.
    """
    if "[" in split:
        wrong = f"{split!r} is a slice of a split, which neither a stream nor a URL has"
        write = "write data.streaming=false for what is not on a server, or a split of its own"
        raise UserError("data.path", path, wrong, write)
    places = [place for each in split.split("+") for place in places_of(path, each, name)]
    return [Shard(place, name, copies) for place, name in zip(places, names_of(places), strict=True)]


def places_of(path: str, split: str, name: str | None) -> list[str]:
    """The paths or URLs of the files of one split."""
    if "://" in path:
        return [place for url in expanded(path.replace("{split}", split)) for place in files_at(url)]
    if files := files_of(path, split):
        return list(map(str, files))
    if is_saved(local_path(path)):
        return []
    with readable(path, split):
        repository, revision = hub_or_folder(path)
        by_split = datasets.load_dataset_builder(repository, name, revision=revision).config.data_files or {}
        places = list(map(str, by_split.get(split, [])))
        return places if all(map(suffix_of, places)) else []


def files_at(url: str) -> list[str]:
    """The URL, or those that a glob stands for. Raises UserError where none is found, or the URL names no file to read."""
    if suffix_of(file_name(url)) is None:
        wrong = "this URL names no file of a format that can be read"
        raise UserError("data.path", url, wrong, f"write a URL of files of one of {', '.join(READERS)}")
    if not {"*", "["} & set(url):
        return [url]
    try:
        filesystem, pattern = fsspec.url_to_fs(url)
        found = sorted(map(filesystem.unstrip_protocol, filesystem.glob(pattern)))
    except (OSError, ClientError, TimeoutError) as error:
        raise unreachable(url, error) from error
    if not found:
        write = "write a glob of files that are there and that the server lists, or {0000..0127} for their numbers"
        raise UserError("data.path", url, "there is no such file", write)
    return found


def file_name(place: str) -> str:
    """The name of a file by its path or URL."""
    return Path(urlsplit(place).path if "://" in place else place).name


def names_of(places: list[str]) -> list[str]:
    """The name of each file without its suffix; with its folders if names alone are not distinct."""
    short = [without_format(file_name(place)) for place in places]
    if len(set(short)) == len(short):
        return short
    common = os.path.commonpath([os.path.dirname(place) for place in places])
    return [without_format(os.path.relpath(place, common)) for place in places]


def without_format(name: str) -> str:
    return name[: len(name) - len(suffix_of(name) or "")]
