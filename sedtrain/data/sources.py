"""Rows of a `datasets` dataset become utterances: columns, decoding, resampling, filters.

S samples. Audio is decoded by soundfile from the bytes as they are stored: neither torchcodec nor FFmpeg is needed.
"""

import glob
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import soundfile
import soxr
import torch

from sedtrain.batch import UserError, Utterance
from sedtrain.hub import go_offline_if_unreachable

AUDIO_FORMATS = {*soundfile.available_formats(), "OPUS"}
EMBEDDED = Path(__file__).parent / "spoken_digits"


@dataclass(frozen=True)
class Columns:
    """Which column of the dataset holds what; None where the dataset has no such column."""

    audio: str
    text: str
    id: str | None = None
    speaker: str | None = None
    language: str | None = None
    seconds: str | None = None


def load_rows(path: str, split: str, name: str | None = None) -> datasets.Dataset:
    """The rows of one split, from `spoken_digits` (embedded), a folder, a Parquet file or a Hub id.

    A folder may hold `train.parquet`, `validation.parquet`, `test.parquet` or anything else that `datasets.load_dataset` reads.
    Raises UserError where nothing is there, where the split is missing, or where the Hub cannot be reached.
    """
    where = EMBEDDED if path == "spoken_digits" else Path(path).expanduser()
    datasets.disable_progress_bars()
    looks_local = path.startswith((".", "/", "~")) or path.endswith(".parquet")
    if looks_local and not where.exists():
        raise UserError(f"data.path={path}: there is no such file or folder", "data.path=FOLDER_OR_PARQUET_OR_HUB_ID")
    if not where.exists():
        go_offline_if_unreachable()
    try:
        if where.is_file():
            rows = datasets.load_dataset("parquet", data_files={split: str(where)}, split=split)
        elif (where / f"{split}.parquet").is_file():
            rows = datasets.load_dataset("parquet", data_files={split: str(where / f"{split}.parquet")}, split=split)
        else:
            rows = datasets.load_dataset(str(where) if where.exists() else path, name, split=split)
    except (ConnectionError, FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise UserError(
            f"data.path={path}: neither a folder here nor a dataset that the Hub gives ({one_line(error)})",
            "data.path=FOLDER with Parquet files, or data=spoken_digits, which needs no network",
        ) from error
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(
            f"data.path={path}, split {split!r}: {one_line(error.__cause__ or error)}",
            "a split that the dataset has (data.train_split, data.validation_split, data.test_split), in files that can be read",
        ) from error
    if len(rows) == 0:
        raise UserError(f"data.path={path}: the split {split!r} is empty", "a split with at least one row")
    return rows


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


class UtteranceRows:
    """Rows seen as utterances; `rows[i]` decodes row i.

    Raises UserError when a column is missing, listing those that are there.
    """

    def __init__(self, rows: datasets.Dataset, columns: Columns, where: str) -> None:
        for role, column in vars(columns).items():
            if column is not None and column not in rows.column_names:
                raise UserError(
                    f"data.columns: {where} has no column {column!r} for the {role}, it has {', '.join(rows.column_names)}",
                    "data.columns.NAME=ONE_OF_THESE, where NAME is audio, transcription, translation, id, speaker or seconds",
                )
        if isinstance(rows.features[columns.audio], datasets.Audio):
            rows = rows.cast_column(columns.audio, datasets.Audio(decode=False))
        self.rows, self.columns = rows, columns

    def __len__(self) -> int:
        return len(self.rows)

    def texts(self) -> list[str]:
        """Every text of the split; no audio is read."""
        return [text or "" for text in self.rows[self.columns.text]]

    def id(self, index: int) -> str:
        return str(self.rows.select_columns([self.columns.id])[index][self.columns.id] if self.columns.id else index)

    def seconds(self) -> Iterator[float | None]:
        """The length of each utterance, from its column or from the audio's header; None where it cannot be read."""
        if self.columns.seconds is not None:
            yield from (float(value) for value in self.rows[self.columns.seconds])
            return
        for cell in self.rows.select_columns([self.columns.audio]):
            try:
                yield soundfile.info(audio_file(cell[self.columns.audio])).duration
            except (soundfile.LibsndfileError, OSError, TypeError):
                yield None

    def utterance(self, index: int, sampling_rate: int) -> Utterance:
        """Row `index`, decoded, mixed down and resampled to `sampling_rate`.

        Raises soundfile.LibsndfileError or OSError when the audio cannot be decoded.
        """
        row, columns = self.rows[index], self.columns
        audio = read_audio(row[columns.audio], sampling_rate)
        return Utterance(
            id=self.id(index),
            audio=audio,
            sampling_rate=sampling_rate,
            text=row[columns.text] or "",
            language=row[columns.language] if columns.language else None,
            speaker=row[columns.speaker] if columns.speaker else None,
            seconds=len(audio) / sampling_rate,
        )


def audio_file(cell: Any) -> io.BytesIO | str:
    """What soundfile opens: the bytes of an `Audio(decode=False)` cell, or its path, or a path in a text column."""
    if isinstance(cell, dict) and cell.get("bytes") is not None:
        return io.BytesIO(cell["bytes"])
    path = cell.get("path") if isinstance(cell, dict) else cell
    if not path:
        raise OSError("the row has neither audio bytes nor a path")
    return str(path)


def read_audio(cell: Any, sampling_rate: int) -> torch.Tensor:
    """(S,) float32 in -1..1: one channel (the mean of all) at `sampling_rate` hertz."""
    samples, stored_rate = soundfile.read(audio_file(cell), dtype="float32", always_2d=True)
    mono = samples.mean(axis=1)
    if stored_rate != sampling_rate:
        mono = soxr.resample(mono, stored_rate, sampling_rate)
    return torch.from_numpy(np.ascontiguousarray(mono, dtype=np.float32))


def audio_paths(audio: str | Sequence[str] | None) -> list[str]:
    """The files that `audio` names: files, globs and folders (searched through). Raises UserError when there are none."""
    if not audio:
        raise UserError("task=transcribe needs audio", "audio=FILE, audio='FOLDER/*.wav' or 'audio=[a.wav,b.flac]'")
    found: list[str] = []
    for name in [audio] if isinstance(audio, str) else audio:
        if Path(name).is_dir():
            matches = [str(path) for path in sorted(Path(name).rglob("*")) if path.suffix[1:].upper() in AUDIO_FORMATS]
        else:
            matches = [name] if Path(name).is_file() else sorted(glob.glob(name, recursive=True))
        if not matches:
            raise UserError(f"audio={name}: there is no such audio file", "audio=FILE, a glob that matches or a folder")
        found += matches
    return found
