"""Reads the rows of a Parquet file in bounded memory: compression and dictionaries can unfold few bytes to any size.

Arrow allocates each page of a column by the page's own header, and ignores the totals of the file. So the page headers
are checked here first.
"""

import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet

from sedtrain.errors import UserError

ROWS_AT_ONCE = 10_000
MEMORY = 2**27  # bytes of the rows read at once, unless a single row takes more
ROW_BYTES = 64  # smallest cost of a row
OF_COLUMN, OF_FILE = 100, 1000  # factors by which an unfolded column, or a file's copy, may exceed its stored size
HEADER_BYTES = (2**8, 2**16, 2**24)  # enough for most headers; with long statistics; the longest that Arrow reads
DEPTH = 3  # of structs: header, kind of page, statistics
TRUE, FALSE, I16, I32, I64, BINARY, STRUCT = 1, 2, 4, 5, 6, 8, 12  # types of Thrift
UNCOMPRESSED, COMPRESSED = (2, I32), (3, I32)
NUM_VALUES = (1, I32)
ENCODINGS = {(5, STRUCT): (2, I32), (8, STRUCT): (4, I32)}  # of data pages, versions 1 and 2
ONCE_EACH = {0, 3, 4}  # plain, RLE and bit-packed: encodings that store every cell separately


def batches(
    file: pa.parquet.ParquetFile, content: IO[bytes], place: str, group: int, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yields the rows of a row group, a few at a time. Raises UserError for columns that unfold beyond OF_COLUMN.

    content: the same file, to read the headers of pages
    A column that repeats cells stores each distinct cell once. So one row never takes more than all stored columns.
    """
    stored = file.metadata.row_group(group)
    chunks = [stored.column(number) for number in range(stored.num_columns)]
    chunks = [chunk for chunk in chunks if columns is None or chunk.path_in_schema.split(".")[0] in columns]
    size = repeating = total = 0
    for chunk in chunks:
        unfolded, is_repeating = pages_of(content, chunk)
        part = f"row group {group}, column {chunk.path_in_schema}"
        refuse_beyond(OF_COLUMN, chunk.total_compressed_size, unfolded, place, part, MEMORY / 4)
        size, repeating = size + unfolded, repeating + unfolded * is_repeating
        total += chunk.total_compressed_size
    refuse_beyond(OF_COLUMN, total, size, place, f"row group {group}")  # a page of each column is in memory at once
    average = size // max(1, stored.num_rows)
    num_rows = min(ROWS_AT_ONCE, max(1, MEMORY // max(1, repeating, average)))
    yield from file.iter_batches(num_rows, row_groups=[group], columns=columns)


def refuse_unfolding(tables: Iterator[pa.Table], path: Path) -> Iterator[pa.Table]:
    """Yields the tables. Raises UserError once they exceed OF_FILE times the size of the file."""
    stored, total = path.stat().st_size, 0
    for table in tables:
        total += table.nbytes + ROW_BYTES * len(table)
        refuse_beyond(OF_FILE, stored, total, str(path), "its rows")
        yield table


def refuse_unpacking(path: str, place: str) -> None:
    """Raises UserError for a packed file, such as .jsonl.gz, that unfolds beyond OF_COLUMN times its size."""
    stored, total = os.path.getsize(path), 0
    for size in unpacked_sizes(path, place):
        total += size
        refuse_beyond(OF_COLUMN, stored, total, place, "all of it")


def unpacked_sizes(path: str, place: str) -> Iterator[int]:
    """Yields the unpacked bytes of each block; for a zip, the sizes listed for its members, which unpacking never exceeds."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as members:
            yield from (member.file_size for member in members.infolist())
        return
    with fsspec.open(path, compression=fsspec.utils.infer_compression(place)) as content:
        while block := content.read(2**20):
            yield len(block)


def refuse_beyond(times: int, stored: int, size: int, place: str, part: str, least: float = 0) -> None:
    """Raises UserError if `stored` bytes unfold to more than `times` as many, and to more than `least` (else MEMORY)."""
    if size > max(least or MEMORY, times * stored):
        unfolded = f"{stored:,} bytes unfold to {size / 1e6:,.0f} MB or more"
        wrong = f"this file would fill memory and disk: of {part}, {unfolded}"
        raise UserError("data.path", place, wrong, "write data.path=FILE from a source that you trust")


# --- page headers: structs in the compact protocol of Thrift

Fields = dict[tuple[int, int], Any]
"""The values of a struct, by number and type of the field."""


def pages_of(content: IO[bytes], chunk: pa.parquet.ColumnChunkMetaData) -> tuple[int, bool]:
    """Least bytes of a column in memory with all its pages read, and True if its encoding repeats cells."""
    headers = list(page_headers(content, chunk))
    data = [(header[kind], encoding) for header in headers for kind, encoding in ENCODINGS.items() if kind in header]
    num_values = max(chunk.num_values, sum(page.get(NUM_VALUES, 0) for page, _ in data))
    size = max(chunk.total_uncompressed_size, sum(header[UNCOMPRESSED] for header in headers))
    is_repeating = any(page.get(encoding, 0) not in ONCE_EACH for page, encoding in data)
    return max(size, 4 * num_values) if ".list." in chunk.path_in_schema else size, is_repeating


def page_headers(content: IO[bytes], chunk: pa.parquet.ColumnChunkMetaData) -> Iterator[Fields]:
    """Yields the header of each page. Raises pyarrow.ArrowInvalid for a header that no writer makes."""
    at = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < at:
        at = chunk.dictionary_page_offset
    end = at + chunk.total_compressed_size if chunk.num_values else at  # the offsets of an empty column lie apart
    while at < end:
        header, length = header_at(content, at)
        if min(header.get(UNCOMPRESSED, -1), header.get(COMPRESSED, -1)) < 0:
            raise pa.ArrowInvalid("a page has no size")
        yield header
        at += length + header[COMPRESSED]


def header_at(content: IO[bytes], at: int) -> tuple[Fields, int]:
    for length in HEADER_BYTES:
        content.seek(at)
        with suppress(IndexError):
            return struct_at(content.read(length), 0)
    raise pa.ArrowInvalid("a page has no header")


def struct_at(content: bytes, at: int, depth: int = DEPTH) -> tuple[Fields, int]:
    """A struct in Thrift's compact protocol, without its texts, and the position of its end.

    Raises IndexError if the content ends inside it, and pyarrow.ArrowInvalid for fields that no page header has.
    """
    fields: Fields = {}
    number = 0
    while head := content[at]:
        delta, kind = divmod(head, 16)
        number, at = (number + delta, at + 1) if delta else integer_at(content, at + 1)
        if (number, kind) in fields or kind not in (TRUE, FALSE, I16, I32, I64, BINARY, STRUCT) or not depth:
            raise pa.ArrowInvalid("a page has a header that no writer makes")
        fields[number, kind] = None
        if kind == STRUCT:
            fields[number, kind], at = struct_at(content, at, depth - 1)
        elif kind == BINARY:
            length, at = varint_at(content, at)
            at += length
        elif kind not in (TRUE, FALSE):
            fields[number, kind], at = integer_at(content, at)
    return fields, at + 1


def integer_at(content: bytes, at: int) -> tuple[int, int]:
    value, at = varint_at(content, at)
    return value >> 1 ^ -(value & 1), at


def varint_at(content: bytes, at: int) -> tuple[int, int]:
    """A number and the position of its end. Each byte holds seven bits, lowest first; its eighth bit marks a further byte."""
    value = 0
    for shift in range(0, 70, 7):
        value |= (content[at] & 127) << shift
        at += 1
        if content[at - 1] < 128:
            return value, at
    raise pa.ArrowInvalid("a page has a number that is too large")
