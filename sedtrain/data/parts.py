"""Opens a dataset part by part; a part is one file of a split, local or on a server, or a whole split."""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet
from filelock import FileLock

from sedtrain.data.load_rows import load_rows, places_of
from sedtrain.data.parquet import batches
from sedtrain.data.paths import fetch, file_name, local_path, names_of, split_files
from sedtrain.data.readers import read_rows, reading, suffix_of
from sedtrain.data.roles import check_columns, cleaned
from sedtrain.data.source import Source
from sedtrain.data.tables import as_texts
from sedtrain.data.utterances import UtteranceRows
from sedtrain.errors import UserError


@dataclass(frozen=True)
class Part:
    """Rows that are opened together: one file of a split, or the whole split.

    name:   name of the split, or of the file within the split; rows without an id get ids that begin with it
    place:  path or URL of the file; None for a whole split
    copies: folder for fetched and converted files; each file has a subfolder
    """

    source: Source
    name: str
    place: str | None = None
    copies: Path = Path()

    @property
    def path(self) -> str:
        """The file or URL if the rows come from a single one, else the path of the dataset."""
        folder = local_path(self.source.path)
        if self.place is not None or not folder.exists():
            return self.place or self.source.path
        is_split = folder.is_dir() and not self.source.format
        files = split_files(folder, self.name.partition("[")[0]) if is_split else []
        return str(files[0] if len(files) == 1 else folder)

    @property
    def copy(self) -> Path:
        return self.copies / hashlib.sha256(str(self.place).encode()).hexdigest()[:32]

    @property
    def is_remote(self) -> bool:
        return "://" in str(self.place)

    def open(self) -> UtteranceRows:
        """Raises UserError if the rows are no utterances, and BrokenFile for a file that cannot be read."""
        return UtteranceRows(self.rows(), self.source, self.name, self.path)

    def rows(self) -> datasets.Dataset:
        """Raises BrokenFile, and UserError if the file is missing, cannot be fetched or has an unknown format."""
        if self.place is None:
            return load_rows(self.source.path, self.name, self.source.name, self.source.format)
        if not self.is_remote and suffix_of(self.place) == ".tar":
            return read_rows(Path(self.place))  # makes only an index, which other runs can use
        with self.lock():  # else a process could remove a copy that another is making
            return read_rows(self.fetched(), self.copy)

    def texts(self, role: str) -> Iterator[str]:
        """Yields the column of a role as text; reads only that column of a Parquet file. Raises as `open` does."""
        if self.place is not None and suffix_of(file_name(self.place)) == ".parquet":
            for cells in self.parquet_cells(role):
                yield from (text or "" for text in cleaned(as_texts(cells)).to_pylist())
            return
        rows = self.open()
        for chunk in rows.chunks():
            for index, text in zip(chunk, rows.cells(role, chunk), strict=True):
                if text is not None or index not in rows.problems:
                    yield text or ""

    def parquet_cells(self, role: str) -> Iterator[pa.Array]:
        assert self.place is not None
        column = getattr(self.source.columns, role)
        with reading(self.place), ExitStack() as opened:
            content = opened.enter_context(fsspec.open(self.place))
            try:
                table = opened.enter_context(pa.parquet.ParquetFile(content))
            except ValueError:  # the server does not send parts of files
                content = opened.enter_context(self.fetched().open("rb"))
                table = opened.enter_context(pa.parquet.ParquetFile(content))
            if not table.metadata.num_rows:
                return
            check_columns({role: column}, datasets.Features.from_arrow_schema(table.schema_arrow), self.place)
            for group in range(table.num_row_groups):
                for batch in batches(table, content, self.place, group, [column]):
                    yield batch.column(column)

    def lock(self) -> FileLock:
        """A lock shared by the processes of a run on this machine; a process may take it twice."""
        self.copies.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{self.copy}.lock", is_singleton=True)

    def fetched(self) -> Path:
        """The local file, or the copy of a remote file, which one process of a machine fetches for all."""
        assert self.place is not None
        if not self.is_remote:
            return Path(self.place)
        file = self.copy / file_name(self.place)
        with self.lock():
            self.copy.mkdir(exist_ok=True)
            if not file.exists():
                fetch(self.place, file)
        return file

    def fetch_ahead(self) -> None:
        """Starts to fetch a remote file in a thread; an error is reported when the file is needed."""

        def fetch_quietly() -> None:
            with suppress(UserError):
                self.fetched()

        if self.is_remote and not self.copy.exists():
            Thread(target=fetch_quietly, daemon=True).start()

    def remove_copy(self) -> None:
        """Removes the fetched and converted files; the part can be opened again."""
        if self.place is not None and self.copy.exists():
            with self.lock():
                shutil.rmtree(self.copy, ignore_errors=True)  # another process may have done it by now


class Parts(Sequence[UtteranceRows]):
    """The rows of each part, opened on first use.

    num_rows: closes the least recently used part while the others have at least this many rows; None: closes none
    """

    def __init__(self, parts: Iterable[Part], num_rows: int | None = None) -> None:
        self.parts, self.num_rows = list(parts), num_rows
        self.opened: dict[int, UtteranceRows] = {}  # in order of last use if `num_rows` is given

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> UtteranceRows:  # type: ignore[override]
        found = self.opened.get(number)
        rows = self.parts[number].open() if found is None else found
        if found is None or self.num_rows is not None:
            self.opened.pop(number, None)
            self.opened[number] = rows
            self.close_oldest()
        return rows

    def close_oldest(self) -> None:
        for oldest in list(self.opened)[:-1]:
            if self.num_rows is None or sum(map(len, list(self.opened.values())[1:])) < self.num_rows:
                break
            self.opened.pop(oldest, None)

    def remove_copy(self, number: int) -> None:
        self.opened.pop(number, None)
        self.parts[number].remove_copy()


def parts_of(source: Source, split: str, copies: Path | None = None) -> list[Part]:
    """The parts of a split (train, validation or test); no parts if the source does not have the split.

    copies: folder for fetched and converted files, if each file is to be a part; None: the split is one part
    Raises UserError if the split is missing, or if a slice of a split is to be read file by file.
    """
    name = source.splits[split]
    if name is None:
        return []
    if copies is None or source.format:
        return [Part(source, name)]
    if "[" in name:
        wrong = f"{name!r} is a slice of a split, which neither a stream nor a URL has"
        write = "write data.streaming=false for what is not on a server, or a split of its own"
        raise UserError("data.path", source.path, wrong, write)
    places = [place for summand in name.split("+") for place in places_of(source, summand)]
    names = zip(names_of(places), places, strict=True)
    return [Part(source, short, place, copies) for short, place in names] or [Part(source, name)]
