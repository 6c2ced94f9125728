"""Recordings without texts, of noise or of rooms: the audio files of a folder, or a column of a dataset."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import soundfile

from sedtrain.batch import UserError
from sedtrain.data.clips import UNREADABLE, is_audio_file
from sedtrain.data.columns import check_columns
from sedtrain.data.sources import load_rows, local_path, one_line


def audio_files(option: str, folder: str, instead: str) -> list[str]:
    """The audio files of a folder and those below it, in one order everywhere.

    option, instead: which option names the folder, and what to write where there is none
    Raises UserError where there are none, or one that cannot be read.
    """
    where = Path(folder).expanduser()
    files = sorted(path.as_posix() for path in where.rglob("*") if is_audio_file(path.name))
    if not files:
        wrong = f"{option}={folder}: {'there is no audio in it' if where.is_dir() else 'there is no such folder'}"
        raise UserError(wrong, instead)
    for file in files:
        try:
            if not soundfile.info(file).frames:
                raise OSError("it has no samples")
        except UNREADABLE as error:
            wrong = f"{option}={folder}: {file} cannot be read ({one_line(error)})"
            raise UserError(wrong, f"{option}=FOLDER whose audio files can all be read") from error
    return files


def audio_cells(path: str, split: str, name: str | None, column: str) -> Sequence[Any]:
    """A column of a dataset, of which each cell is read when it is asked for. Raises UserError."""
    try:
        rows = load_rows(path, split, name)
        check_columns({"audio": column}, rows.features, f"{path} ({split})")
    except UserError as error:
        wrong = error.what_is_wrong.replace("data.columns:", "column:").removeprefix("data.")
        raise UserError(wrong, "path=DATASET split=SPLIT column=COLUMN that holds audio") from error
    if isinstance(rows.features[column], datasets.Audio):
        rows = rows.cast_column(column, datasets.Audio(decode=False))
    cells: Sequence[Any] = rows.select_columns([column])[column]
    return cells


def folder_of(path: str) -> Path:
    """Where the relative paths of a dataset's audio begin."""
    where = local_path(path)
    return where if where.is_dir() else where.parent
