"""Recordings of noise and of rooms, which augmentations draw from: the files of a folder or the cells of a dataset."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from sedtrain.data.audio import UNREADABLE, is_audio_file, opened
from sedtrain.data.audio_paths import files_in
from sedtrain.data.source import check_columns
from sedtrain.data.sources import load_rows
from sedtrain.errors import UserError


def audio_files(option: str, folder: str, write: str) -> list[str]:
    """The audio files of a folder and those below it, in one order everywhere.

    option, write: which option names the folder, and what to write where it holds no audio
    Raises UserError where there are no files, or one that cannot be read.
    """
    where = Path(folder).expanduser()
    files = sorted(filter(is_audio_file, files_in(where)))
    if not files:
        wrong = "there is no audio in it" if where.is_dir() else "there is no such folder"
        raise UserError(option, folder, wrong, write)
    for file in files:
        try:
            with opened(file) as sound:
                if not sound.frames:
                    raise OSError("it has no samples")
        except UNREADABLE as error:
            wrong, write = (
                f"{file} cannot be read ({error})",
                "write a folder whose audio files can all be read",
            )
            raise UserError(option, folder, wrong, write) from error
    return files


def audio_cells(path: str, split: str, name: str | None, column: str) -> Sequence[Any]:
    """A column of a dataset, whose cells are read when they are asked for. Raises UserError."""
    option, value = "path", path
    try:
        rows = load_rows(path, split, name)
        option, value = "column", column
        check_columns({"audio": column}, rows.features, f"{path} ({split})")
    except UserError as error:
        write = "write path=DATASET split=SPLIT column=COLUMN that holds audio"
        raise UserError(option, value, error.wrong, write) from error
    if isinstance(rows.features[column], datasets.Audio):
        rows = rows.cast_column(column, datasets.Audio(decode=False))
    cells: Sequence[Any] = rows.select_columns([column])[column]
    return cells
