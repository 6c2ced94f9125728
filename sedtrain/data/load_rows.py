"""Loads the rows of a split from the embedded corpus, files, folders or the Hub."""

import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.utils.file_utils import cached_path

from sedtrain.data.audio_paths import files_in
from sedtrain.data.folders import has_audio, read_folder
from sedtrain.data.parquet import refuse_unpacking
from sedtrain.data.paths import expanded, files_at, files_of, is_here, is_pattern, local_path, missing_split
from sedtrain.data.readers import READERS, cache_folder, one_line, read_rows, suffix_of
from sedtrain.data.source import Source
from sedtrain.data.tables import BrokenFile, joined
from sedtrain.data.toolkits import formatted_rows
from sedtrain.errors import UserError
from sedtrain.hub import go_offline_if_unreachable

PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
SPLIT_LIKE = re.compile(r"(train|valid|validation|dev|eval|test)(?![a-z])", re.IGNORECASE)


def load_rows(path: str, split: str, name: str | None = None, format: str | None = None) -> datasets.Dataset:
    """The rows of one split.

    path:  `spoken_digits` (embedded), a file, a folder, a pattern of files, or a Hub id, `ID@REVISION` for a branch. A
           file or a pattern is used for every split; `{split}` in a pattern stands for the split's name. A folder
           holds files or a folder named after each split, or anything that `datasets.load_dataset` reads.
    split: may be a slice (`train[:90%]`); if splits have separate files, also a sum (`train-clean-100+train-clean-360`)
    name:  the configuration on the Hub
    format: a format of another toolkit, one of `toolkits.FORMATS`

    Raises UserError if nothing is found, if the split is missing or empty, or if the Hub cannot be reached.
    """
    datasets.disable_progress_bars()
    if format is not None and not local_path(path).exists():
        write = "write data.path=FOLDER_OR_FILE of this machine"
        raise UserError("data.path", path, f"format={format} reads files, and there are none", write)
    holds_any = local_path(path).is_file() or (is_pattern(path) and "{split}" not in path)
    with readable(path, split):
        slices = [name.partition("[") for name in ([split] if holds_any else split.split("+"))]
        rows = joined([cut(whole_rows(path, whole, name, format), mark + rest) for whole, mark, rest in slices])
    if len(rows) == 0:
        raise UserError("data.path", path, f"the split {split!r} is empty", "write a split with at least one row")
    return rows


def whole_rows(path: str, split: str, name: str | None, format: str | None) -> datasets.Dataset:
    where = local_path(path)
    if format is not None:
        return formatted_rows(format, where, split, name)
    if files := files_of(path, split):
        with ThreadPoolExecutor() as pool:
            return joined(list(pool.map(read_rows, files)))
    if is_saved(where):
        return saved_rows(where, split)
    found = folder_rows(where, split) if where.is_dir() else None
    return from_datasets(path, split, name) if found is None else found


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
    except (
        ValueError,
        OSError,
        RecursionError,
        pa.ArrowException,
        datasets.exceptions.DatasetGenerationError,
    ) as error:
        words = f"{error.file}: {error}" if isinstance(error, BrokenFile) else one_line(error.__cause__ or error)
        options = "data.train_split, data.validation_split, data.test_split"
        write = getattr(error, "write", None) or f"write {options} that the dataset has, in files that can be read"
        raise UserError("data.path", path, f"split {split!r}: {words}", write) from error


def cut(rows: datasets.Dataset, part: str) -> datasets.Dataset:
    """The rows of a slice such as `[:90%]`; all rows if `part` is empty."""
    [wanted] = datasets.ReadInstruction.from_spec(f"rows{part}").to_absolute({"rows": len(rows)})
    return rows.select(range(wanted.from_, wanted.to))


def is_saved(folder: Path) -> bool:
    """True for a folder that `save_to_disk` of `datasets` wrote."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def saved_rows(folder: Path, split: str) -> datasets.Dataset:
    """A split of a folder that `save_to_disk` wrote; a single Dataset is used for every split."""
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise missing_split(folder, split, list(saved))
    return saved[split]


def folder_rows(folder: Path, split: str) -> datasets.Dataset | None:
    """The rows of the subfolder named after the split; of the folder itself, if nothing in it is named like a split.

    None if there is no audio. Raises UserError if only other splits are there.
    """
    if (folder / split).is_dir():
        return read_folder(folder / split, folder) if has_audio(folder / split) else None
    if not has_audio(folder):
        return None
    inside = sorted(entry.stem if entry.is_file() else entry.name for entry in folder.iterdir())
    if others := [name for name in inside if SPLIT_LIKE.match(name)]:
        raise missing_split(folder, split, others)
    return read_folder(folder)


def from_datasets(path: str, split: str, name: str | None) -> datasets.Dataset:
    try:
        builder = builder_of(path, name)
        if files := own_files(builder, split):
            return joined([read_rows(Path(cached_path(file)), name=file) for file in files])
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
    """The paths or URLs of the files of one split; empty for a split that is not stored in readable files."""
    if "://" in source.path:
        return [place for url in expanded(source.path.replace("{split}", split)) for place in files_at(url)]
    if files := files_of(source.path, split):
        return list(map(str, files))
    if is_saved(local_path(source.path)):
        return []
    with readable(source.path, split):
        places = list(map(str, (builder_of(source.path, source.name).config.data_files or {}).get(split, [])))
        return places if all(map(suffix_of, places)) else []


def own_files(builder: datasets.DatasetBuilder, split: str) -> list[str]:
    """The files of a split, if our own readers can read them all; else none.

    `datasets` would guess the types of text, and would unfold Parquet without a bound.
    """
    by_split, separator = builder.config.data_files or {}, getattr(builder.config, "sep", None)
    files = list(map(str, by_split.get(split, ())))
    wanted = {**dict.fromkeys(READERS), ".csv": ",", ".tsv": "\t", ".tar": ""}  # separators; `datasets` reads tars
    return files if all(wanted.get(suffix_of(file) or "", "") == separator for file in files) else []


def builder_of(path: str, name: str | None) -> datasets.DatasetBuilder:
    """The builder by which `datasets` reads a folder or a Hub id with its revision."""
    where = local_path(path)
    hub_id, _, revision = path.partition("@")
    repository, version = (str(where), None) if where.exists() else (hub_id, revision or None)
    return datasets.load_dataset_builder(repository, name, revision=version, cache_dir=cache_of(where))


def cache_of(folder: Path) -> str | None:
    """The cache folder for a folder with a README.md; None: the default one.

    By default `datasets` finds such a folder in its cache by name alone, even if the files have changed.
    """
    if not (folder / "README.md").is_file():
        return None
    files = sorted(Path(file) for file in files_in(folder))
    facts = [(str(file.resolve()), (at := file.stat()).st_size, at.st_mtime_ns) for file in files]
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
    return str(cache_folder(key))
