"""Rows of a `datasets` dataset seen as utterances: columns, segments, lengths, decoding."""

import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import repeat
from math import inf
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from sedtrain.batch import Skipped, Utterance
from sedtrain.data.audio import UNREADABLE, read_audio, refuse_silence, seconds_between
from sedtrain.data.paths import local_path
from sedtrain.data.tables import NOT_TEXT, PROBLEM, with_readable_text
from sedtrain.errors import UserError, require


@dataclass(frozen=True)
class Columns:
    """Which column of the dataset holds what; None where the dataset has no such column."""

    audio: str
    text: str
    id: str | None = None
    speaker: str | None = None
    language: str | None = None
    seconds: str | None = None
    start: str | None = None
    end: str | None = None

    @classmethod
    def of(cls, columns: Mapping[str, str | None], target: str, where: str = "data") -> "Columns":
        """`columns` by role, where `target`, transcription or translation, names the role of the text.

        where: the options that they stand in, for messages
        """
        roles = ["audio", "transcription", "translation", *(each.name for each in fields(cls)[2:])]
        if unknown := [role for role in columns if role not in roles]:
            instead = f"{where}.columns.NAME, NAME one of {', '.join(roles)}"
            raise UserError(f"{where}.columns.{unknown[0]}: there is no such role", instead)
        for role in ("audio", target):
            if columns.get(role) is None:
                raise UserError(
                    f"{where}.columns.{role} is not set (target={target})", f"{where}.columns.{role}=COLUMN"
                )
        others = {role: columns.get(role) for role in roles[3:]}
        return cls(audio=str(columns["audio"]), text=str(columns[target]), **others)


def is_value(feature: Any, *kinds: str) -> bool:
    """Whether a column holds single values of one of these kinds of Arrow types, or nothing at all."""
    return isinstance(feature, datasets.Value) and feature.dtype.startswith((*kinds, "null"))


def is_number(feature: Any) -> bool:
    return is_value(feature, "int", "uint", "float", "decimal")


def is_text(feature: Any) -> bool:
    return is_number(feature) or is_value(feature, "string", "large_string", "bool")


def is_audio(feature: Any) -> bool:
    is_plain = is_value(feature, "binary", "large_binary", "string", "large_string")
    is_both = isinstance(feature, dict) and not feature.keys().isdisjoint({"bytes", "path"})
    return is_plain or is_both or isinstance(feature, datasets.Audio)


WANTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "audio": (is_audio, "bytes or the path of a file"),
    "text": (is_text, "text"),
    "id": (is_text, "text or numbers"),
    "seconds": (is_number, "numbers"),
    "start": (is_number, "numbers"),
    "end": (is_number, "numbers"),
}
"""By role."""


def check_columns(columns: Mapping[str, str | None], features: Mapping[str, Any], source: str) -> None:
    """Raises UserError for a column that is missing, listing those that are there, or that holds something else.

    columns: the column of each role; features: what each column holds; source: where that is, for the message
    """
    for role, column in columns.items():
        if column is None:
            continue
        if column not in features:
            raise UserError(
                f"data.columns: {source} has no column {column!r} for the {role}, it has {', '.join(features)}",
                "data.columns.NAME=ONE_OF_THESE, where NAME is audio, transcription, translation, id, speaker, "
                "language, seconds, start or end",
            )
        fits, wanted = WANTED.get(role, (None, ""))
        if fits is not None and not fits(features[column]):
            raise UserError(
                f"data.columns: {source} has {str(features[column])[:80]} in the column {column!r} for the {role}, "
                f"expected {wanted}",
                f"data.columns.NAME=COLUMN that holds {wanted}",
            )


def rows_by_id(ids: list[str], column: str | None, split: str) -> dict[str, int]:
    """The row of every id. Raises UserError where two rows have the same."""
    rows: dict[str, int] = {}
    for index, id in enumerate(ids):
        if (first := rows.setdefault(id, index)) != index:
            raise UserError(
                f"data.columns.id={column}: rows {first} and {index} of {split!r} have the same id, {id!r}",
                "data.columns.id=COLUMN of ids that differ, or data.columns.id=null to name rows by their number",
            )
    return rows


ROWS_AT_ONCE = 64  # of which a thread reads the headers


class UtteranceRows:
    """Rows seen as utterances, decoded one by one.

    path, split: where the rows are from; rows without an id are named after the split, or the shard of it
    folder: where relative paths of audio files begin, and what they must not leave; else the folder of `path`
    prefix: what their ids begin with, where several datasets are mixed
    language: of the texts of rows that do not say it
    task: how the texts came from the speech
    file: the one that the rows stand in, where they are in one

    Raises UserError where a column is missing or holds something else than it should, and where two rows have one id.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        columns: Columns,
        path: str,
        split: str,
        folder: Path | None = None,
        prefix: str = "",
        language: str | None = None,
        task: str = "transcribe",
        file: str | None = None,
    ) -> None:
        features = {name: feature for name, feature in rows.features.items() if name != PROBLEM}
        check_columns(vars(columns), features, f"{path} ({split})")
        if isinstance(rows.features[columns.audio], datasets.Audio):
            rows = rows.cast_column(columns.audio, datasets.Audio(decode=False))
        used = dict.fromkeys(column for column in vars(columns).values() if column)
        rows = rows.select_columns([*used, *({PROBLEM} & set(rows.column_names))])
        rows = with_readable_text(rows, [column for column in used if column != columns.audio])
        self.rows, self.columns, self.split = rows, columns, split
        self.prefix, self.language, self.task = prefix, language, task
        where = local_path(path)
        self.file = file or (str(where) if where.exists() else path)
        self.folder = folder or (where if where.is_dir() else where.parent)
        problems = rows[PROBLEM] if PROBLEM in rows.column_names else []
        self.problems = {index: words for index, words in enumerate(problems) if words is not None}
        ids = [self.id_of(index, value) for index, value in enumerate(self.cells(columns.id))]
        self.index_of = rows_by_id(ids, columns.id, split)

    def __len__(self) -> int:
        return len(self.rows)

    def texts(self, indices: Sequence[int] | None = None) -> list[str]:
        """Every text, or those of some rows; no audio is read."""
        return [as_text(value) for value in self.cells(self.columns.text, indices)]

    def languages(self, indices: Sequence[int] | None = None) -> set[str | None]:
        """Those of all or of some rows."""
        return {as_text(value) or self.language for value in self.cells(self.columns.language, indices)}

    def cells(self, column: str | None, indices: Sequence[int] | None = None) -> Iterable[Any]:
        """A column of all or of some rows; None for each where there is no such column."""
        if column is None:
            return repeat(None, len(self) if indices is None else len(indices))
        rows = self.rows if indices is None else self.rows.select(indices)
        cells: list[Any] = rows[column][:]
        return cells

    def id(self, index: int) -> str:
        return self.id_of(index, self.rows[index][self.columns.id] if self.columns.id else None)

    def id_of(self, index: int, value: Any) -> str:
        return self.prefix + (f"{self.split}-{index}" if value is None else str(value))

    def seconds(self, indices: Sequence[int] | None = None) -> Iterator[float | None]:
        """The length of each utterance, from its columns, else from the audio's header; None where neither tells."""
        declared = self.declared(indices)
        numbers = range(len(self)) if indices is None else indices
        by_header = self.by_header([index for index, known in zip(numbers, declared, strict=True) if known is None])
        return (next(by_header) if known is None else known for known in declared)

    def declared(self, indices: Sequence[int] | None = None) -> list[float | None]:
        """The lengths that columns tell, None where they tell none."""
        columns = (self.columns.seconds, self.columns.start, self.columns.end)
        return [seconds_of(*cells) for cells in zip(*(self.cells(column, indices) for column in columns), strict=True)]

    def by_header(self, indices: Sequence[int]) -> Iterator[float | None]:
        """The lengths that headers of the audio tell, read in threads; None where one cannot be read."""
        several = [indices[first : first + ROWS_AT_ONCE] for first in range(0, len(indices), ROWS_AT_ONCE)]
        if len(several) == 1:
            yield from self.headers(indices)
            return
        with ThreadPoolExecutor() as pool:
            for lengths in pool.map(self.headers, several):
                yield from lengths

    def headers(self, indices: Sequence[int]) -> list[float | None]:
        columns = self.rows.select(indices)[:]
        rows = (dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True))
        return [self.length_or_reason(row)[0] for row in rows]

    def length_or_reason(self, row: Mapping[str, Any]) -> tuple[float | None, tuple[str, str]]:
        """By the audio's header: its length, or None with the reason why there is none, and a detail."""
        try:
            return seconds_between(row[self.columns.audio], self.folder, *self.segment(row)), ("", "")
        except UNREADABLE as error:
            return None, (getattr(error, "reason", "unreadable audio"), str(error))

    def segment(self, row: Mapping[str, Any]) -> tuple[float | None, float | None]:
        """Start and end of an utterance in its audio, in seconds; NeMo gives the start and how many seconds."""
        start, end, seconds = (
            row[column] if column else None for column in (self.columns.start, self.columns.end, self.columns.seconds)
        )
        if end is None and start is not None and seconds is not None:
            end = start + seconds
        return start, end

    def problem(self, index: int, seconds: float | None) -> tuple[str, str] | None:
        """Reason and detail where a row cannot be used; seconds: its length, None where it could not be found."""
        if words := self.problems.get(index):
            reason, _, detail = words.partition(": ")
            return reason, detail
        if seconds is None:
            length, reason_and_detail = self.length_or_reason(self.rows[index])
            return reason_and_detail if length is None else ("unreadable audio", "at first")
        return None

    def skipped(self, index: int, reason: str, detail: str) -> Skipped:
        """The row as one that is left out."""
        return Skipped(self.id(index), reason, detail, self.place(self.rows[index][self.columns.audio]))

    def place(self, cell: Any) -> str:
        """The file of a cell's audio, with the byte where it begins in a larger one; of bytes that of their row."""
        values = cell if isinstance(cell, dict) else {"bytes" if isinstance(cell, bytes) else "path": cell}
        if values.get("bytes") is not None or not values.get("path"):
            return self.file
        path = str(self.folder / str(values["path"]))
        return path if values.get("offset") is None else f"{path}, byte {values['offset']}"

    def utterance(self, index: int, sampling_rate: int) -> Utterance:
        """Row `index`, decoded, mixed down and resampled to `sampling_rate`.

        Raises one of UNREADABLE when the audio cannot be decoded, is silent, or not as long as the columns say.
        """
        row, columns = self.rows[index], self.columns
        [declared] = self.declared([index])
        audio = read_audio(row[columns.audio], sampling_rate, self.folder, *self.segment(row), declared)
        refuse_silence(audio)
        return Utterance(
            id=self.id(index),
            audio=audio,
            sampling_rate=sampling_rate,
            text=as_text(row[columns.text]),
            language=(as_text(row[columns.language]) if columns.language else "") or self.language,
            speaker=row[columns.speaker] if columns.speaker else None,
            seconds=len(audio) / sampling_rate,
            task=self.task,
        )


def seconds_of(seconds: float | None, start: float | None, end: float | None) -> float | None:
    """The length that the columns of a row tell; None where they are empty, or no length."""
    given = seconds if end is None else end - (start or 0)
    return float(given) if given is not None and 0 <= given < inf else None


def as_text(value: Any) -> str:
    """A cell of the text column; a CSV or JSON file with digits alone gives numbers, NaN is none."""
    return "" if value is None or value != value else str(value)


logger = logging.getLogger(__name__)


VERSION = 1  # to be counted up where lengths are read differently from the same headers


A_MOMENT = 1.0  # seconds; what lasts longer is shown


FILES_AT_ONCE = 1000


Facts = tuple[str, int, int]
"""The name of a file, its size in bytes (-1 where it is not there), and the time of its last change."""


def durations(rows: UtteranceRows) -> list[float | None]:
    """The seconds of each utterance; None where no column and no header tells them, which is tried again the next time."""
    declared = rows.declared()
    if None not in declared:
        return declared
    file = index_of(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):  # of the ranks of a machine one reads, and the others wait for it
        kept = np.load(file) if file.is_file() else np.full(len(rows), np.nan)
        known = [length if given is None else given for given, length in zip(declared, kept.tolist(), strict=True)]
        missing = [index for index, length in enumerate(known) if np.isnan(length)]
        lengths = dict(zip(missing, shown(rows.by_header(missing), len(missing), rows.split), strict=True))
        if any(length is not None for length in lengths.values()):
            save(file, np.array([lengths.get(index, length) for index, length in enumerate(known)], dtype=np.float64))
    return [lengths.get(index, length) for index, length in enumerate(known)]


def index_of(rows: UtteranceRows) -> Path:
    """Where the lengths of these rows are kept; where a row or a file changes, it is another place."""
    facts = (VERSION, rows.rows._fingerprint, str(rows.folder.absolute()), facts_of(rows))
    key = hashlib.sha256(repr(facts).encode("utf-8", "replace")).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE) / "sedtrain" / "durations" / f"{key}.npy"


def facts_of(rows: UtteranceRows) -> list[Facts]:
    """Of every file that is named in the audio column; of bytes the fingerprint of the rows says enough."""
    names = [str(name) for name in names_in(rows.rows.data.column(rows.columns.audio)) if name]
    places = [str(rows.folder / name) for name in names if "\0" not in name]
    several = [places[first : first + FILES_AT_ONCE] for first in range(0, len(places), FILES_AT_ONCE)]
    with ThreadPoolExecutor() as pool:
        return [each for facts in pool.map(facts_of_files, several) for each in facts]


def names_in(column: pa.ChunkedArray) -> list[Any]:
    """The distinct paths in an audio column, in the order of the rows."""
    if pa.types.is_struct(column.type):
        fields = [column.type.field(number).name for number in range(column.type.num_fields)]
        if "path" not in fields or ("bytes" in fields and not pc.struct_field(column, "bytes").null_count):
            return []
        column = pc.struct_field(column, "path")
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return []
    names: list[Any] = pc.unique(column).to_pylist()
    return names


def facts_of_files(places: Sequence[str]) -> list[Facts]:
    return [facts_of_file(place) for place in places]


def facts_of_file(place: str) -> Facts:
    try:
        found = os.stat(place)
    except OSError:
        return place, -1, 0
    return place, found.st_size, found.st_mtime_ns


def save(file: Path, lengths: NDArray[np.float64]) -> None:
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".npy", delete=False) as unfinished:
        np.save(unfinished, lengths)
    os.replace(unfinished.name, file)


def shown(lengths: Iterable[float | None], number: int, split: str) -> Iterator[float | None]:
    """The same lengths; where they take longer than a moment, with a bar in a terminal, else with a line in the log."""
    started, bar = time.perf_counter(), None
    words = f"{split}: reading how long each of {number:,} utterances is"
    try:
        for count, length in enumerate(lengths):
            if bar is None and time.perf_counter() - started > A_MOMENT:
                console = Console(stderr=True)
                bar = Progress(console=console, transient=True, disable=not console.is_terminal)
                task = bar.add_task(words, total=number)
                bar.start()
                logger.log(logging.DEBUG if console.is_terminal else logging.INFO, "%s, from the headers", words)
            if bar is not None:
                bar.update(task, completed=count + 1)
            yield length
    finally:
        if bar is not None:
            bar.stop()


CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # Unicode's Cc but tab, line feed, carriage return


Reason = tuple[str, str]
"""A few words to be counted by, and a detail."""


@dataclass(frozen=True)
class Limits:
    """What an utterance has to keep to be used. Raises UserError for limits that nothing could keep."""

    min_seconds: float
    max_seconds: float
    min_characters: int = 1
    max_characters: int = 10_000

    def __post_init__(self) -> None:
        require(self.min_seconds >= 0, "data.min_seconds", self.min_seconds, "0 or more")
        above = f"above data.min_seconds, {self.min_seconds}"
        require(self.max_seconds > self.min_seconds, "data.max_seconds", self.max_seconds, above)
        require(self.min_characters >= 1, "data.min_characters", self.min_characters, "1 or more")
        at_least = f"{self.min_characters}, data.min_characters, or more"
        require(self.max_characters >= self.min_characters, "data.max_characters", self.max_characters, at_least)

    def sift(
        self,
        rows: UtteranceRows,
        indices: Sequence[int],
        seconds: Sequence[float | None] | None = None,
        rewrite: Callable[[str], str] = str,
    ) -> tuple[dict[int, float], list[Skipped]]:
        """The seconds of the rows that are used, by index, and the others with the reason.

        seconds: of each row, where they are known already; None of one whose length cannot be found
        rewrite: what is done to texts before they are learnt, which has to leave something
        """
        kept: dict[int, float] = {}
        skipped: list[Skipped] = []
        known = rows.seconds(indices) if seconds is None else seconds
        for index, length, text in zip(indices, known, rows.texts(indices), strict=True):
            reason = rows.problem(index, length) or self.refused_length(length) or self.refused_text(text, rewrite)
            if reason:
                skipped.append(rows.skipped(index, *reason))
            else:
                assert length is not None
                kept[index] = length
        return kept, skipped

    def refused_length(self, seconds: float | None) -> Reason | None:
        if seconds is None:
            return "unreadable audio", ""
        if seconds < self.min_seconds:
            return "too short", f"{seconds:.2f} s < data.min_seconds={self.min_seconds}"
        if seconds > self.max_seconds:
            return "too long", f"{seconds:.2f} s > data.max_seconds={self.max_seconds}"
        return None

    def refused_text(self, text: str, rewrite: Callable[[str], str] = str) -> Reason | None:
        number = len(text.strip())
        if not number:
            return "empty text", ""
        if text.startswith(NOT_TEXT):
            return "text that is not text", shortened(text.removeprefix(NOT_TEXT))
        if found := CONTROL.search(text):
            return "control characters in the text", f"U+{ord(found[0]):04X} in {shortened(text)}"
        if number < self.min_characters:
            return "text too short", f"{number} characters < data.min_characters={self.min_characters}"
        if number > self.max_characters:
            return "text too long", f"{number} characters > data.max_characters={self.max_characters}"
        return None if rewrite(text).strip() else ("text empty once normalized", shortened(text))


def shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
