"""Rows as columns, whatever their cells hold."""

import json
from collections.abc import Iterable, Iterator
from typing import IO, Any

import datasets
import pyarrow as pa

Row = dict[str, Any]
PROBLEM = "_problem"
"""The column that says why a row cannot be used: `reason` or `reason: detail`."""
MAX_TEXT_BYTES = 2**24  # of a line, and of a file that holds one text
NOT_TEXT = "\0object\0"
"""Prefix of a list or an object that stands where others have text."""


def lines_of(file: IO[bytes]) -> Iterator[bytes | None]:
    """Its lines; None for one that is larger than a text can be, which is never in memory as a whole."""
    while line := file.readline(MAX_TEXT_BYTES + 1):
        if is_giant := len(line) > MAX_TEXT_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_TEXT_BYTES)
        yield None if is_giant else line


def problem(reason: str, detail: str) -> Row:
    return {PROBLEM: f"{reason}: {detail}"}


def as_dataset(rows: Iterable[Row]) -> datasets.Dataset:
    return datasets.Dataset(as_table(rows))


def as_table(rows: Iterable[Row]) -> pa.Table:
    """A table of rows, in which a column whose values have no common type becomes text."""
    columns: dict[str, list[Any]] = {}
    num_rows = 0
    for num_rows, row in enumerate(rows, start=1):
        for name, value in row.items():
            column = columns.setdefault(name, [])
            column += [None] * (num_rows - 1 - len(column)) + [value]
    return pa.table({name: as_array(column + [None] * (num_rows - len(column))) for name, column in columns.items()})


def as_array(values: list[Any]) -> pa.Array:
    """Lists and objects become text too, as files differ in them; an object with the path of audio does not."""
    try:
        cells = pa.array(values)
        if not pa.types.is_nested(cells.type) or (pa.types.is_struct(cells.type) and "path" in cells.type.names):
            return cells
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, UnicodeError):
        pass
    return pa.array([None if value is None or value != value else as_words(value) for value in values])


def as_words(value: Any) -> str:
    words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, dict)):
        words = NOT_TEXT + words
    return words.encode("utf-8", "replace").decode("utf-8")  # JSON can spell halves of characters: \ud800


def with_readable_text(rows: datasets.Dataset, columns: list[str]) -> datasets.Dataset:
    """Replaces texts that are not UTF-8, which any access would fail on, by null and a PROBLEM. Reads no audio."""
    for column in columns:
        cells = rows.with_format("arrow")[column][:]
        if is_readable(cells):
            continue
        texts, is_there = readable_cells(cells), cells.is_valid().to_pylist()
        problems = rows[PROBLEM][:] if PROBLEM in rows.column_names else [None] * len(rows)
        for index, text in enumerate(texts):
            if text is None and is_there[index]:
                problems[index] = f"text that is not UTF-8: column {column}"
        rows = rows.remove_columns([name for name in (column, PROBLEM) if name in rows.column_names])
        rows = rows.add_column(column, pa.array(texts, pa.string())).add_column(PROBLEM, pa.array(problems))
    return rows


def readable_cells(cells: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Cells as plain values; a text that is not UTF-8 is None."""
    if is_readable(cells):
        return list(cells.to_pylist())
    contents = cells.cast(pa.large_binary()).to_pylist()
    return [content if content is None else decoded(content) for content in contents]


def is_readable(cells: pa.Array | pa.ChunkedArray) -> bool:
    if not (pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)):
        return True
    try:
        cells.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def decoded(content: bytes) -> str | None:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
