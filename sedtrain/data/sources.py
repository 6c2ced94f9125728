"""Where rows come from: the embedded corpus, files, folders, the Hub; and the audio files that a command names."""

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import soundfile

from sedtrain.batch import UserError
from sedtrain.data.clips import UNREADABLE, is_audio_file
from sedtrain.data.formats import TABLES, is_pattern, local_rows
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
    with readable(path, split):
        rows = local_rows(str(where), split)
        if rows is None:
            rows = from_datasets(path, split, name)
    if len(rows) == 0:
        raise UserError(f"data.path={path}: the split {split!r} is empty", "a split with at least one row")
    return rows


@contextmanager
def readable(path: str, split: str) -> Iterator[None]:
    """What cannot be found or read while it lasts is a UserError."""
    where = local_path(path)
    looks_local = path.startswith((".", "/", "~")) or path.partition("@")[0].count("/") > 1 or where.suffix in TABLES
    if looks_local and not is_here(where):
        raise UserError(f"data.path={path}: there is no such file or folder", "data.path=FOLDER_OR_FILE_OR_HUB_ID")
    if not where.exists():
        go_offline_if_unreachable()
    try:
        yield
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


def cache_of(folder: Path) -> str | None:
    """Where what is read of a folder is kept; `datasets` knows one with a card by its name alone, whatever lies in it."""
    if not (folder / "README.md").is_file():
        return None
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    facts = [(str(file.resolve()), (at := file.stat()).st_size, at.st_mtime_ns) for file in files]
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "sedtrain" / key)


def from_datasets(path: str, split: str, name: str | None) -> datasets.Dataset:
    where = local_path(path)
    if where.exists():
        return datasets.load_dataset(str(where), name, split=split, cache_dir=cache_of(where))
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
    """Whether a path is a file or folder, or a pattern of files, which is looked at when it is read."""
    return where.exists() or is_pattern(str(where))


def absolute_path(path: str) -> str:
    """`path` as it is found from any folder; that of a Hub id or a URL is the same."""
    where = local_path(path)
    is_found_anywhere = where == EMBEDDED or "://" in path or not is_here(where)
    return path if is_found_anywhere else os.path.abspath(where)


def public_name(path: str) -> str:
    """`path` for readers elsewhere: of a file or folder its name alone."""
    where = local_path(path)
    return where.name if is_here(where) and "://" not in path else path


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


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
