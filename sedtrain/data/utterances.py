"""Rows of a `datasets` dataset as utterances: which column holds what, segments, lengths, decoded audio."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from math import isnan, nan
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import get_worker_info

from sedtrain.batch import Skipped, Utterance
from sedtrain.data.audio import UNREADABLE, read_audio, refuse_silence, seconds_between
from sedtrain.data.buckets import Floats
from sedtrain.data.paths import local_path
from sedtrain.data.tables import NOT_TEXT, PROBLEM, by_role, in_words
from sedtrain.errors import UserError

logger = logging.getLogger(__name__)

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # Unicode's Cc but tab, line feed, carriage return
ROWS_AT_ONCE = 64  # rows whose headers one thread reads at a time
CELLS_AT_ONCE = 10_000  # rows of which cells are Python values, each many times larger than in a table

Reason = tuple[str, str]
"""A few words to be counted by, and a detail."""


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


NUMBERS = ("null", "int", "uint", "float", "decimal")
TIMES = (*NUMBERS, "string", "large_string")
TEXTS = (*TIMES, "bool")


def holds(feature: Any, kinds: tuple[str, ...]) -> bool:
    """Tells whether a column holds single values of one of these kinds of Arrow types."""
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(kinds)


def is_audio(feature: Any) -> bool:
    is_both = isinstance(feature, dict) and not feature.keys().isdisjoint({"bytes", "path"})
    is_plain = holds(feature, ("null", "binary", "large_binary", "string", "large_string"))
    return is_plain or is_both or isinstance(feature, datasets.Audio)


WANTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "audio": (is_audio, "bytes or the path of a file"),
    "text": (partial(holds, kinds=TEXTS), "text"),
    "id": (partial(holds, kinds=TEXTS), "text or numbers"),
    **dict.fromkeys(("seconds", "start", "end"), (partial(holds, kinds=TIMES), "numbers")),
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
        fits, wanted = WANTED.get(role, (lambda feature: True, ""))
        if not fits(features[column]):
            raise UserError(
                "data.columns",
                column,
                f"{source} has {str(features[column])[:80]} in the column {column!r} for the {role}, expected {wanted}",
                f"write data.columns.NAME=COLUMN that holds {wanted}",
            )


class UtteranceRows:
    """Rows as utterances, decoded one by one.

    table:       a column for each role of `Columns`, as `by_role` makes it
    problems:    why rows cannot be used, by their number
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
        if features:  # a file without a readable line has none
            check_columns(vars(columns), features, f"{path} ({split})")
        self.split, self.prefix, self.language, self.task = split, prefix, language, task
        source = local_path(path)
        self.file = file or (str(source) if source.exists() else path)
        self.folder = folder or (source if source.is_dir() else source.parent)
        self.fingerprint = f"{rows._fingerprint} {columns}"
        self.table, self.problems = by_role(rows, vars(columns))
        self.warn_of_control()
        self.refuse_twins(columns.id)

    def __len__(self) -> int:
        return len(self.table)

    def warn_of_control(self) -> None:
        """Warns of texts with control characters, which `as_text` takes out; workers leave it to their parent."""
        if get_worker_info() is not None:
            return
        cells = pc.cast(self.table["text"], pa.large_string())
        has_control = pc.and_not(pc.match_substring_regex(cells, CONTROL.pattern), pc.starts_with(cells, NOT_TEXT))
        found = pc.indices_nonzero(has_control)
        if len(found):
            words = "%s: texts from which control characters are taken out: %d (first: %s)"
            logger.warning(words, self.split, len(found), self.id(found[0].as_py()))

    def refuse_twins(self, column: str | None) -> None:
        """Raises UserError where two rows have one id."""
        given = self.table["id"]
        if given.null_count == len(self) or pc.count_distinct(given, mode="only_valid").as_py() == len(self):
            return
        rows: dict[str, int] = {}
        for index, id in enumerate(self.ids()):
            if (first := rows.setdefault(id, index)) != index:
                raise UserError(
                    "data.columns.id",
                    column,
                    f"rows {first} and {index} of {self.split!r} have the same id, {id.removeprefix(self.prefix)!r}",
                    "write data.columns.id=COLUMN of ids that differ, or data.columns.id=null to name rows by their number",
                )

    def chunks(self) -> Iterator[range]:
        """All rows, as many at a time as may be Python values at once."""
        return (range(first, min(first + CELLS_AT_ONCE, len(self))) for first in range(0, len(self), CELLS_AT_ONCE))

    def row(self, index: int) -> dict[str, Any]:
        """The cells of a row by role."""
        return {role: self.table[role][index].as_py() for role in self.table.column_names}

    def cells(self, role: str, indices: Sequence[int] | None = None) -> list[Any]:
        """A column of all or of some rows."""
        column = self.table[role]
        if indices is None or isinstance(indices, range):
            return list((column if indices is None else column[indices.start : indices.stop]).to_pylist())
        return [column[index].as_py() for index in indices]

    def texts(self, indices: Sequence[int] | None = None) -> list[str]:
        """The texts of all or of some rows; reads no audio."""
        return [as_text(value) for value in self.cells("text", indices)]

    def languages(self, indices: Sequence[int] | None = None) -> set[str | None]:
        """The languages of all or of some rows."""
        return {as_text(value) or self.language for value in self.cells("language", indices)}

    def ids(self) -> Iterator[str]:
        return (id for chunk in self.chunks() for id in map(self.id_of, chunk, self.cells("id", chunk)))

    def index_of(self, id: str) -> int | None:
        """The row of an id, None where there is none."""
        return next((index for index, each in enumerate(self.ids()) if each == id), None)

    def id(self, index: int) -> str:
        return self.id_of(index, self.row(index)["id"])

    def id_of(self, index: int, value: Any) -> str:
        return self.prefix + (f"{self.split}-{index}" if value is None else str(value))

    def seconds(self, indices: Sequence[int] | None = None) -> Floats:
        """(N,) the length of each utterance, from its columns, else from the header of its audio, else NaN."""
        lengths = self.declared(indices)
        missing = np.flatnonzero(np.isnan(lengths)).tolist()
        lengths[missing] = list(self.by_header(missing if indices is None else [indices[each] for each in missing]))
        return lengths

    def declared(self, indices: Sequence[int] | None = None) -> Floats:
        """(N,) the lengths by columns alone; NaN where they give none."""
        if indices is None:
            return np.array(self.table["seconds"].cast(pa.float64()).fill_null(nan).to_numpy(), dtype=np.float64)
        return np.array(self.cells("seconds", indices), dtype=np.float64)

    def by_header(self, indices: Sequence[int]) -> Iterator[float]:
        """The lengths by the headers of the audio, read in threads; NaN where a header cannot be read."""
        chunks = [indices[first : first + ROWS_AT_ONCE] for first in range(0, len(indices), ROWS_AT_ONCE)]
        if len(chunks) == 1:
            yield from self.headers(indices)
            return
        with ThreadPoolExecutor() as pool:
            for lengths in pool.map(self.headers, chunks):
                yield from lengths

    def headers(self, indices: Sequence[int]) -> list[float]:
        return [self.length_or_reason(self.row(index))[0] for index in indices]

    def length_or_reason(self, row: Mapping[str, Any], declared: float | None = None) -> tuple[float, Reason]:
        """The length by the header of the audio and ("", ""), or NaN and the reason for that with a detail."""
        try:
            return seconds_between(row["audio"], self.folder, row["start"], row["end"], declared), ("", "")
        except UNREADABLE as error:
            return nan, (getattr(error, "reason", "unreadable audio"), str(error))

    def problem(self, index: int, seconds: float) -> Reason | None:
        """Reason and detail for a row that cannot be used, else None; seconds: its length, NaN where none was found."""
        if text := self.problems.get(index):
            reason, _, detail = text.partition(": ")
            return reason, detail
        if isnan(seconds):
            length, reason_and_detail = self.length_or_reason(self.row(index))
            return reason_and_detail if isnan(length) else ("unreadable audio", "at first")
        return None

    def misdeclared(self, index: int) -> Reason | None:
        """Reason and detail for a row whose columns give another length than the header of its audio, if it has any."""
        row = self.row(index)
        length, reason = (0.0, None) if row["seconds"] is None else self.length_or_reason(row, row["seconds"])
        return reason if isnan(length) else None

    def skipped(self, index: int, reason: str, detail: str) -> Skipped:
        """The row as an utterance that is left out."""
        row = self.row(index)
        return Skipped(self.id_of(index, row["id"]), reason, detail, self.location(row["audio"]))

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
        row = self.row(index)
        audio = read_audio(row["audio"], sampling_rate, self.folder, row["start"], row["end"], row["seconds"])
        if not may_be_silent:
            refuse_silence(audio)
        return Utterance(
            id=self.id_of(index, row["id"]),
            audio=audio,
            sampling_rate=sampling_rate,
            text=as_text(row["text"]),
            language=as_text(row["language"]) or self.language,
            speaker=name_or_none(row["speaker"]),
            seconds=len(audio) / sampling_rate,
            task=self.task,
        )


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
