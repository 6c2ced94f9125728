"""Rows of a `datasets` dataset seen as utterances: columns, segments, lengths, decoding."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from math import inf
from pathlib import Path
from typing import Any

import datasets

from sedtrain.batch import Skipped, Utterance
from sedtrain.data.clips import UNREADABLE, read_audio, refuse_silence, seconds_between
from sedtrain.data.columns import Columns, check_columns, rows_by_id
from sedtrain.data.formats import with_readable_text
from sedtrain.data.manifests import PROBLEM
from sedtrain.data.sources import local_path

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
