"""Reads rows of a dataset as utterances: ids, texts, lengths, decoded audio, and the problems of rows."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import isnan, nan
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import get_worker_info

from sedtrain.batch import Skipped, Utterance
from sedtrain.data.audio import fields_of, read_audio, refuse_silence, seconds_between
from sedtrain.data.buckets import Floats, Integers
from sedtrain.data.headers import RefusedAudio
from sedtrain.data.roles import by_role, check_columns, cleaned, rows_where, unclean
from sedtrain.data.source import Source
from sedtrain.data.tables import PROBLEM
from sedtrain.errors import UserError

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 64  # rows whose headers one thread reads at a time
CELLS_AT_ONCE = 10_000  # rows turned into Python values at a time; these are many times larger than Arrow cells

Reason = tuple[str, str]
"""A short reason, by which skipped utterances are counted, and a detail."""


class UtteranceRows:
    """Rows of a dataset as utterances, decoded one by one.

    name:  name of the split or of its file; rows without an id are named after it
    file:  file of the rows, for the list of skipped utterances
    table: result of `by_role`, with texts without control characters
    problems: reasons why rows cannot be used, by row number

    Raises UserError for a missing column, for a column of a wrong type, and for two rows with one id.
    """

    def __init__(self, rows: datasets.Dataset, source: Source, name: str, file: str | None = None) -> None:
        check_columns(vars(source.columns), rows.features, f"{source.path} ({name})")
        self.source, self.name, self.folder = source, name, source.folder
        self.prefix = f"{source.label}/" if source.label else ""
        self.file = file or source.path
        self.fingerprint = f"{rows._fingerprint} {source.columns}"
        self.table = by_role(rows, source)
        found = self.table[PROBLEM]
        indices = rows_where(found.is_valid()).to_pylist()
        self.problems: dict[int, str] = dict(zip(indices, found.drop_null().to_pylist(), strict=True))
        self.take_out_control()
        self.refuse_same_ids()

    def __len__(self) -> int:
        return len(self.table)

    def take_out_control(self) -> None:
        """Takes control characters out of the texts and logs a warning; workers leave the warning to their parent."""
        number, texts = self.table.column_names.index("text"), self.table["text"].cast(pa.large_string())
        found = rows_where(unclean(texts))
        if len(found):
            self.table = self.table.set_column(number, "text", cleaned(texts))
        if len(found) and get_worker_info() is None:
            words = "%s: texts from which control characters are taken out: %d (first: %s)"
            logger.warning(words, self.name, len(found), self.id(found[0].as_py()))

    def refuse_same_ids(self) -> None:
        """Raises UserError where two rows have one id."""
        given = self.table["id"]
        if given.null_count == len(self) or pc.count_distinct(given, mode="only_valid").as_py() == len(self):
            return
        rows: dict[str, int] = {}
        for index, id in enumerate(self.ids()):
            if (first := rows.setdefault(id, index)) != index:
                both = f"rows {first} and {index} of {self.name!r}"
                wrong = f"{both} have the same id, {id.removeprefix(self.prefix)!r}"
                write = "write data.columns.id=COLUMN of ids that differ, or data.columns.id=null to name rows by their number"
                raise UserError("data.columns.id", self.source.columns.id, wrong, write)

    def chunks(self) -> Iterator[range]:
        """Ranges of at most CELLS_AT_ONCE rows that cover all rows."""
        return (range(first, min(first + CELLS_AT_ONCE, len(self))) for first in range(0, len(self), CELLS_AT_ONCE))

    def row(self, index: int) -> dict[str, Any]:
        """The cells of a row by role."""
        [row] = self.table.slice(index, 1).to_pylist()
        return dict(row)

    def cells(self, role: str, indices: Sequence[int] | None = None) -> list[Any]:
        """The cells of a column, for all rows or for `indices`."""
        column = self.table[role]
        wanted = range(len(self)) if indices is None else indices
        first = wanted[0] if wanted else 0
        if list(wanted) == list(range(first, first + len(wanted))):
            return list(column.slice(first, len(wanted)).to_pylist())
        return [column[index].as_py() for index in wanted]

    def texts(self, indices: Sequence[int] | None = None) -> list[str]:
        """The texts of all rows or of `indices`; reads no audio."""
        return [text or "" for text in self.cells("text", indices)]

    def ids(self) -> Iterator[str]:
        return (id for chunk in self.chunks() for id in map(self.id_of, chunk, self.cells("id", chunk)))

    def index_of(self, id: str) -> int | None:
        """The row with this id, None if there is none."""
        return next((index for index, found in enumerate(self.ids()) if found == id), None)

    def id(self, index: int) -> str:
        return self.id_of(index, self.table["id"][index].as_py())

    def id_of(self, index: int, given: str | None) -> str:
        return self.prefix + (f"{self.name}-{index}" if given is None else given)

    def seconds(self, indices: Sequence[int] | None = None) -> Floats:
        """(N,) the seconds of each utterance from its columns, else from the header of its audio, else NaN."""
        among = np.array(range(len(self)) if indices is None else indices, np.int64)
        lengths = self.declared()[among]
        missing = np.isnan(lengths)
        lengths[missing] = list(self.by_header(among[missing]))
        return lengths

    def declared(self) -> Floats:
        """(N,) the seconds that columns declare, else NaN."""
        return np.array(self.table["seconds"].cast(pa.float64()).fill_null(nan).to_numpy(), dtype=np.float64)

    def by_header(self, indices: Integers) -> Iterator[float]:
        """Yields the seconds by the headers of the audio, read in threads; NaN for an unreadable header."""

        def of_some(chunk: Integers) -> list[float]:
            found = (self.length_or_reason(self.row(index)) for index in chunk.tolist())
            return [nan if isinstance(length, tuple) else length for length in found]

        with ThreadPoolExecutor() as pool:
            for lengths in pool.map(of_some, np.split(indices, range(ROWS_AT_ONCE, len(indices), ROWS_AT_ONCE))):
                yield from lengths

    def length_or_reason(self, row: Mapping[str, Any], declared: float | None = None) -> float | Reason:
        """The seconds by the header of the audio, or reason and detail if the audio is refused."""
        try:
            return seconds_between(row["audio"], self.folder, row["start"], row["end"], declared)
        except RefusedAudio as error:
            return error.reason, str(error)

    def problem(self, index: int, seconds: float) -> Reason | None:
        """Reason and detail for a row that cannot be used, else None. seconds: length of the row, NaN if unknown"""
        if text := self.problems.get(index):
            reason, _, detail = text.partition(": ")
            return reason, detail
        if isnan(seconds):
            found = self.length_or_reason(self.row(index))
            return found if isinstance(found, tuple) else ("unreadable audio", "at first")
        return None

    def misdeclared(self, index: int) -> Reason | None:
        """Reason and detail if a declared length differs from the header, or if the audio is refused; else None."""
        row = self.row(index)
        found = None if row["seconds"] is None else self.length_or_reason(row, row["seconds"])
        return found if isinstance(found, tuple) else None

    def skipped(self, index: int, reason: str, detail: str) -> Skipped:
        """The row as a skipped utterance."""
        return Skipped(self.id(index), reason, detail, self.location(self.table["audio"][index].as_py()))

    def location(self, cell: Any) -> str:
        """The file of a cell's audio, with its first byte in a larger file; for a cell of bytes, the file of the row."""
        values = fields_of(cell)
        if values.get("bytes") is not None or not values.get("path"):
            return self.file
        path = str(self.folder / str(values["path"]))
        return path if values.get("offset") is None else f"{path}, byte {values['offset']}"

    def utterance(self, index: int, sampling_rate: int, may_be_silent: bool = False) -> Utterance:
        """Row `index`, decoded, mixed down and resampled to `sampling_rate`.

        Raises RefusedAudio for audio that cannot be decoded, has another length than declared, or is silent.
        """
        row = self.row(index)
        audio = read_audio(row["audio"], sampling_rate, self.folder, row["start"], row["end"], row["seconds"])
        if not may_be_silent:
            refuse_silence(audio)
        return Utterance(
            id=self.id_of(index, row["id"]),
            audio=audio,
            sampling_rate=sampling_rate,
            text=row["text"] or "",
            language=row["language"] or self.source.language,
            speaker=row["speaker"],
            seconds=len(audio) / sampling_rate,
            task=self.source.task,
        )
