"""One file of rows: a reader for each format, which reads on whatever is wrong with some of the rows.

A row that cannot be read becomes a row of which only PROBLEM is known, so it is counted and listed like all others.

To add a file format, write a function from a file to Arrow tables of one schema, and list it in READERS below, under
its suffix. Folders, patterns, streams and messages take the suffixes from there.
"""

import csv
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from filelock import FileLock

from sedtrain.data.audio import is_audio_file, leaves_folder
from sedtrain.data.parquet import ROWS_AT_ONCE, batches, refuse_unfolding
from sedtrain.data.tables import MAX_TEXT_BYTES, PROBLEM, Row, as_table, decoded, lines_of, problem
from sedtrain.errors import UserError

Reader = Callable[[Path], Iterator[pa.Table]]
VERSION = 2  # counted up when a reader changes, so that old copies are not used
NUMBER = r"^-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?$"  # 007 is text
NEMO_AUDIO, NEMO_OPTIONAL = "audio_filepath", ("duration", "offset")
KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")  # WebDataset's: up to the first dot of the base name


class BrokenFile(ValueError):
    """A file of which nothing can be read; its message is the reason."""

    def __init__(self, file: str | Path, error: Exception) -> None:
        super().__init__(one_line(error))
        self.file = file


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def read_rows(file: Path, cache: Path | None = None) -> datasets.Dataset:
    """The rows of a file, mapped into memory from a copy in Arrow, which is made once and again when the file changes.

    cache: the folder of the copy, if not that of `datasets`
    Raises UserError for a format that is not in READERS, and BrokenFile.
    """
    try:
        facts = file.stat()
        if not facts.st_size:
            return datasets.Dataset.from_dict({})
        key = (VERSION, os.path.abspath(file), facts.st_size, facts.st_mtime_ns)
        folder = cache or Path(datasets.config.HF_DATASETS_CACHE) / "sedtrain"
        copy = folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.arrow"
        if not copy.exists():
            write_copy(copy, refuse_unfolding(reader_of(file)(file), file))
    except UserError:
        raise
    except (ValueError, OSError, RecursionError, pa.ArrowException, tarfile.ReadError) as error:
        raise BrokenFile(file, error) from error
    rows = datasets.Dataset.from_file(str(copy))
    is_whole = PROBLEM in rows.column_names and rows.data.column(PROBLEM).null_count == len(rows)
    return rows.remove_columns(PROBLEM) if is_whole else rows


def write_copy(copy: Path, tables: Iterator[pa.Table]) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{copy}.lock"):  # one process of a machine reads, the others wait
        if copy.exists():
            return
        unfinished, first = copy.with_suffix(".unfinished"), next(tables)
        try:
            with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_stream(file, first.schema) as writer:
                for table in chain([first], tables):
                    writer.write_table(table, max_chunksize=1000)
            unfinished.replace(copy)
        finally:
            unfinished.unlink(missing_ok=True)


def reader_of(file: Path) -> Reader:
    """Raises UserError for a format that is not in READERS."""
    if suffix := suffix_of(file.name):
        return READERS[suffix]
    with file.open("rb") as content:
        if content.read(4) == b"PAR1":
            return read_parquet
    wrong = f"{file.suffix or 'a file without a suffix'} is no format that can be read"
    write = f"write data.path=FILE, unpacked, one of {', '.join(READERS)}, or data.path=FOLDER"
    raise UserError("data.path", str(file), wrong, write)


def suffix_of(name: str) -> str | None:
    """The suffix in READERS that a name ends with."""
    return next((suffix for suffix in READERS if name.lower().endswith(suffix)), None)


# --- Parquet


def read_parquet(path: Path) -> Iterator[pa.Table]:
    """The rows; those that cannot be read, which is the rest of a row group, are null, with a PROBLEM."""
    with pyarrow.parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        nothing = (schema if PROBLEM in schema.names else schema.append(pa.field(PROBLEM, pa.string()))).empty_table()
        yield nothing
        for number in range(file.num_row_groups):
            missing = file.metadata.row_group(number).num_rows
            try:
                for batch in batches(file, str(path), number):
                    yield pa.concat_tables([nothing, pa.Table.from_batches([batch])], promote_options="default")
                    missing -= len(batch)
            except (OSError, pa.ArrowInvalid) as error:
                words = f"broken Parquet: row group {number}, {' '.join(str(error).split())[:100]}"
                for start in range(0, missing, ROWS_AT_ONCE):
                    lost = pa.table({PROBLEM: [words] * min(ROWS_AT_ONCE, missing - start)})
                    yield pa.concat_tables([nothing, lost], promote_options="default")


# --- manifests


def read_json(path: Path) -> Iterator[pa.Table]:
    """JSON lines, or one JSON list of objects. NeMo leaves out a duration that is not known and an offset of 0."""
    table = as_table(json_rows(path))
    for name in NEMO_OPTIONAL if NEMO_AUDIO in table.column_names else ():
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table), pa.float64()))
    yield table


def json_rows(path: Path) -> Iterator[Row]:
    content = path.read_bytes() if path.suffix.lower() == ".json" else b""
    if content.lstrip().startswith(b"["):
        values = json.loads(content)
        yield from (value if isinstance(value, dict) else problem("broken JSON", "no object") for value in values)
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines_of(lines), start=1):
            if line is None:
                yield problem("text too large", f"line {number}")
            elif line.strip():
                yield json_row(line, f"line {number}")


def json_row(content: bytes, position: str) -> Row:
    try:
        row = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return problem("text that is not UTF-8", position)
    except (ValueError, RecursionError) as error:
        return problem("broken JSON", f"{position}, {str(error).partition(':')[0]}")
    return row if isinstance(row, dict) else problem("broken JSON", f"{position} is no object")


def read_csv(path: Path, delimiter: str = ",") -> Iterator[pa.Table]:
    """Separated values; a column that holds nothing but numbers holds numbers."""
    table = as_table(csv_rows(path, delimiter))
    for index, cells in enumerate(table.columns):
        if pa.types.is_string(cells.type) and pc.all(pc.match_substring_regex(cells, NUMBER)).as_py():
            try:
                numbers = cells.cast(pa.int64())
            except pa.ArrowInvalid:
                numbers = cells.cast(pa.float64())
            table = table.set_column(index, table.column_names[index], numbers)
    yield table


def csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    """Cells as text, empty ones None; tab separated values know no quotes, as in Common Voice."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        parts = iter(partial(file.readline, MAX_TEXT_BYTES), "")  # lines, as far as they are no giants
        lines = csv.reader(
            parts, delimiter=delimiter, quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        )
        try:
            header = next(lines, [])
            for cells in lines:
                position = f"line {lines.line_num}"
                if any("\udc80" <= character <= "\udcff" for cell in cells for character in cell):
                    yield problem("text that is not UTF-8", position)
                elif cells and len(cells) != len(header):
                    yield problem("broken CSV", f"{position} has {len(cells)} cells, the header {len(header)}")
                elif cells:
                    yield {name: cell or None for name, cell in zip(header, cells, strict=True)}
        except csv.Error as error:  # such as a quote that is never closed
            yield problem("broken CSV", f"line {lines.line_num} and all that follow, {error}")


# --- tars


def read_tar(path: Path) -> Iterator[pa.Table]:
    """The samples of a WebDataset: columns audio (file, offset, size), text (of .txt), id, and the fields of a .json."""
    yield as_table(tar_rows(path))


def tar_rows(path: Path) -> list[Row]:
    """Members are never unpacked; only where they begin is noted."""
    samples: dict[str, Row] = {}
    with tarfile.open(path, "r:") as tar:
        try:
            for member in tar:
                if member.isreg() and (match := KEY.fullmatch(member.name)):
                    content = tar.extractfile(member)
                    assert content is not None
                    row = samples.setdefault(match[1], {"id": f"{path.stem}/{match[1]}", "audio": None})
                    row.update(fields_of_member(member, match[2].lower(), content, os.path.abspath(path)))
        except (tarfile.ReadError, OSError) as error:
            samples[""] = problem("truncated tar", f"{path.name}, {error}")
    for key, row in samples.items():
        if key.startswith("/") or leaves_folder(key):
            samples[key] = {"id": row["id"], "audio": None} | problem("path outside the dataset's folder", key)
    return list(samples.values())


def fields_of_member(member: tarfile.TarInfo, suffix: str, content: IO[bytes], tar: str) -> Row:
    """The fields that one member adds to its sample."""
    if is_audio_file(member.name):
        return {"audio": {"path": tar, "offset": member.offset_data, "size": member.size}}
    if suffix in ("txt", "json") and member.size > MAX_TEXT_BYTES:
        return problem("text too large", member.name)
    if suffix == "txt":
        text = decoded(content.read())
        return problem("text that is not UTF-8", member.name) if text is None else {"text": text.strip()}
    if suffix == "json":
        fields = json_row(content.read(), member.name)
        return {name: value for name, value in fields.items() if name not in ("audio", "id")}
    return {}


READERS: dict[str, Reader] = {
    ".parquet": read_parquet,
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".tar": read_tar,
}
"""By suffix; the first that a folder has for a split is read."""
