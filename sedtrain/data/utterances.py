"""Rows of a `datasets` dataset as utterances: which column holds what, segments, lengths, decoded audio."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import repeat
from math import inf
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import get_worker_info

from sedtrain.batch import Skipped, Utterance
from sedtrain.data.audio import UNREADABLE, read_audio, refuse_silence, seconds_between
from sedtrain.data.paths import local_path
from sedtrain.data.tables import NOT_TEXT, PROBLEM, in_words, with_readable_text, with_times
from sedtrain.errors import UserError

logger = logging.getLogger(__name__)

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # Unicode's Cc but tab, line feed, carriage return
ROWS_AT_ONCE = 64  # rows whose headers one thread reads at a time


@dataclass(frozen=True)
class Columns:
    """Names of the dataset's columns by role; None if the dataset has no such column."""

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

        where: the option that they belong to, for messages
        """
        roles = ["audio", "transcription", "translation", *(field.name for field in fields(cls)[2:])]
        for role, column in columns.items():
            if role not in roles:
                instead = f"write {where}.columns.NAME, NAME one of {', '.join(roles)}"
                raise UserError(f"{where}.columns.{role}", column, "there is no such role", instead)
        for role in ("audio", target):
            if columns.get(role) is None:
                option = f"{where}.columns.{role}"
                raise UserError(option, None, f"target={target} needs this column", f"write {option}=COLUMN")
        others = {role: columns.get(role) for role in roles[3:]}
        return cls(audio=str(columns["audio"]), text=str(columns[target]), **others)


def is_value(feature: Any, *kinds: str) -> bool:
    """Tells whether a column holds single values of one of these kinds of Arrow types, or only nulls."""
    return isinstance(feature, datasets.Value) and feature.dtype.startswith((*kinds, "null"))


def is_number(feature: Any) -> bool:
    return is_value(feature, "int", "uint", "float", "decimal")


def is_time(feature: Any) -> bool:
    return is_number(feature) or is_value(feature, "string", "large_string")


def is_text(feature: Any) -> bool:
    return is_time(feature) or is_value(feature, "bool")


def is_audio(feature: Any) -> bool:
    is_plain = is_value(feature, "binary", "large_binary", "string", "large_string")
    is_both = isinstance(feature, dict) and not feature.keys().isdisjoint({"bytes", "path"})
    return is_plain or is_both or isinstance(feature, datasets.Audio)


WANTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "audio": (is_audio, "bytes or the path of a file"),
    "text": (is_text, "text"),
    "id": (is_text, "text or numbers"),
    "seconds": (is_time, "numbers"),
    "start": (is_time, "numbers"),
    "end": (is_time, "numbers"),
}
"""Types that the column of a role may have."""


def check_columns(columns: Mapping[str, str | None], features: Mapping[str, Any], source: str) -> None:
    """Raises UserError for a column that is missing, naming those that are there, or that holds something else.

    columns: the column of each role; features: what each column holds; source: where they are, for the message
    """
    for role, column in columns.items():
        if column is None:
            continue
        if column not in features:
            raise UserError(
                "data.columns",
                column,
                f"{source} has no column {column!r} for the {role}, it has {in_words(features)}",
                "write data.columns.NAME=ONE_OF_THESE, where NAME is audio, transcription, translation, id, speaker, "
                "language, seconds, start or end",
            )
        fits, wanted = WANTED.get(role, (None, ""))
        if fits is not None and not fits(features[column]):
            raise UserError(
                "data.columns",
                column,
                f"{source} has {str(features[column])[:80]} in the column {column!r} for the {role}, expected {wanted}",
                f"write data.columns.NAME=COLUMN that holds {wanted}",
            )


def rows_by_id(ids: list[str], column: str | None, split: str) -> dict[str, int]:
    """The row of every id. Raises UserError where two rows have the same."""
    rows: dict[str, int] = {}
    for index, id in enumerate(ids):
        if (first := rows.setdefault(id, index)) != index:
            raise UserError(
                "data.columns.id",
                column,
                f"rows {first} and {index} of {split!r} have the same id, {id!r}",
                "write data.columns.id=COLUMN of ids that differ, or data.columns.id=null to name rows by their number",
            )
    return rows


class UtteranceRows:
    """Rows as utterances, decoded one by one.

    path, split: where the rows are from; rows without an id are named after the split, or its shard
    folder:      where relative paths of audio files begin, which must not leave it; else the folder of `path`
    prefix:      what their ids begin with, where several datasets are mixed
    language:    of the texts of rows that do not say it
    task:        how the texts came from the speech, `transcribe` or `translate`
    file:        the file that holds the rows, where there is one

    Raises UserError for a column that is missing or holds something else than it should, and for two rows with one id.
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
        rows = with_times(rows, [column for column in (columns.seconds, columns.start, columns.end) if column])
        self.rows, self.columns, self.split = rows, columns, split
        self.prefix, self.language, self.task = prefix, language, task
        source = local_path(path)
        self.file = file or (str(source) if source.exists() else path)
        self.folder = folder or (source if source.is_dir() else source.parent)
        problems = rows[PROBLEM] if PROBLEM in rows.column_names else []
        self.problems = {index: text for index, text in enumerate(problems) if text is not None}
        self.warn_of_control()
        ids = [self.id_of(index, value) for index, value in enumerate(self.cells(columns.id))]
        self.index_of = rows_by_id(ids, columns.id, split)

    def __len__(self) -> int:
        return len(self.rows)

    def warn_of_control(self) -> None:
        """Warns of texts with control characters, which `as_text` takes out; workers leave it to their parent."""
        if get_worker_info() is not None:
            return
        cells = pc.cast(self.rows.with_format("arrow")[self.columns.text][:], pa.large_string())
        has_control = pc.and_not(pc.match_substring_regex(cells, CONTROL.pattern), pc.starts_with(cells, NOT_TEXT))
        found = pc.indices_nonzero(has_control).to_pylist()
        if found:
            first = self.id_of(found[0], self.rows[found[0]][self.columns.id] if self.columns.id else None)
            words = "%s: texts from which control characters are taken out: %d (first: %s)"
            logger.warning(words, self.split, len(found), first)

    def texts(self, indices: Sequence[int] | None = None) -> list[str]:
        """The texts of all or of some rows; reads no audio."""
        return [as_text(value) for value in self.cells(self.columns.text, indices)]

    def languages(self, indices: Sequence[int] | None = None) -> set[str | None]:
        """The languages of all or of some rows."""
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
        """The length of each utterance, from its columns, else from the header of its audio, else None."""
        declared = self.declared(indices)
        numbers = range(len(self)) if indices is None else indices
        by_header = self.by_header([index for index, known in zip(numbers, declared, strict=True) if known is None])
        return (next(by_header) if known is None else known for known in declared)

    def declared(self, indices: Sequence[int] | None = None) -> list[float | None]:
        """The lengths by columns alone; None where they give none."""
        columns = (self.columns.seconds, self.columns.start, self.columns.end)
        return [seconds_of(*cells) for cells in zip(*(self.cells(column, indices) for column in columns), strict=True)]

    def by_header(self, indices: Sequence[int]) -> Iterator[float | None]:
        """The lengths by the headers of the audio, read in threads; None where a header cannot be read."""
        chunks = [indices[first : first + ROWS_AT_ONCE] for first in range(0, len(indices), ROWS_AT_ONCE)]
        if len(chunks) == 1:
            yield from self.headers(indices)
            return
        with ThreadPoolExecutor() as pool:
            for lengths in pool.map(self.headers, chunks):
                yield from lengths

    def headers(self, indices: Sequence[int]) -> list[float | None]:
        columns = self.rows.select(indices)[:]
        rows = (dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True))
        return [self.length_or_reason(row)[0] for row in rows]

    def length_or_reason(
        self, row: Mapping[str, Any], declared: float | None = None
    ) -> tuple[float | None, tuple[str, str]]:
        """The length by the header of the audio and ("", ""), or None and the reason for that with a detail."""
        try:
            return seconds_between(row[self.columns.audio], self.folder, *self.segment(row), declared), ("", "")
        except UNREADABLE as error:
            return None, (getattr(error, "reason", "unreadable audio"), str(error))

    def segment(self, row: Mapping[str, Any]) -> tuple[float | None, float | None]:
        """Start and end of an utterance in its audio, in seconds; NeMo's manifests give the start and the duration."""
        start, end, seconds = (
            row[column] if column else None for column in (self.columns.start, self.columns.end, self.columns.seconds)
        )
        if end is None and start is not None and seconds is not None:
            end = start + seconds
        return start, end

    def problem(self, index: int, seconds: float | None) -> tuple[str, str] | None:
        """Reason and detail for a row that cannot be used, else None; seconds: its length, None where none was found."""
        if text := self.problems.get(index):
            reason, _, detail = text.partition(": ")
            return reason, detail
        if seconds is None:
            length, reason_and_detail = self.length_or_reason(self.rows[index])
            return reason_and_detail if length is None else ("unreadable audio", "at first")
        return None

    def misdeclared(self, index: int) -> tuple[str, str] | None:
        """Reason and detail for a row whose columns give another length than the header of its audio, if it has any."""
        [declared] = self.declared([index])
        length, reason = (0.0, None) if declared is None else self.length_or_reason(self.rows[index], declared)
        return reason if length is None else None

    def skipped(self, index: int, reason: str, detail: str) -> Skipped:
        """The row as an utterance that is left out."""
        return Skipped(self.id(index), reason, detail, self.location(self.rows[index][self.columns.audio]))

    def location(self, cell: Any) -> str:
        """The file of a cell's audio, with the byte where it begins in a larger file; for bytes, the file of their row."""
        values = cell if isinstance(cell, dict) else {"bytes" if isinstance(cell, bytes) else "path": cell}
        if values.get("bytes") is not None or not values.get("path"):
            return self.file
        path = str(self.folder / str(values["path"]))
        return path if values.get("offset") is None else f"{path}, byte {values['offset']}"

    def utterance(self, index: int, sampling_rate: int, may_be_silent: bool = False) -> Utterance:
        """Row `index`, decoded, mixed down and resampled to `sampling_rate`.

        Raises one of UNREADABLE for audio that cannot be decoded, is not as long as the columns say, or is silent.
        """
        row, columns = self.rows[index], self.columns
        [declared] = self.declared([index])
        audio = read_audio(row[columns.audio], sampling_rate, self.folder, *self.segment(row), declared)
        if not may_be_silent:
            refuse_silence(audio)
        return Utterance(
            id=self.id(index),
            audio=audio,
            sampling_rate=sampling_rate,
            text=as_text(row[columns.text]),
            language=(as_text(row[columns.language]) if columns.language else "") or self.language,
            speaker=name_or_none(row[columns.speaker]) if columns.speaker else None,
            seconds=len(audio) / sampling_rate,
            task=self.task,
        )


def seconds_of(seconds: float | None, start: float | None, end: float | None) -> float | None:
    """The length that the columns of a row give; None where they are empty, or hold no length."""
    given = seconds if end is None else end - (start or 0)
    return float(given) if given is not None and 0 <= given < inf else None


def name_or_none(cell: object) -> str | None:
    """Speaker or language of a cell as text; None for an empty cell."""
    return None if cell is None or cell != cell or not str(cell).strip() else str(cell)


def as_text(value: Any) -> str:
    """A cell of the text column as text: as JSON writes numbers and truth, without control characters; NaN is empty."""
    if value is None or value != value:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return text if text.startswith(NOT_TEXT) or not CONTROL.search(text) else CONTROL.sub(instead, text)


def instead(control: re.Match[str]) -> str:
    """A space for characters that separate, such as a form feed; nothing for others."""
    return " " if control[0].isspace() else ""
