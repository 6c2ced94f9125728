"""Rows of a `datasets` dataset become utterances: columns, decoding, resampling, filters.

S samples. Audio is decoded by soundfile from the bytes as they are stored: neither torchcodec nor FFmpeg is needed.
"""

import glob
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import soundfile
import soxr
import torch

from sedtrain.batch import UserError, Utterance
from sedtrain.hub import go_offline_if_unreachable

AUDIO_FORMATS = {*soundfile.available_formats(), "OPUS"} - {"RAW"}  # raw audio does not say its sampling rate
UNREADABLE = (soundfile.LibsndfileError, OSError, TypeError)
EMBEDDED = Path(__file__).parent / "spoken_digits"
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


@dataclass(frozen=True)
class Columns:
    """Which column of the dataset holds what; None where the dataset has no such column."""

    audio: str
    text: str
    id: str | None = None
    speaker: str | None = None
    language: str | None = None
    seconds: str | None = None

    @classmethod
    def of(cls, columns: Mapping[str, str | None], target: str) -> "Columns":
        """`columns` by role, where `target`, transcription or translation, names the role of the text."""
        roles = ["audio", "transcription", "translation", *(each.name for each in fields(cls)[2:])]
        if unknown := [role for role in columns if role not in roles]:
            instead = f"data.columns.NAME, NAME one of {', '.join(roles)}"
            raise UserError(f"data.columns.{unknown[0]}: there is no such role", instead)
        for role in ("audio", target):
            if columns.get(role) is None:
                raise UserError(f"data.columns.{role} is not set (target={target})", f"data.columns.{role}=COLUMN")
        others = {role: columns.get(role) for role in roles[3:]}
        return cls(audio=str(columns["audio"]), text=str(columns[target]), **others)


def load_rows(path: str, split: str, name: str | None = None) -> datasets.Dataset:
    """The rows of one split, from `spoken_digits` (embedded), a file, a folder or a Hub id.

    A file is Parquet, JSON lines or CSV, and holds whatever split is asked for. A folder holds one such file a split,
    named after it, or anything else that `datasets.load_dataset` reads.
    Raises UserError where nothing is there, where the split is missing, or where the Hub cannot be reached.
    """
    where = local_path(path)
    datasets.disable_progress_bars()
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or where.suffix in READERS
    if looks_local and not where.exists():
        raise UserError(f"data.path={path}: there is no such file or folder", "data.path=FOLDER_OR_FILE_OR_HUB_ID")
    if not where.exists():
        go_offline_if_unreachable()
    try:
        file = split_file(where, split)
        if file is None:
            rows = datasets.load_dataset(str(where) if where.exists() else path, name, split=split)
        elif is_empty(file):
            rows = []
        else:
            rows = datasets.load_dataset(READERS.get(file.suffix, "parquet"), data_files=str(file), split="train")
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


def local_path(path: str) -> Path:
    return EMBEDDED if path == "spoken_digits" else Path(path).expanduser()


def split_file(where: Path, split: str) -> Path | None:
    """`where` itself if it is a file, else the file in it that is named after the split."""
    candidates = [where, *(where / f"{split}{suffix}" for suffix in READERS)]
    return next((file for file in candidates if file.is_file()), None)


def is_empty(file: Path) -> bool:
    """Whether a file holds no rows; of those `datasets` gives errors that say something else."""
    if not file.stat().st_size:
        return True
    return file.suffix == ".parquet" and not pyarrow.parquet.read_metadata(file).num_rows


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


class UtteranceRows:
    """Rows seen as utterances, decoded one by one.

    path, split: where the rows are from; paths of audio files are relative to that folder, and rows without an id are
        named after the split

    Raises UserError when a column is missing, listing those that are there.
    """

    def __init__(self, rows: datasets.Dataset, columns: Columns, path: str, split: str) -> None:
        for role, column in vars(columns).items():
            if column is not None and column not in rows.column_names:
                raise UserError(
                    f"data.columns: {path} ({split}) has no column {column!r} for the {role}, "
                    f"it has {', '.join(rows.column_names)}",
                    "data.columns.NAME=ONE_OF_THESE, where NAME is audio, transcription, translation, id, speaker, "
                    "language or seconds",
                )
        if isinstance(rows.features[columns.audio], datasets.Audio):
            rows = rows.cast_column(columns.audio, datasets.Audio(decode=False))
        self.rows, self.columns, self.split = rows, columns, split
        where = local_path(path)
        self.folder = where if where.is_dir() else where.parent

    def __len__(self) -> int:
        return len(self.rows)

    def texts(self) -> list[str]:
        """Every text of the split; no audio is read."""
        return [as_text(value) for value in self.rows[self.columns.text]]

    def id(self, index: int) -> str:
        return str(self.rows[index][self.columns.id]) if self.columns.id else f"{self.split}-{index}"

    @cached_property
    def index_of(self) -> dict[str, int]:
        """The row of every id."""
        ids = map(str, self.rows[self.columns.id]) if self.columns.id else map(self.id, range(len(self)))
        return {id: index for index, id in enumerate(ids)}

    def seconds(self) -> Iterator[float | None]:
        """The length of each utterance, from its column, else from the audio's header; None where neither tells."""
        given = self.rows[self.columns.seconds] if self.columns.seconds else [None] * len(self)
        for index, value in enumerate(given):
            yield self.seconds_of_audio(index) if value is None else float(value)

    def seconds_of_audio(self, index: int) -> float | None:
        try:
            return float(soundfile.info(audio_file(self.rows[index][self.columns.audio], self.folder)).duration)
        except UNREADABLE:
            return None

    def utterance(self, index: int, sampling_rate: int) -> Utterance:
        """Row `index`, decoded, mixed down and resampled to `sampling_rate`.

        Raises one of UNREADABLE when the audio cannot be decoded.
        """
        row, columns = self.rows[index], self.columns
        audio = read_audio(row[columns.audio], sampling_rate, self.folder)
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
    """A cell of the text column; a CSV or JSON file with digits alone gives numbers."""
    return "" if value is None else str(value)


def audio_file(cell: Any, folder: Path = Path()) -> io.BytesIO | str:
    """What soundfile opens: the bytes or the path of an `Audio(decode=False)` cell, or either as a plain value."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(content, bytes):
        return io.BytesIO(content)
    path = cell.get("path") if isinstance(cell, dict) else cell
    if not path:
        raise OSError("the row has neither audio bytes nor a path")
    return str(folder / path)


def read_audio(cell: Any, sampling_rate: int, folder: Path = Path()) -> torch.Tensor:
    """(S,) float32 in -1..1: one channel (the mean of all) at `sampling_rate` hertz. Raises one of UNREADABLE."""
    samples, stored_rate = soundfile.read(audio_file(cell, folder), dtype="float32", always_2d=True)
    mono = samples.mean(axis=1)
    if not len(mono) or not np.isfinite(mono).all():
        raise OSError("the audio has no samples, or some that are not numbers")
    if stored_rate != sampling_rate:
        mono = soxr.resample(mono, stored_rate, sampling_rate)
    return torch.from_numpy(np.ascontiguousarray(mono, dtype=np.float32))


def audio_paths(audio: str | Sequence[str] | None) -> list[str]:
    """The files that `audio` names: files, globs and folders (searched through).

    Raises UserError where a name stands for none, or for one that is no audio.
    """
    if not audio:
        raise UserError("task=transcribe needs audio", "audio=FILE, audio='FOLDER/*.wav' or 'audio=[a.wav,b.flac]'")
    found: list[str] = []
    for name in [audio] if isinstance(audio, str) else audio:
        where = Path(name).expanduser()
        if where.is_dir():
            matches = [str(path) for path in sorted(where.rglob("*")) if path.suffix[1:].upper() in AUDIO_FORMATS]
        else:
            matches = [str(where)] if where.is_file() else sorted(glob.glob(str(where), recursive=True))
        if not matches:
            raise UserError(f"audio={name}: there is no such audio file", "audio=FILE, a glob that matches or a folder")
        found += matches
    for path in found:
        try:
            soundfile.info(path)
        except UNREADABLE as error:
            no_audio = f"audio={path}: this is no audio ({one_line(error)})"
            raise UserError(no_audio, "audio=FILE that libsndfile can read") from error
    return found
