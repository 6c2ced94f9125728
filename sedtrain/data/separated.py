"""Reads comma and tab separated values as rows of text; errors name a wrong separator, an open quotation mark and the like."""

import csv
import io
import re
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from sedtrain.data.tables import MAX_TEXT_BYTES, BrokenFile, Row, as_table, problem, refuse_same_names, refuse_utf16

SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "|"}
QUOTED = re.compile(r'"[^"]*(?:""[^"]*)*"')
UNDECODED = re.compile("[\udc80-\udcff]")
MOST_LINES = 200  # of one cell
OPEN = "a quotation mark that is never closed"
FAULTS = {"unexpected end of data": OPEN, "expected after": "text behind a closing quotation mark"}
"""Errors of `csv` in plain words."""
csv.field_size_limit(MAX_TEXT_BYTES)

Cells = tuple[list[str], str | None]
"""The cells of a record and None, or no cells and the error."""


def read_separated(path: Path, delimiter: str = ",") -> Generator[pa.Table]:
    """Yields one table with text in every column. Empty cells are null; each broken line becomes a row with a problem.

    Quotation marks may enclose a cell; marks inside it are doubled. Files with tabs, such as Common Voice's, also have
    unquoted cells with quotation marks; there, a mark that does not enclose a cell is text. Raises BrokenFile.
    """
    content = path.read_bytes()
    refuse_utf16(content[:1000])
    text = content.decode("utf-8-sig", "surrogateescape")  # so that the error can name the line that is not UTF-8
    lines = io.StringIO(text, newline="\n" if "\n" in text else "\r").readlines()
    header = header_of(without_end(lines[0]), delimiter) if lines else []
    yield as_table(separated_rows(lines, header, delimiter), filter(None, header))


def header_of(line: str, delimiter: str) -> list[str]:
    """The column names. Raises BrokenFile for another separator, and for two columns of one name."""
    (cells, wrong), _ = cells_of([line], delimiter)
    header = line.split(delimiter) if wrong else cells
    others = [other for other in SEPARATORS if other != delimiter and any(other in name for name in header)]
    if others and (delimiter == "," or len(header) == 1):
        found = SEPARATORS[max(others, key=line.count)]
        write = "write .csv with commas or .tsv with tabs between columns, and their names in the first line"
        raise BrokenFile(f"its columns are separated by {found}, not by {SEPARATORS[delimiter]}", write)
    refuse_same_names([name for name in header if name])
    return header


def separated_rows(lines: list[str], header: list[str], delimiter: str) -> Iterator[Row]:
    at = 1
    while at < len(lines):
        if len(lines[at]) > MAX_TEXT_BYTES:
            yield problem("text too large", f"line {at + 1}")
            at += 1
            continue
        (cells, wrong), number = record(lines, at, delimiter, len(header))
        position = f"line {at + 1}"
        at += number
        if wrong:
            yield problem("broken CSV", f"{position}, {wrong}")
        elif any(map(UNDECODED.search, cells)):
            yield problem("text that is not UTF-8", position)
        elif cells != [""] and len(cells) != len(header):
            yield problem("broken CSV", f"{position} has {len(cells)} cells, the header {len(header)}")
        elif cells != [""]:
            yield {name: cell or None for name, cell in zip(header, cells, strict=True) if name}


def record(lines: list[str], at: int, delimiter: str, num_columns: int) -> tuple[Cells, int]:
    """The cells of the record that begins at line `at`, and its number of lines."""
    line = without_end(lines[at])
    if '"' not in line:
        return (line.split(delimiter), None), 1
    (cells, wrong), number = cells_of(lines[at : at + MOST_LINES], delimiter)
    if number > 1 and (len(cells) != num_columns or is_left_open(lines[at : at + number], delimiter, num_columns)):
        wrong, number = OPEN, 1
    if wrong and delimiter == "\t":
        found = line.split(delimiter)
        return ([cell[1:-1].replace('""', '"') if QUOTED.fullmatch(cell) else cell for cell in found], None), 1
    return (cells, wrong), number


def cells_of(lines: Sequence[str], delimiter: str) -> tuple[Cells, int]:
    """The cells of the first record in `lines`, and its number of lines."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        return (next(reader) or [""], None), reader.line_num
    except csv.Error as error:
        text = "unexpected end of data" if reader.line_num > 1 else str(error)
        return ([], next((words for part, words in FAULTS.items() if part in text), text)), 1


def is_left_open(lines: Sequence[str], delimiter: str, num_columns: int) -> bool:
    """True if a record of several lines contains a complete row, so that its quotation mark was never closed."""
    before = next(csv.reader(lines[:1], delimiter=delimiter))[:-1]  # the cells before the mark
    is_row = bool(before) and lines[-1].partition('"')[0].count(delimiter) == len(before)
    return is_row or any('"' not in line and line.count(delimiter) == num_columns - 1 for line in lines[1:])


def without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")  # Windows ends lines with both
