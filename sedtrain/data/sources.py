"""Rows of a `datasets` dataset become utterances: columns, segments, decoding, filters."""

import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import repeat
from math import inf
from pathlib import Path
from typing import Any

import datasets
import soundfile

from sedtrain.batch import UserError, Utterance
from sedtrain.data.clips import UNREADABLE, RefusedAudio, is_audio_file, read_audio, seconds_between
from sedtrain.data.columns import Columns, check_columns, rows_by_id
from sedtrain.data.formats import TABLES, TARS, local_rows, with_readable_text
from sedtrain.data.manifests import PROBLEM
from sedtrain.hub import go_offline_if_unreachable

EMBEDDED = Path(__file__).parent / "spoken_digits"


def load_rows(path: str, split: str, name: str | None = None) -> datasets.Dataset:
    """The rows of one split, from `spoken_digits` (embedded), a file, a folder or a Hub id, `ID@REVISION` for a branch.

    A file is Parquet, a manifest or a tar, and holds whatever split is asked for. A folder holds one such file or folder
    a split, named after it, or anything else that `datasets.load_dataset` reads.
    Raises UserError where nothing is there, where the split is missing, or where the Hub cannot be reached.
    """
    where = local_path(path)
    datasets.disable_progress_bars()
    looks_local = path.startswith((".", "/", "~")) or path.partition("@")[0].count("/") > 1 or where.suffix in TABLES
    if looks_local and not is_here(where):
        raise UserError(f"data.path={path}: there is no such file or folder", "data.path=FOLDER_OR_FILE_OR_HUB_ID")
    if not where.exists():
        go_offline_if_unreachable()
    try:
        rows = local_rows(str(where), split)
        if rows is None:
            rows = from_datasets(path, split, name)
    except UserError:
        raise
    except (ConnectionError, FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        what = "this folder holds no" if where.exists() else "neither a folder here nor a"
        raise UserError(
            f"data.path={path}: {what} dataset that can be read ({one_line(error)})",
            "data.path=FOLDER with Parquet files, or data=spoken_digits, which needs no network",
        ) from error
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(
            f"data.path={path}, split {split!r}: {one_line(error.__cause__ or error)}",
            "data.train_split, data.validation_split, data.test_split that the dataset has, in files that can be read",
        ) from error
    if len(rows) == 0:
        raise UserError(f"data.path={path}: the split {split!r} is empty", "a split with at least one row")
    return rows


def from_datasets(path: str, split: str, name: str | None) -> datasets.Dataset:
    where = local_path(path)
    if where.exists():
        return datasets.load_dataset(str(where), name, split=split)
    hub_id, _, revision = path.partition("@")
    try:
        return datasets.load_dataset(hub_id, name, split=split, revision=revision or None)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise UserError(
            f"data.path={path}: {one_line(error)}",
            "data.path=HUB_ID of a copy as Parquet, or data.path=HUB_ID@REVISION where the branch REVISION is Parquet",
        ) from error


def local_path(path: str) -> Path:
    return EMBEDDED if path == "spoken_digits" else Path(path).expanduser()


def is_here(where: Path) -> bool:
    """Whether a path is a file or folder, or a pattern of tars, which is looked at when it is read."""
    return where.exists() or where.name.endswith(TARS)


def absolute_path(path: str) -> str:
    """`path` as it is found from any folder; that of a Hub id is the id."""
    where = local_path(path)
    return path if where == EMBEDDED or not is_here(where) else os.path.abspath(where)


def public_name(path: str) -> str:
    """`path` for readers elsewhere: of a file or folder its name alone."""
    where = local_path(path)
    return where.name if is_here(where) else path


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


class UtteranceRows:
    """Rows seen as utterances, decoded one by one.

    path, split: where the rows are from; rows without an id are named after the split
    folder: where relative paths of audio files begin, and what they must not leave; else the folder of `path`

    Raises UserError where a column is missing or holds something else than it should, and where two rows have one id.
    """

    def __init__(
        self, rows: datasets.Dataset, columns: Columns, path: str, split: str, folder: Path | None = None
    ) -> None:
        features = {name: feature for name, feature in rows.features.items() if name != PROBLEM}
        check_columns(vars(columns), features, f"{path} ({split})")
        if isinstance(rows.features[columns.audio], datasets.Audio):
            rows = rows.cast_column(columns.audio, datasets.Audio(decode=False))
        used = dict.fromkeys(column for column in vars(columns).values() if column)
        rows = rows.select_columns([*used, *({PROBLEM} & set(rows.column_names))])
        rows = with_readable_text(rows, [column for column in used if column != columns.audio])
        self.rows, self.columns, self.split = rows, columns, split
        where = local_path(path)
        self.folder = folder or (where if where.is_dir() else where.parent)
        problems = rows[PROBLEM] if PROBLEM in rows.column_names else []
        self.problems = {index: words for index, words in enumerate(problems) if words is not None}
        ids = [self.id_of(index, value) for index, value in enumerate(self.cells(columns.id))]
        self.index_of = rows_by_id(ids, columns.id, split)

    def __len__(self) -> int:
        return len(self.rows)

    def texts(self) -> list[str]:
        """Every text of the split; no audio is read."""
        return [as_text(value) for value in self.rows[self.columns.text]]

    def cells(self, column: str | None) -> Iterable[Any]:
        """A column, or None for each row."""
        return self.rows[column][:] if column else repeat(None, len(self))

    def id(self, index: int) -> str:
        return self.id_of(index, self.rows[index][self.columns.id] if self.columns.id else None)

    def id_of(self, index: int, value: Any) -> str:
        return f"{self.split}-{index}" if value is None else str(value)

    def seconds(self) -> Iterator[float | None]:
        """The length of each utterance, from its columns, else from the audio's header; None where neither tells."""
        columns = (self.columns.seconds, self.columns.start, self.columns.end)
        for index, (seconds, start, end) in enumerate(zip(*map(self.cells, columns), strict=True)):
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
            language=row[columns.language] if columns.language else None,
            speaker=row[columns.speaker] if columns.speaker else None,
            seconds=len(audio) / sampling_rate,
        )


def as_text(value: Any) -> str:
    """A cell of the text column; a CSV or JSON file with digits alone gives numbers, NaN is none."""
    return "" if value is None or value != value else str(value)


def audio_paths(audio: str | Sequence[str] | None) -> list[str]:
    """The files that `audio` names: files, globs and folders (searched through).

    Raises UserError where a name stands for none, or all of them for one that is no audio.
    """
    if not audio:
        raise UserError("task=transcribe needs audio", "audio=FILE, audio='FOLDER/*.wav' or 'audio=[a.wav,b.flac]'")
    found: list[str] = []
    for name in [audio] if isinstance(audio, str) else audio:
        where = Path(name).expanduser()
        if where.is_dir():
            matches = [str(path) for path in sorted(where.rglob("*")) if is_audio_file(path.name)]
        else:
            matches = [str(where)] if where.is_file() else sorted(glob.glob(str(where), recursive=True))
        if not matches:
            raise UserError(f"audio={name}: there is no such audio file", "audio=FILE, a glob that matches or a folder")
        found += matches
    if len(found) == 1:
        try:
            soundfile.info(found[0])
        except UNREADABLE as error:
            no_audio = f"audio={found[0]}: this is no audio ({one_line(error)})"
            raise UserError(no_audio, "audio=FILE that libsndfile can read") from error
    return found
