"""Pages of a column of Parquet by their own headers: Arrow makes room for those, whatever the file says of all of them."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet

HEADER_BYTES = (2**8, 2**16, 2**24)  # most headers, those with long statistics, the longest that Arrow reads
DEPTH = 3  # of structs: header, kind of page, statistics
TRUE, FALSE, I16, I32, I64, BINARY, STRUCT = 1, 2, 4, 5, 6, 8, 12  # types of Thrift
UNCOMPRESSED, COMPRESSED = (2, I32), (3, I32)
NUM_VALUES = (1, I32)
ENCODINGS = {(5, STRUCT): (2, I32), (8, STRUCT): (4, I32)}  # of a page of data, in its first and second version
ONCE_EACH = {0, 3, 4}  # plain, RLE and bit-packed: encodings that store each cell by itself

Fields = dict[tuple[int, int], Any]
"""The values of a struct, by number and type of the field."""


@dataclass(frozen=True)
class Pages:
    """Bytes that a column takes in memory at least, once all of its pages are read; and whether these repeat cells."""

    size: int
    is_repeating: bool


def pages_of(content: IO[bytes], chunk: pa.parquet.ColumnChunkMetaData) -> Pages:
    headers = list(page_headers(content, chunk))
    data = [(header[kind], encoding) for header in headers for kind, encoding in ENCODINGS.items() if kind in header]
    num_values = max(chunk.num_values, sum(page.get(NUM_VALUES, 0) for page, _ in data))
    size = max(chunk.total_uncompressed_size, sum(header[UNCOMPRESSED] for header in headers))
    is_repeating = any(page.get(encoding, 0) not in ONCE_EACH for page, encoding in data)
    return Pages(max(size, 4 * num_values) if ".list." in chunk.path_in_schema else size, is_repeating)


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
