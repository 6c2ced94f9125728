"""Reads the rows of one file, with a reader for each format; broken rows do not stop a reader.

An unreadable row becomes a row with nothing but PROBLEM, so that it is counted and listed like all others.

To add a file format, write a function that turns a file into Arrow tables of one schema, and list it in READERS below
under its suffix. Folders, patterns, streams and messages take the suffixes from there.
"""

import hashlib
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa
import pyarrow.parquet
from filelock import FileLock

from sedtrain.data.audio import is_media_file, leaves_folder
from sedtrain.data.parquet import ROWS_AT_ONCE, batches, refuse_unfolding
from sedtrain.data.separated import read_separated
from sedtrain.data.tables import (
    MAX_TEXT_BYTES,
    PROBLEM,
    BrokenFile,
    Row,
    as_table,
    lines_of,
    problem,
    refuse_same_names,
    refuse_utf16,
    text_or_problem,
)
from sedtrain.errors import UserError

Reader = Callable[[Path], Generator[pa.Table]]
BYTES_AT_ONCE = 2**24  # of rows written together
VERSION = 4  # increase it when a reader changes, so that old copies are not used
NEMO_AUDIO, NEMO_OPTIONAL = "audio_filepath", ("duration", "offset")
KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")  # of a WebDataset: ends at the first dot of the base name


@contextmanager
def reading(file: str | Path) -> Iterator[None]:
    """Turns errors caused by the content of a file into BrokenFile; UserError passes unchanged."""
    try:
        yield
    except UserError:
        raise
    except BrokenFile as error:
        error.file = file
        raise
    except (ValueError, OSError, EOFError, zlib.error, RecursionError, pa.ArrowException, tarfile.ReadError) as error:
        raise BrokenFile(one_line(error), file=file) from error


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def read_rows(file: Path, cache: Path | None = None, name: str | None = None) -> datasets.Dataset:
    """The rows of a file, memory-mapped from an Arrow copy. The copy is made once, and again if the file changes.

    cache: the folder of the copy; None: the cache of `datasets`
    name:  the name whose suffix tells the format; None: the name of the file
    Raises UserError for a format that is not in READERS, and BrokenFile.
    """
    with reading(file):
        facts = file.stat()
        if not facts.st_size:
            return datasets.Dataset.from_dict({})
        key = (VERSION, os.path.abspath(file), facts.st_size, facts.st_mtime_ns)
        copy = (cache or cache_folder()) / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.arrow"
        if not copy.exists():
            with closing(reader_of(Path(name or file))(file)) as tables:
                write_copy(copy, refuse_unfolding(tables, file))
    return datasets.Dataset.from_file(str(copy))


def cache_folder(name: str = "") -> Path:
    """The folder for cached data that all runs on this machine share."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "sedtrain" / name


def write_copy(copy: Path, tables: Iterator[pa.Table]) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{copy}.lock"):  # one process of a machine reads, the others wait
        if copy.exists():
            return
        unfinished, first = copy.with_suffix(".unfinished"), next(tables)
        try:
            with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_stream(file, first.schema) as writer:
                for table in gathered(chain([first], tables)):
                    writer.write_table(table, max_chunksize=ROWS_AT_ONCE)
            unfinished.replace(copy)
        finally:
            unfinished.unlink(missing_ok=True)


def gathered(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Joins small tables into larger ones: each chunk of a column costs a kilobyte of memory, even for one row."""
    several: list[pa.Table] = []
    filled = 0.0
    for table in filter(len, tables):
        size = len(table) / ROWS_AT_ONCE + table.nbytes / BYTES_AT_ONCE
        if several and filled + size > 1:
            yield pa.concat_tables(several).combine_chunks()
            several, filled = [], 0.0
        several.append(table)
        filled += size
    if several:
        yield pa.concat_tables(several).combine_chunks()


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


def read_parquet(path: Path) -> Generator[pa.Table]:
    """Yields the rows. After a broken page, the rest of its row group becomes null rows with a PROBLEM."""
    with path.open("rb") as content, pyarrow.parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        refuse_same_names(schema.names)
        nothing = (schema if PROBLEM in schema.names else schema.append(pa.field(PROBLEM, pa.string()))).empty_table()
        yield nothing
        for number in range(file.num_row_groups):
            missing = file.metadata.row_group(number).num_rows
            try:
                for batch in batches(file, content, str(path), number):
                    yield pa.concat_tables([nothing, pa.Table.from_batches([batch])], promote_options="default")
                    missing -= len(batch)
            except (OSError, pa.ArrowInvalid) as error:
                words = f"broken Parquet: row group {number}, {' '.join(str(error).split())[:100]}"
                for start in range(0, missing, ROWS_AT_ONCE):
                    lost = pa.table({PROBLEM: [words] * min(ROWS_AT_ONCE, missing - start)})
                    yield pa.concat_tables([nothing, lost], promote_options="default")


# --- manifests


def read_json(path: Path) -> Generator[pa.Table]:
    """Reads JSON lines, or one JSON list of objects. Adds columns that NeMo omits for unknown durations or offset 0."""
    table = as_table(json_rows(path))
    for name in NEMO_OPTIONAL if NEMO_AUDIO in table.column_names else ():
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table), pa.float64()))
    yield table


def json_rows(path: Path) -> Iterator[Row]:
    content = path.read_bytes() if path.suffix.lower() == ".json" else b""
    refuse_utf16(content[:1000])
    if content.lstrip().startswith(b"["):
        values = json.loads(content, object_pairs_hook=without_same_names)
        yield from (value if isinstance(value, dict) else problem("broken JSON", "no object") for value in values)
        return
    with path.open("rb") as lines:
        refuse_utf16(lines.peek(1000)[:1000])
        for number, line in enumerate(lines_of(lines), start=1):
            if line is None or line.strip():
                yield json_row(line, f"line {number}")


def json_row(content: bytes | None, position: str) -> Row:
    found = text_or_problem(content, position)
    if PROBLEM in found:
        return found
    try:
        row = json.loads(found["text"], object_pairs_hook=without_same_names)
    except (ValueError, RecursionError) as error:
        return problem("broken JSON", f"{position}, {str(error).partition(':')[0]}")
    return row if isinstance(row, dict) else problem("broken JSON", f"{position} is no object")


def without_same_names(pairs: list[tuple[str, Any]]) -> Row:
    """The object of these pairs. Raises ValueError if two have one name: `json` would silently take the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"two values are called {next(name for name in names if names.count(name) > 1)!r}")
    return row


# --- tars


def read_tar(path: Path) -> Generator[pa.Table]:
    """The rows of a WebDataset: columns audio (file, offset, size), text (from .txt), id, and the fields of a .json.

    Audio is never unpacked; the row holds its position in the tar.
    """
    samples: dict[str, Row] = {}
    with tarfile.open(path, "r:") as tar:
        try:
            for member in tar:
                if member.isreg() and (match := KEY.fullmatch(member.name)):
                    content = tar.extractfile(member)
                    assert content is not None
                    row = samples.setdefault(match[1], {"id": f"{path.stem}/{match[1]}", "audio": None})
                    fields = fields_of_member(member, match[2].lower(), content, os.path.abspath(path))
                    twice = [name for name in fields.keys() - {PROBLEM} if row.get(name) not in (None, fields[name])]
                    row.update(problem("two values of one name", f"{twice[0]} in {member.name}") if twice else fields)
        except (tarfile.ReadError, OSError) as error:
            samples[""] = problem("truncated tar", f"{path.name}, {error}")
    for key, row in samples.items():
        if key.startswith("/") or leaves_folder(key):
            samples[key] = {"id": row["id"], "audio": None} | problem("path outside the dataset's folder", key)
    yield as_table(samples.values())


def fields_of_member(member: tarfile.TarInfo, suffix: str, content: IO[bytes], tar: str) -> Row:
    """The fields that one member of the tar adds to its row."""
    if is_media_file(member.name):
        return {"audio": {"path": tar, "offset": member.offset_data, "size": member.size}}
    if suffix not in ("txt", "json"):
        return {}
    text = None if member.size > MAX_TEXT_BYTES else content.read()
    if suffix == "json":
        return {name: value for name, value in json_row(text, member.name).items() if name not in ("audio", "id")}
    found = text_or_problem(text, member.name)
    return found if PROBLEM in found else {"text": found["text"].strip()}


READERS: dict[str, Reader] = {
    ".parquet": read_parquet,
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": read_separated,
    ".tsv": partial(read_separated, delimiter="\t"),
    ".tar": read_tar,
}
"""Readers by suffix. If a folder has several files for a split, the first suffix in this order is read."""
