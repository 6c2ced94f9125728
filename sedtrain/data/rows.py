"""Rows of a `datasets` dataset seen as utterances: columns, segments, lengths, decoding."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import repeat
from math import inf
from pathlib import Path
from typing import Any

import datasets

from sedtrain.batch import Utterance
from sedtrain.data.clips import UNREADABLE, RefusedAudio, read_audio, seconds_between
from sedtrain.data.columns import Columns, check_columns, rows_by_id
from sedtrain.data.formats import with_readable_text
from sedtrain.data.manifests import PROBLEM
from sedtrain.data.sources import local_path


class UtteranceRows:
    """Rows seen as utterances, decoded one by one.

    path, split: where the rows are from; rows without an id are named after the split, or the shard of it
    folder: where relative paths of audio files begin, and what they must not leave; else the folder of `path`
    prefix: what their ids begin with, where several datasets are mixed
    language: of the texts of rows that do not say it
    task: how the texts came from the speech

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
        columns = (self.columns.seconds, self.columns.start, self.columns.end)
        cells = (self.cells(column, indices) for column in columns)
        for index, seconds, start, end in zip(range(len(self)) if indices is None else indices, *cells, strict=True):
            given = seconds if end is None else end - (start or 0)
            is_known = given is not None and 0 <= given < inf
            length = float(given) if is_known else None
            with suppress(*UNREADABLE):
                length = self.seconds_of_audio(index) if length is None else length
            yield length

    def seconds_of_audio(self, index: int) -> float:
        """By the audio's header. Raises one of UNREADABLE."""
        row = self.rows[index]
        return seconds_between(row[self.columns.audio], self.folder, *self.segment(row))

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
            with suppress(*UNREADABLE):
                try:
                    self.seconds_of_audio(index)
                except RefusedAudio as error:
                    return error.reason, str(error)
        return None

    def utterance(self, index: int, sampling_rate: int) -> Utterance:
        """Row `index`, decoded, mixed down and resampled to `sampling_rate`.

        Raises one of UNREADABLE when the audio cannot be decoded.
        """
        row, columns = self.rows[index], self.columns
        audio = read_audio(row[columns.audio], sampling_rate, self.folder, *self.segment(row))
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


def as_text(value: Any) -> str:
    """A cell of the text column; a CSV or JSON file with digits alone gives numbers, NaN is none."""
    return "" if value is None or value != value else str(value)
