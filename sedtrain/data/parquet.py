"""Rows of a Parquet file in bounded memory: compression and dictionaries let a few bytes stand for any number of them.

Arrow makes room for the pages of a column by their own headers, whatever the file says of all of them: these are read here.
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
MEMORY = 2**27  # bytes of the rows at once, unless a single row takes more
ROW_BYTES = 64  # that a row takes at least, whatever it holds
OF_COLUMN, OF_FILE = 100, 1000  # times that a column, or the copy of a file, may be larger than what is stored of it
HEADER_BYTES = (2**8, 2**16, 2**24)  # most headers, those with long statistics, the longest that Arrow reads
DEPTH = 3  # of structs: header, kind of page, statistics
TRUE, FALSE, I16, I32, I64, BINARY, STRUCT = 1, 2, 4, 5, 6, 8, 12  # types of Thrift
UNCOMPRESSED, COMPRESSED = (2, I32), (3, I32)
NUM_VALUES = (1, I32)
ENCODINGS = {(5, STRUCT): (2, I32), (8, STRUCT): (4, I32)}  # of a page of data, in its first and second version
ONCE_EACH = {0, 3, 4}  # plain, RLE and bit-packed: encodings that store each cell by itself


def batches(
    file: pa.parquet.ParquetFile, content: IO[bytes], place: str, group: int, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows of a row group, a few at a time. Raises UserError for columns that unfold beyond what data do.

    content: the same file, from which the headers of pages are read
    Other encodings repeat cells, each of which is in the column at least once: no row takes more than the columns.
    """
    stored = file.metadata.row_group(group)
    chunks = [stored.column(number) for number in range(stored.num_columns)]
    chunks = [each for each in chunks if columns is None or each.path_in_schema.split(".")[0] in columns]
    size = repeating = total = 0
    for each in chunks:
        unfolded, is_repeating = pages_of(content, each)
        part = f"row group {group}, column {each.path_in_schema}"
        refuse_beyond(OF_COLUMN, each.total_compressed_size, unfolded, place, part, MEMORY / 4)
        size, repeating = size + unfolded, repeating + unfolded * is_repeating
        total += each.total_compressed_size
    refuse_beyond(OF_COLUMN, total, size, place, f"row group {group}")  # a page of each column is in memory at once
    average = size // max(1, stored.num_rows)
    num_rows = min(ROWS_AT_ONCE, max(1, MEMORY // max(1, repeating, average)))
    yield from file.iter_batches(num_rows, row_groups=[group], columns=columns)


def refuse_unfolding(tables: Iterator[pa.Table], path: Path) -> Iterator[pa.Table]:
    """Yields the tables. Raises UserError where they have become more than a file of this size can mean."""
    stored, total = path.stat().st_size, 0
    for table in tables:
        total += table.nbytes + ROW_BYTES * len(table)
        refuse_beyond(OF_FILE, stored, total, str(path), "its rows")
        yield table


def refuse_unpacking(path: str, place: str) -> None:
    """Raises UserError for a packed file, such as .jsonl.gz, that unfolds beyond what data do."""
    stored, total = os.path.getsize(path), 0
    for size in unpacked_sizes(path, place):
        total += size
        refuse_beyond(OF_COLUMN, stored, total, place, "all of it")


def unpacked_sizes(path: str, place: str) -> Iterator[int]:
    """The bytes of a packed file, a block after the other; of a zip, those of its members, which are never exceeded."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as members:
            yield from (member.file_size for member in members.infolist())
        return
    with fsspec.open(path, compression=fsspec.utils.infer_compression(place)) as content:
        while block := content.read(2**20):
            yield len(block)


def refuse_beyond(times: int, stored: int, size: int, place: str, part: str, least: float = 0) -> None:
    """Raises UserError where what is stored unfolds to more than so many times as much, and to more than `least` or MEMORY."""
    if size > max(least or MEMORY, times * stored):
        unfolded = f"{stored:,} bytes unfold to {size / 1e6:,.0f} MB or more"
        wrong = f"this file would fill memory and disk: of {part}, {unfolded}"
        raise UserError("data.path", place, wrong, "write data.path=FILE from a source that you trust")


# --- headers of pages, structs in the compact protocol of Thrift

Fields = dict[tuple[int, int], Any]
"""The values of a struct, by number and type of the field."""


def pages_of(content: IO[bytes], chunk: pa.parquet.ColumnChunkMetaData) -> tuple[int, bool]:
    """Bytes that a column takes in memory at least, once all of its pages are read; and whether these repeat cells."""
    headers = list(page_headers(content, chunk))
    data = [(header[kind], encoding) for header in headers for kind, encoding in ENCODINGS.items() if kind in header]
    num_values = max(chunk.num_values, sum(page.get(NUM_VALUES, 0) for page, _ in data))
    size = max(chunk.total_uncompressed_size, sum(header[UNCOMPRESSED] for header in headers))
    is_repeating = any(page.get(encoding, 0) not in ONCE_EACH for page, encoding in data)
    return max(size, 4 * num_values) if ".list." in chunk.path_in_schema else size, is_repeating


def page_headers(content: IO[bytes], chunk: pa.parquet.ColumnChunkMetaData) -> Iterator[Fields]:
    """The header of each page. Raises pyarrow.ArrowInvalid for one that no writer makes."""
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
    """A struct in Thrift's compact protocol, without its texts, and where it ends.

    Raises IndexError where the content ends before it, and pyarrow.ArrowInvalid for what no page's header has.
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
    """Seven bits in each byte, the lowest first; the eighth says that another byte follows."""
    value = 0
    for shift in range(0, 70, 7):
        value |= (content[at] & 127) << shift
        at += 1
        if content[at - 1] < 128:
            return value, at
    raise pa.ArrowInvalid("a page has a number that is too large")
