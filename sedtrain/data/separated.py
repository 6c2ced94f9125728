"""Comma and tab separated values as rows, each cell as it is written; what is something else is named for what it is."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from sedtrain.data.tables import MAX_TEXT_BYTES, OtherFormat, Row, as_table, problem, refuse_twins, text_of_file

SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "|"}
QUOTED = re.compile(r'"[^"]*(?:""[^"]*)*"(?!")')
UNDECODED = re.compile("[\udc80-\udcff]")
MOST_LINES = 200  # of one cell
OPEN = "a quotation mark that is never closed"
BEHIND = "text behind a closing quotation mark"

Cells = tuple[list[str], str | None]
"""The cells of a record and None, or those before a fault and what it is."""


def read_separated(path: Path, delimiter: str) -> pa.Table:
    """Text in every column. Empty cells are null, broken lines a problem of their own.

    A cell in quotation marks, with marks inside doubled, is what stands between them. Tab separated values are also
    written without that, as in Common Voice: any other mark in them is text. Raises OtherFormat.
    """
    text = text_of_file(path)
    lines = io.StringIO(text, newline="\n" if "\n" in text else "\r").readlines()
    header = header_of(without_end(lines[0]), delimiter) if lines else []
    return as_table(separated_rows(lines, header, delimiter), filter(None, header))


def header_of(line: str, delimiter: str) -> list[str]:
    """The names of the columns. Raises OtherFormat for other separators, and for two columns of one name."""
    cells, wrong = cells_of(line, delimiter)
    header = line.split(delimiter) if wrong else cells
    others = [other for other in SEPARATORS if other != delimiter and any(other in name for name in header)]
    if others and (delimiter == "," or len(header) == 1):
        found = SEPARATORS[max(others, key=line.count)]
        write = "write .csv with commas or .tsv with tabs between columns, and their names in the first line"
        raise OtherFormat(f"its columns are separated by {found}, not by {SEPARATORS[delimiter]}", write)
    refuse_twins([name for name in header if name])
    return header


def separated_rows(lines: list[str], header: list[str], delimiter: str) -> Iterator[Row]:
    at = 1
    while at < len(lines):
        if len(lines[at]) > MAX_TEXT_BYTES:
            yield problem("text too large", f"line {at + 1}")
            at += 1
            continue
        (cells, wrong), number = record(lines, at, delimiter, len(header))
        if wrong:
            yield problem("broken CSV", f"line {at + 1}, {wrong}")
        elif cells != [""]:
            yield row_of(cells, header, f"line {at + 1}")
        at += number


def row_of(cells: list[str], header: list[str], position: str) -> Row:
    if any(map(UNDECODED.search, cells)):
        return problem("text that is not UTF-8", position)
    if len(cells) != len(header):
        return problem("broken CSV", f"{position} has {len(cells)} cells, the header {len(header)}")
    return {name: cell or None for name, cell in zip(header, cells, strict=True) if name}


def record(lines: list[str], at: int, delimiter: str, num_columns: int) -> tuple[Cells, int]:
    """The cells of the record that begins in a line, and its number of lines."""
    line = without_end(lines[at])
    if '"' not in line:
        return (line.split(delimiter), None), 1
    found, number = cells_of(line, delimiter), 1
    if found[1] == OPEN:
        found, number = joined(lines, at, delimiter, num_columns)
    if found[1] and delimiter == "\t":
        return ([unquoted(cell) for cell in line.split(delimiter)], None), 1
    return found, number


def joined(lines: list[str], at: int, delimiter: str, num_columns: int) -> tuple[Cells, int]:
    """The cells of a record that several lines may belong to. Where one of these is a row, a mark was left open instead."""
    before, _ = cells_of(without_end(lines[at]), delimiter)
    for end in range(at + 1, min(at + MOST_LINES, len(lines))):
        if '"' not in lines[end]:
            if lines[end].count(delimiter) == num_columns - 1:
                break
            continue
        found = cells_of(without_end("".join(lines[at : end + 1])), delimiter)
        if found[1] != OPEN:
            is_row = before and lines[end].partition('"')[0].count(delimiter) == len(before)
            if found[1] or is_row or len(found[0]) != num_columns:
                break
            return found, end + 1 - at
    return (before, OPEN), 1


def cells_of(text: str, delimiter: str) -> Cells:
    cells: list[str] = []
    at = 0
    while at <= len(text):
        end = text.find(delimiter, at) % (len(text) + 1)
        if text.startswith('"', at):
            if (match := QUOTED.match(text, at)) is None:
                return cells, OPEN
            end = match.end()
        if text[end : end + 1] not in ("", delimiter):
            return cells, BEHIND
        cells.append(unquoted(text[at:end]))
        at = end + 1
    return cells, None


def unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if QUOTED.fullmatch(cell) else cell


def without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")  # some end in both
