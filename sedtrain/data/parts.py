"""Parts of a dataset that are opened one by one: the files of a split, here or on a server, or a whole split."""

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
    """Rows that are opened together: one file of a split of a dataset, or the split where it has no files of its own.

    name:   of the split, or of the file among those of the split; ids of rows that have none begin with it
    place:  the path or URL of the file; None for a split
    copies: the folder of all that is fetched or converted, in which each file has a folder
    """

    source: Source
    name: str
    place: str | None = None
    copies: Path = Path()

    @property
    def path(self) -> str:
        """The file or URL, where it is a single one, else what the dataset is read from."""
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
        """Raises UserError where there are no rows of utterances, BrokenFile for a file that cannot be read."""
        return UtteranceRows(self.rows(), self.source, self.name, self.path)

    def rows(self) -> datasets.Dataset:
        """Raises BrokenFile, and UserError for what is not found, cannot be fetched or is of no known format."""
        if self.place is None:
            return load_rows(self.source.path, self.name, self.source.name, self.source.format)
        if not self.is_remote and suffix_of(self.place) == ".tar":
            return read_rows(Path(self.place))  # makes no copy but an index, which other runs can use
        with self.lock():  # no process removes a copy that another has half made
            return read_rows(self.fetched(), self.copy)

    def texts(self, role: str) -> Iterator[str]:
        """The column of a role as text; of a Parquet file no other column is read or fetched. Raises as `open` does."""
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
            except ValueError:  # its server does not give parts of files
                content = opened.enter_context(self.fetched().open("rb"))
                table = opened.enter_context(pa.parquet.ParquetFile(content))
            if not table.metadata.num_rows:
                return
            check_columns({role: column}, datasets.Features.from_arrow_schema(table.schema_arrow), self.place)
            for group in range(table.num_row_groups):
                for batch in batches(table, content, self.place, group, [column]):
                    yield batch.column(column)

    def lock(self) -> FileLock:
        """A lock among the processes of a run on this machine; a process may take it twice."""
        self.copies.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{self.copy}.lock", is_singleton=True)

    def fetched(self) -> Path:
        """The file; a remote one as a copy, fetched once by all processes of a machine."""
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
        """Begins to fetch a remote file; an error is reported when the file is needed."""

        def fetch_quietly() -> None:
            with suppress(UserError):
                self.fetched()

        if self.is_remote and not self.copy.exists():
            Thread(target=fetch_quietly, daemon=True).start()

    def remove_copy(self) -> None:
        """Removes what was fetched or converted; the part can be opened anew."""
        if self.place is not None and self.copy.exists():
            with self.lock():
                shutil.rmtree(self.copy, ignore_errors=True)  # another process may have done it by now


class Parts(Sequence[UtteranceRows]):
    """The rows of each part, opened when they are asked for.

    num_rows: parts stay open that have at least so many rows together; None: all parts
    """

    def __init__(self, parts: Iterable[Part], num_rows: int | None = None) -> None:
        self.parts, self.num_rows = list(parts), num_rows
        self.opened: dict[int, UtteranceRows] = {}  # where some are closed, those used last come last

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
    """The parts of a split (train, validation or test): one, or one for each file; none where the source has no such split.

    copies: where files are opened one by one, the folder of what is fetched or converted for that
    Raises UserError where the split is missing, or a slice of it is asked for file by file.
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
    places = [place for each in name.split("+") for place in places_of(source, each)]
    names = zip(names_of(places), places, strict=True)
    return [Part(source, short, place, copies) for short, place in names] or [Part(source, name)]
