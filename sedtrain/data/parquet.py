"""Rows of a Parquet file in bounded memory: compression and dictionaries let a few bytes stand for any number of them."""

import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import fsspec
import pyarrow as pa
import pyarrow.parquet

from sedtrain.data.pages import pages_of
from sedtrain.errors import UserError

ROWS_AT_ONCE = 10_000
MEMORY = 2**27  # bytes of the rows at once, unless a single row takes more
ROW_BYTES = 64  # that a row takes at least, whatever it holds
OF_COLUMN, OF_FILE = 100, 1000  # times that a column, or the copy of a file, may be larger than what is stored of it


def batches(
    file: pa.parquet.ParquetFile, content: IO[bytes], place: str, group: int, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows of a row group, a few at a time. Raises UserError for columns that unfold beyond what data do.

    content: the same file, of which the headers of pages are read
    Other encodings repeat cells, each of which is in the column at least once: no row takes more than the columns.
    """
    stored = file.metadata.row_group(group)
    chunks = [stored.column(number) for number in range(stored.num_columns)]
    chunks = [each for each in chunks if columns is None or each.path_in_schema.split(".")[0] in columns]
    pages = [pages_of(content, each) for each in chunks]
    for each, its in zip(chunks, pages, strict=True):
        if its.size > max(MEMORY / 4, OF_COLUMN * each.total_compressed_size):
            part = f"row group {group}, column {each.path_in_schema}"
            raise unfolds(place, part, its.size, each.total_compressed_size)
    size, total = sum(each.size for each in pages), sum(each.total_compressed_size for each in chunks)
    if size > max(MEMORY, OF_COLUMN * total):  # a page of each column is in memory at once
        raise unfolds(place, f"row group {group}", size, total)
    repeating = sum(each.size for each in pages if each.is_repeating)
    average = size // max(1, stored.num_rows)
    num_rows = min(ROWS_AT_ONCE, max(1, MEMORY // max(1, repeating, average)))
    yield from file.iter_batches(num_rows, row_groups=[group], columns=columns)


def refuse_unfolding(tables: Iterator[pa.Table], path: Path) -> Iterator[pa.Table]:
    """The same tables. Raises UserError where they have become more than a file of this size can mean."""
    stored, total = path.stat().st_size, 0
    for table in tables:
        total += table.nbytes + ROW_BYTES * len(table)
        if total > max(MEMORY, OF_FILE * stored):
            raise unfolds(str(path), "its rows", total, stored)
        yield table


def refuse_unpacking(path: str, place: str) -> None:
    """Raises UserError for a packed file, such as .jsonl.gz, that unfolds beyond what data do."""
    stored, total = os.path.getsize(path), 0
    for size in unpacked_sizes(path, place):
        total += size
        if total > max(MEMORY, OF_COLUMN * stored):
            raise unfolds(place, "all of it", total, stored)


def unpacked_sizes(path: str, place: str) -> Iterator[int]:
    """The bytes of a packed file, a block after the other; of a zip, those of its members, which are never exceeded."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as members:
            yield from (member.file_size for member in members.infolist())
        return
    with fsspec.open(path, compression=fsspec.utils.infer_compression(place)) as content:
        while block := content.read(2**20):
            yield len(block)


def unfolds(place: str, part: str, size: int, stored: int) -> UserError:
    wrong = f"this file would fill memory and disk: of {part}, {stored:,} bytes unfold to {size / 1e6:,.0f} MB or more"
    return UserError("data.path", place, wrong, "write data.path=FILE from a source that you trust")
