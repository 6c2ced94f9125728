"""JSON lines and comma or tab separated values become rows, whatever is wrong with some of the lines.

A line that cannot be read is a row of which only PROBLEM is known, so that it is counted and listed like all others.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

PROBLEM = "_problem"
"""The column that says why a row cannot be used: `reason` or `reason: detail`."""
NOT_TEXT = "\0object\0"
"""What a list or an object begins with that stands among texts."""

Row = dict[str, Any]
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")  # 007 is text
NEMO_AUDIO = "audio_filepath"
NEMO_OPTIONAL = ("duration", "offset")


def as_dataset(rows: Iterable[Row]) -> datasets.Dataset:
    """Rows by columns; a column of things that no one type can hold becomes text."""
    columns: dict[str, list[Any]] = {}
    number = 0
    for row in rows:
        for name, value in row.items():
            column = columns.setdefault(name, [])
            column.extend([None] * (number - len(column)))
            column.append(value)
        number += 1
    arrays = {name: as_array(column + [None] * (number - len(column))) for name, column in columns.items()}
    return datasets.Dataset(pa.table(arrays))


def as_array(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, UnicodeError):
        return pa.array([None if value is None or value != value else as_words(value) for value in values])


def as_words(value: Any) -> str:
    words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, dict)):
        words = NOT_TEXT + words
    return words.encode("utf-8", "replace").decode("utf-8")  # JSON can spell halves of characters: \ud800


def read_manifest(path: Path) -> datasets.Dataset:
    """The rows of a manifest; by its suffix JSON lines (or one JSON list of objects), tab or comma separated values."""
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return as_dataset(with_numbers(list(csv_rows(path, "\t" if suffix == ".tsv" else ","))))
    rows = as_dataset(json_rows(path))
    if NEMO_AUDIO in rows.column_names:  # NeMo leaves out a duration that is not known and an offset of 0
        for name in NEMO_OPTIONAL:
            if name not in rows.column_names:
                rows = rows.add_column(name, pa.nulls(len(rows), pa.float64()))
    return rows


def json_rows(path: Path) -> Iterator[Row]:
    content = path.read_bytes() if path.suffix.lower() == ".json" else b""
    if content.lstrip().startswith(b"["):
        values = json.loads(content)
        yield from (each if isinstance(each, dict) else problem("broken JSON", "no object") for each in values)
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield json_row(line, f"line {number}")


def json_row(content: bytes, place: str) -> Row:
    try:
        row = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return problem("text that is not UTF-8", place)
    except (ValueError, RecursionError) as error:
        return problem("broken JSON", f"{place}, {str(error).partition(':')[0]}")
    return row if isinstance(row, dict) else problem("broken JSON", f"{place} is no object")


def csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    """Cells as text, empty ones None; tab separated values know no quotes, as in Common Voice."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if delimiter == "\t":
            lines = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        else:
            lines = csv.reader(file, delimiter=delimiter)
        header = next(lines, [])
        for cells in lines:
            place = f"line {lines.line_num}"
            if any("\udc80" <= character <= "\udcff" for cell in cells for character in cell):
                yield problem("text that is not UTF-8", place)
            elif cells and len(cells) != len(header):
                yield problem("broken CSV", f"{place} has {len(cells)} cells, the header {len(header)}")
            elif cells:
                yield {name: cell or None for name, cell in zip(header, cells, strict=True)}


def with_numbers(rows: list[Row]) -> list[Row]:
    """Columns that hold nothing but numbers as numbers."""
    names = {name for row in rows for name in row}
    for name in names - {PROBLEM}:
        cells = [row[name] for row in rows if row.get(name) is not None]
        if cells and all(NUMBER.fullmatch(cell) for cell in cells):
            as_number = int if all(cell.lstrip("-").isdigit() and len(cell) < 19 for cell in cells) else float
            for row in rows:
                if row.get(name) is not None:
                    row[name] = as_number(row[name])
    return rows


def problem(reason: str, detail: str) -> Row:
    return {PROBLEM: f"{reason}: {detail}"}
