"""Turns rows with any cells into tables of text, and marks rows that cannot be used."""

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa

Row = dict[str, Any]
PROBLEM = "_problem"
"""The column with the reason why a row cannot be used: `reason` or `reason: detail`."""
MOST_COLUMNS = 1000
MAX_TEXT_BYTES = 2**24  # of a line, and of a file that holds a single text
NOT_TEXT = "\0object\0"
"""Prefix that marks a list or an object in a column of text."""


class BrokenFile(ValueError):
    """A file that cannot be read at all, or that its suffix misdescribes. write: advice for the message, if there is any"""

    def __init__(self, wrong: str, write: str | None = None, file: str | Path = "") -> None:
        super().__init__(wrong)
        self.write, self.file = write, file


def lines_of(file: IO[bytes]) -> Iterator[bytes | None]:
    """Yields the lines of a file; None for a line above MAX_TEXT_BYTES, which is never in memory as a whole."""
    while line := file.readline(MAX_TEXT_BYTES + 1):
        if is_giant := len(line) > MAX_TEXT_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_TEXT_BYTES)
        yield None if is_giant else line


def problem(reason: str, detail: str) -> Row:
    return {PROBLEM: f"{reason}: {detail}"}


def text_or_problem(content: bytes | None, position: str) -> Row:
    """The content of a line or a file as `text`, or its problem. content: None for one that is too large"""
    if content is None:
        return problem("text too large", position)
    text = decoded(content)
    return problem("text that is not UTF-8", position) if text is None else {"text": text}


def refuse_utf16(beginning: bytes) -> None:
    """Raises BrokenFile for UTF-16 and UTF-32, which begin with a byte order mark or contain many zeros."""
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or beginning.count(0) > len(beginning) / 4:
        raise BrokenFile("its text is UTF-16 or UTF-32, not UTF-8", "write it as UTF-8")


def in_words(names: Iterable[str]) -> str:
    """The names of columns as text; quotes names with surrounding spaces."""
    return ", ".join(name if name == name.strip() else repr(name) for name in names if name != PROBLEM)


def refuse_same_names(names: Sequence[str]) -> None:
    """Raises BrokenFile if two columns have one name, since nothing tells which one is meant."""
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise BrokenFile(f"two columns are called {twice!r}", "write columns of different names")


def as_table(rows: Iterable[Row], names: Iterable[str] = ()) -> pa.Table:
    """A table of rows with text in every column.

    names: columns that the table has even if no row has them
    Raises BrokenFile for more than MOST_COLUMNS names, because each becomes a column as long as all rows.
    """
    columns: dict[str, list[Any]] = {name: [] for name in names}
    num_rows = 0
    for num_rows, row in enumerate(rows, start=1):
        for name, value in row.items():
            column = columns.setdefault(name, [])
            if len(columns) > MOST_COLUMNS:
                wrong = f"it has more than {MOST_COLUMNS:,} columns: names of values, perhaps, where names of columns belong"
                raise BrokenFile(wrong, "write data.path=FILE in which all rows have the same few columns")
            column += [None] * (num_rows - 1 - len(column)) + [value]
    return pa.table({name: as_array(column + [None] * (num_rows - len(column))) for name, column in columns.items()})


def as_array(values: list[Any]) -> pa.Array:
    """The values as text, because files differ in their types; only objects with an audio path stay objects."""
    unfit = (pa.ArrowException, UnicodeError, OverflowError)
    with suppress(*unfit):
        return pa.array(values, pa.string())
    with suppress(*unfit):
        objects = pa.array(values)
        if pa.types.is_struct(objects.type) and "path" in objects.type.names:
            return objects
    return pa.array(map(as_words, values), pa.string())


def as_words(value: Any) -> str | None:
    """A cell as text; true and false as in JSON; None for null and NaN."""
    if value is None or value != value:
        return None
    words = str(value)
    if isinstance(value, bool):
        words = words.lower()
    elif isinstance(value, (list, dict)):
        words = NOT_TEXT + json.dumps(value, ensure_ascii=False, default=str)
    return words.encode("utf-8", "replace").decode("utf-8")  # JSON can contain half a surrogate pair: \ud800


def joined(tables: Sequence[datasets.Dataset]) -> datasets.Dataset:
    """The rows of all tables; numbers take the wider type. Raises ArrowTypeError if other types of a column differ."""
    if len(tables) == 1:
        return tables[0]
    rows = pa.concat_tables([table.with_format("arrow")[:] for table in tables], promote_options="permissive")
    return datasets.Dataset(
        rows, fingerprint=datasets.fingerprint.Hasher.hash([table._fingerprint for table in tables])
    )


def as_texts(cells: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    """Cells as text; text columns are not copied. Empty cells and text that is not UTF-8 are null."""
    if not is_text(cells.type):
        return pa.chunked_array([pa.array(map(as_words, cells.to_pylist()), pa.string())])
    try:
        cells.validate(full=True)
        return cells
    except pa.ArrowInvalid:
        contents = cells.cast(pa.large_binary()).to_pylist()
        return pa.chunked_array([[None if cell is None else decoded(cell) for cell in contents]], pa.string())


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def decoded(content: bytes) -> str | None:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
