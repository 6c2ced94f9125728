"""The rows of a dataset: the embedded corpus, files, folders, or the Hub."""

import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import datasets
from datasets.utils.file_utils import cached_path

from sedtrain.data.audio_paths import files_in
from sedtrain.data.folders import has_audio, read_folder
from sedtrain.data.parquet import refuse_unpacking
from sedtrain.data.paths import expanded, files_at, files_of, is_here, local_path
from sedtrain.data.readers import BrokenFile, cache_folder, one_line, read_rows, suffix_of
from sedtrain.data.source import Source
from sedtrain.data.tables import joined
from sedtrain.errors import UserError
from sedtrain.hub import go_offline_if_unreachable

PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
SLICED = re.compile(r"([^\[+]+)(\[.*\])")
SPLIT_LIKE = re.compile(r"(train|valid|validation|dev|eval|test)(?![a-z])", re.IGNORECASE)


def load_rows(path: str, split: str, name: str | None = None) -> datasets.Dataset:
    """The rows of one split.

    path:  `spoken_digits` (embedded), a file, a folder, a pattern of files, or a Hub id, `ID@REVISION` for a branch. A
           file and a pattern hold whatever split is asked for; in a pattern `{split}` stands for its name. A folder
           holds files or a folder named after each split, or whatever else `datasets.load_dataset` reads.
    split: may be sliced, as in `train[:90%]`
    name:  the Hub's configuration

    Raises UserError where nothing is there, where the split is missing or empty, or where the Hub cannot be reached.
    """
    datasets.disable_progress_bars()
    with readable(path, split):
        rows = local_rows(path, split)
        if rows is None:
            rows = from_datasets(path, split, name)
    if len(rows) == 0:
        raise empty_split(path, split)
    return rows


@contextmanager
def readable(path: str, split: str) -> Iterator[None]:
    """Turns errors of finding or reading the dataset into UserErrors."""
    where = local_path(path)
    looks_local = path.startswith((".", "/", "~")) or path.partition("@")[0].count("/") > 1 or suffix_of(path)
    if looks_local and not is_here(path):
        write = "write data.path=FOLDER_OR_FILE_OR_HUB_ID"
        raise UserError("data.path", path, "there is no such file or folder", write)
    if where.exists() and not (where.is_file() or where.is_dir()):
        raise UserError("data.path", path, "this is a pipe or a device", "write data.path=FOLDER_OR_FILE_OR_HUB_ID")
    if not where.exists():
        go_offline_if_unreachable()
    try:
        yield
    except UserError:
        raise
    except (ConnectionError, FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        what = "this folder holds no" if where.exists() else "neither a folder here nor a"
        wrong = f"{what} dataset that can be read ({one_line(error)})"
        write = "write data.path=FOLDER with Parquet files, or data=spoken_digits, which needs no network"
        python = "write path=FOLDER with Parquet files, or path='spoken_digits', which needs no network"
        raise UserError("data.path", path, wrong, write, python) from error
    except (ValueError, OSError, RecursionError, datasets.exceptions.DatasetGenerationError) as error:
        words = f"{error.file}: {error}" if isinstance(error, BrokenFile) else one_line(error.__cause__ or error)
        options = "data.train_split, data.validation_split, data.test_split"
        write = getattr(error, "write", None) or f"write {options} that the dataset has, in files that can be read"
        raise UserError("data.path", path, f"split {split!r}: {words}", write) from error


def local_rows(path: str, split: str) -> datasets.Dataset | None:
    """The rows of a split at a local path, or None for what `datasets` has to read itself."""
    where, sliced = local_path(path), SLICED.fullmatch(split)
    whole = sliced[1] if sliced else split
    if files := files_of(path, whole):
        with ThreadPoolExecutor() as pool:
            return cut(joined(list(pool.map(read_rows, files))), split)
    if not where.is_dir():
        return None
    rows = saved_rows(where, whole) if is_saved(where) else folder_rows(where, whole)
    return rows and cut(rows, split)


def cut(rows: datasets.Dataset, split: str) -> datasets.Dataset:
    """The slice of a split that it is asked for, as in `train[:90%]`."""
    if not (sliced := SLICED.fullmatch(split)):
        return rows
    [wanted] = datasets.ReadInstruction.from_spec(f"rows{sliced[2]}").to_absolute({"rows": len(rows)})
    return rows.select(range(wanted.from_, wanted.to))


def is_saved(folder: Path) -> bool:
    """True for a folder that `save_to_disk` of `datasets` wrote."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def saved_rows(folder: Path, split: str) -> datasets.Dataset:
    """A split of what `save_to_disk` wrote; a single Dataset holds whatever split is asked for."""
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise missing_split(folder, split, list(saved))
    return saved[split]


def folder_rows(folder: Path, split: str) -> datasets.Dataset | None:
    """The audio of the subfolder named after the split, or of a folder without subfolders named after splits."""
    if (folder / split).is_dir():
        return read_folder(folder / split, folder) if has_audio(folder / split) else None
    if not has_audio(folder):
        return None
    inside = sorted(entry.stem if entry.is_file() else entry.name for entry in folder.iterdir())
    if others := [name for name in inside if SPLIT_LIKE.match(name)]:
        raise missing_split(folder, split, others)
    return read_folder(folder)


def empty_split(path: str, split: str) -> UserError:
    return UserError("data.path", path, f"the split {split!r} is empty", "write a split with at least one row")


def missing_split(folder: Path, split: str, others: list[str]) -> UserError:
    wrong = f"there is no split {split!r}, there are {', '.join(others)}"
    options, slices = "data.train_split, data.validation_split, data.test_split", "'train[:90%]', 'train[90%:]'"
    return UserError("data.path", str(folder), wrong, f"write {options} that are there, or slices of one: {slices}")


def from_datasets(path: str, split: str, name: str | None) -> datasets.Dataset:
    repository, revision = hub_or_folder(path)
    try:
        builder = datasets.load_dataset_builder(
            repository, name, revision=revision, cache_dir=cache_of(local_path(path))
        )
        parts = [(part, own_files(builder, part.partition("[")[0])) for part in split.split("+")]
        if all(files for _, files in parts):
            read = [(part, [read_rows(Path(cached_path(file)), name=file) for file in files]) for part, files in parts]
            return joined([cut(joined(rows), part) for part, rows in read])
        for file in map(str, chain.from_iterable((builder.config.data_files or {}).values())):
            if file.lower().endswith(PACKED):
                refuse_unpacking(cached_path(file), file)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        write = "write data.path=HUB_ID of a copy as Parquet, or data.path=HUB_ID@REVISION where the branch REVISION is Parquet"
        raise UserError("data.path", path, one_line(error), write) from error


def places_of(source: Source, split: str) -> list[str]:
    """The paths or URLs of the files of one split; none for a split that is not stored in files."""
    if "://" in source.path:
        return [place for url in expanded(source.path.replace("{split}", split)) for place in files_at(url)]
    if files := files_of(source.path, split):
        return list(map(str, files))
    if is_saved(local_path(source.path)):
        return []
    with readable(source.path, split):
        repository, revision = hub_or_folder(source.path)
        builder = datasets.load_dataset_builder(repository, source.name, revision=revision)
        places = list(map(str, (builder.config.data_files or {}).get(split, [])))
        return places if all(map(suffix_of, places)) else []


def own_files(builder: datasets.DatasetBuilder, split: str) -> list[str]:
    """The files of a split that are read here: `datasets` guesses the types of text, and unfolds Parquet without a bound."""
    by_split, separator = builder.config.data_files or {}, getattr(builder.config, "sep", None)
    files = list(map(str, by_split.get(split, ())))
    wanted = {".csv": ",", ".tsv": "\t", ".json": None, ".jsonl": None, ".parquet": None}
    return files if all(wanted.get(suffix_of(file) or "", "") == separator for file in files) else []


def hub_or_folder(path: str) -> tuple[str, str | None]:
    """A folder, or a Hub id with its revision."""
    where = local_path(path)
    hub_id, _, revision = path.partition("@")
    return (str(where), None) if where.exists() else (hub_id, revision or None)


def cache_of(folder: Path) -> str | None:
    """The cache of a folder with a card: `datasets` would know it by its name alone, whatever it holds now."""
    if not (folder / "README.md").is_file():
        return None
    files = sorted(Path(file) for file in files_in(folder))
    facts = [(str(file.resolve()), (at := file.stat()).st_size, at.st_mtime_ns) for file in files]
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
    return str(cache_folder(key))
