"""Rows as columns, whatever their cells hold."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf
from typing import IO, Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

Row = dict[str, Any]
PROBLEM = "_problem"
"""The column that says why a row cannot be used: `reason` or `reason: detail`."""
MOST_COLUMNS = 1000
MAX_TEXT_BYTES = 2**24  # of a line, and of a file that holds one text
NOT_TEXT = "\0object\0"
"""Prefix of a list or an object that stands where others have text."""
WIDEST = {re.compile("u?int"): "int64", re.compile("float"): "float64", re.compile("(large_)?string"): "string"}
PLAIN = re.compile("u?int|float|(large_)?string|bool")
MOST_SECONDS = 1e9  # 32 years; no recording is longer
TIMES = ("seconds", "start", "end")


class OtherFormat(ValueError):
    """A file that is not what its suffix says; the message says what it is, `write` what to write instead."""

    def __init__(self, wrong: str, write: str) -> None:
        super().__init__(wrong)
        self.write = write


def lines_of(file: IO[bytes]) -> Iterator[bytes | None]:
    """Its lines; None for one that is larger than a text can be, which is never in memory as a whole."""
    while line := file.readline(MAX_TEXT_BYTES + 1):
        if is_giant := len(line) > MAX_TEXT_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_TEXT_BYTES)
        yield None if is_giant else line


def problem(reason: str, detail: str) -> Row:
    return {PROBLEM: f"{reason}: {detail}"}


def text_or_problem(content: bytes | None, position: str) -> Row:
    """The content of a line or a file as `text`, or what is wrong with it; None stands for one that is too large."""
    if content is None:
        return problem("text too large", position)
    text = decoded(content)
    return problem("text that is not UTF-8", position) if text is None else {"text": text}


def refuse_utf16(beginning: bytes) -> None:
    """Raises OtherFormat for UTF-16 and UTF-32, which have a mark at their beginning or many zeros."""
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or beginning.count(0) > len(beginning) / 4:
        raise OtherFormat("its text is UTF-16 or UTF-32, not UTF-8", "write it as UTF-8")


def in_words(names: Iterable[str]) -> str:
    """The names of columns; those with spaces around them in quotation marks."""
    return ", ".join(name if name == name.strip() else repr(name) for name in names if name != PROBLEM)


def refuse_same_names(names: Sequence[str]) -> None:
    """Raises OtherFormat where two columns have one name: nothing says which is meant."""
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise OtherFormat(f"two columns are called {twice!r}", "write columns of different names")


def as_table(rows: Iterable[Row], names: Iterable[str] = ()) -> pa.Table:
    """A table of rows, in which a column whose values have no common type becomes text.

    names: columns that it has although no row may have them
    Raises OtherFormat for more names than a table has: each would be a column as long as all rows.
    """
    columns: dict[str, list[Any]] = {name: [] for name in names}
    num_rows = 0
    for num_rows, row in enumerate(rows, start=1):
        for name, value in row.items():
            column = columns.setdefault(name, [])
            if len(columns) > MOST_COLUMNS:
                wrong = f"it has more than {MOST_COLUMNS:,} columns: names of values, perhaps, where names of columns belong"
                raise OtherFormat(wrong, "write data.path=FILE in which all rows have the same few columns")
            column += [None] * (num_rows - 1 - len(column)) + [value]
    return pa.table({name: as_array(column + [None] * (num_rows - len(column))) for name, column in columns.items()})


def as_array(values: list[Any]) -> pa.Array:
    """Lists and objects become text too, as files differ in them; an object with the path of audio does not.

    Whole numbers beside fractions become text, as 7 would become 7.0.
    """
    try:
        cells = pa.array(values)
        if pa.types.is_floating(cells.type) and any(type(value) is int for value in values):
            return as_texts(values)
        if not pa.types.is_nested(cells.type) or (pa.types.is_struct(cells.type) and "path" in cells.type.names):
            return cells
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, UnicodeError):
        pass
    return as_texts(values)


def as_texts(values: Iterable[Any]) -> pa.Array:
    return pa.array([None if value is None or value != value else as_words(value) for value in values], pa.string())


def as_words(value: Any) -> str:
    words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, dict)):
        words = NOT_TEXT + words
    return words.encode("utf-8", "replace").decode("utf-8")  # JSON can spell halves of characters: \ud800


def joined(tables: list[datasets.Dataset]) -> datasets.Dataset:
    """The rows of all; a column of different types, such as whole numbers and fractions, holds text."""
    dtypes: dict[str, set[str]] = {}
    for table in tables:
        for name, feature in table.features.items():
            dtypes.setdefault(name, set()).add(getattr(feature, "dtype", "null"))
    several = {name: found - {"null"} for name, found in dtypes.items() if len(found - {"null"}) > 1}
    for number, table in enumerate(tables):
        for name in set(several).intersection(table.column_names):
            if wide := next((wide for kind, wide in WIDEST.items() if all(map(kind.match, several[name]))), None):
                table = table.cast_column(name, datasets.Value(wide))
            elif all(map(PLAIN.match, several[name])):
                texts = as_texts(table[name][:])
                table = table.remove_columns(name).add_column(name, texts)
        tables[number] = table
    return datasets.concatenate_datasets(tables)


def by_role(rows: datasets.Dataset, columns: Mapping[str, str | None]) -> tuple[pa.Table, dict[int, str]]:
    """A table with a column for each role, null where the dataset has none, and the problems of rows by their number.

    `seconds` is the length that columns give, also by start and end; `end` is also where they give start and length.
    Texts that are not UTF-8, which any access would fail on, and impossible times are null, with a problem. Columns that
    are as they should be are not copied: they stay in their file.
    """
    used = {PROBLEM, *columns.values()}
    stored = rows.select_columns([name for name in rows.column_names if name in used]).with_format("arrow")[:]
    cells, problems = {}, {}
    if PROBLEM in stored.column_names:
        rows_of_problems = rows_where(stored[PROBLEM].is_valid()).to_pylist()
        problems = dict(zip(rows_of_problems, stored[PROBLEM].drop_null().to_pylist(), strict=True))
    for role, column in columns.items():
        if column is None or column not in stored.column_names:
            cells[role] = pa.chunked_array([pa.nulls(len(rows))])
        else:
            cells[role], wrong = (as_times if role in TIMES else readable)(stored[column], column)
            problems = wrong | problems
    if columns["start"] or columns["end"]:
        start, end, seconds = (cells[role].cast(pa.float64()) for role in ("start", "end", "seconds"))
        given = pc.if_else(end.is_valid(), pc.subtract(end, start.fill_null(0)), seconds)
        cells["seconds"] = pc.if_else(pc.greater_equal(given, 0), given, None)
        cells["end"] = pc.coalesce(end, pc.add(start, seconds))
    return pa.table(cells), problems


def rows_where(mask: pa.ChunkedArray) -> pa.Array:
    """The rows that a mask marks; also of no chunk, which pyarrow before 26 dies of."""
    return pc.indices_nonzero(mask.combine_chunks())


def readable(cells: pa.ChunkedArray, column: str) -> tuple[pa.ChunkedArray, dict[int, str]]:
    """The cells, null where a text is not UTF-8, and the problems by row."""
    if is_readable(cells):
        return cells, {}
    texts = pa.chunked_array([pa.array(readable_cells(cells), pa.string())])
    broken = rows_where(pc.and_(cells.is_valid(), texts.is_null())).to_pylist()
    return texts, dict.fromkeys(broken, f"text that is not UTF-8: column {column}")


def as_times(cells: pa.ChunkedArray, column: str) -> tuple[pa.ChunkedArray, dict[int, str]]:
    """Seconds as numbers, also where text spells them, and the problems by row of what is no time, which becomes null.

    NaN is an empty cell, as tables of pandas have it.
    """
    cells, broken = readable(cells, column)
    spelt = cells.to_pylist() if is_text(cells.type) else None
    times = cells.cast(pa.float64()) if spelt is None else pa.chunked_array([[time_of(value) for value in spelt]])
    wrong = pc.or_(pc.less(times, 0), pc.greater(times, MOST_SECONDS)).fill_null(False)
    found = rows_where(wrong).to_pylist()
    values = [spelt[index] for index in found] if spelt else [times[index].as_py() for index in found]
    is_empty = pc.or_(wrong, pc.is_nan(times))
    if pc.any(is_empty).as_py():
        times = pc.if_else(is_empty, None, times)
    problems = (f"impossible time: {column} = {value:.12}" for value in values)
    return times, broken | dict(zip(found, problems, strict=True))


def time_of(value: str | None) -> float | None:
    """A spelt number; infinity for what is none."""
    try:
        return value if value is None else float(value) if "_" not in value else inf
    except ValueError:
        return inf


def readable_cells(cells: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Cells as plain values; a text that is not UTF-8 is None."""
    if is_readable(cells):
        return list(cells.to_pylist())
    contents = cells.cast(pa.large_binary()).to_pylist()
    return [content if content is None else decoded(content) for content in contents]


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_readable(cells: pa.Array | pa.ChunkedArray) -> bool:
    if not is_text(cells.type):
        return True
    try:
        cells.validate(full=True)
        return True
    except pa.ArrowInvalid:
        return False


def decoded(content: bytes) -> str | None:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
