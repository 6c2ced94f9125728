"""Finds the length of each utterance by columns or headers; caches lengths of headers in the cache of `datasets`."""

import hashlib
import logging
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress

from sedtrain.data.buckets import Floats
from sedtrain.data.readers import cache_folder
from sedtrain.data.tables import is_text
from sedtrain.data.utterances import UtteranceRows
from sedtrain.run_dir import write_whole

logger = logging.getLogger(__name__)

VERSION = 2  # increase it when the same headers give other lengths
SHOWN_AFTER_SECONDS = 1.0  # until a progress bar, or a line in the log, appears
FILES_AT_ONCE = 1000  # files whose facts one thread reads at a time

FileFacts = tuple[str, int, int]
"""The path of a file, its size in bytes (-1 if it does not exist), and the time of its last change."""


def durations(rows: UtteranceRows) -> Floats:
    """(N,) the seconds of each utterance; NaN if neither column nor header gives them. The next run tries NaN again."""
    lengths = rows.declared()
    if not np.isnan(lengths).any():
        return lengths
    file = cache_file(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):  # one rank of a machine reads, the others wait for it
        if file.is_file():
            lengths = np.where(np.isnan(lengths), np.load(file), lengths)
        missing = np.flatnonzero(np.isnan(lengths))
        found = with_progress(rows.by_header(missing), len(missing), rows.name)
        lengths[missing] = np.fromiter(found, np.float64, len(missing))
        if not np.isnan(lengths[missing]).all():
            write_whole(file, lambda content: np.save(content, lengths))
    return lengths


def cache_file(rows: UtteranceRows) -> Path:
    """The file that caches the lengths of these rows; its name changes with any row or audio file."""
    key = hashlib.sha256(ascii((VERSION, rows.fingerprint, str(rows.folder.absolute()))).encode())
    names = names_in(rows.table["audio"])
    chunks = [names[first : first + FILES_AT_ONCE] for first in range(0, len(names), FILES_AT_ONCE)]

    def facts_of(chunk: pa.Array) -> list[FileFacts]:
        return [facts_of_file(str(rows.folder / name)) for name in chunk.to_pylist() if name and "\0" not in name]

    with ThreadPoolExecutor() as pool:  # in chunks: all facts at once take more memory than the plan of an epoch
        for facts in pool.map(facts_of, chunks):
            key.update(ascii(facts).encode())
    return cache_folder("durations") / f"{key.hexdigest()[:32]}.npy"


def names_in(column: pa.ChunkedArray) -> pa.Array:
    """The distinct paths in an audio column, in row order. Bytes need no path: the fingerprint of the rows covers them."""
    if pa.types.is_struct(column.type) and "path" in column.type.names:
        has_all_bytes = "bytes" in column.type.names and not pc.struct_field(column, "bytes").null_count
        column = pa.nulls(0) if has_all_bytes else pc.struct_field(column, "path")
    return pc.unique(column) if is_text(column.type) else pa.nulls(0)


def facts_of_file(path: str) -> FileFacts:
    try:
        found = os.stat(path)
        return path, found.st_size, found.st_mtime_ns
    except OSError:
        return path, -1, 0


def with_progress(lengths: Iterable[float], number: int, split: str) -> Iterator[float]:
    """Yields the lengths; if that takes long, shows a bar in a terminal, or logs one line elsewhere."""
    started, bar = time.perf_counter(), None
    text = f"{split}: reading how long each of {number:,} utterances is"
    with ExitStack() as shown:
        for count, length in enumerate(lengths, start=1):
            if bar is None and time.perf_counter() - started > SHOWN_AFTER_SECONDS:
                console = Console(stderr=True)
                bar = Progress(console=console, transient=True, disable=not console.is_terminal)
                task = shown.enter_context(bar).add_task(text, total=number)
                logger.log(logging.DEBUG if console.is_terminal else logging.INFO, "%s, from the headers", text)
            if bar is not None:
                bar.update(task, completed=count)
            yield length
