"""Where rows come from: the embedded corpus, files, folders, the Hub."""

import glob
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet

from sedtrain.data.audio import is_audio_file
from sedtrain.data.readers import METADATA, PROBLEM, as_array, read_folder, read_manifest, read_shards
from sedtrain.errors import UserError
from sedtrain.hub import go_offline_if_unreachable

INDEX_VERSION = 1  # to be counted up where rows are read differently from the same files


MANIFESTS = (".jsonl", ".json", ".csv", ".tsv")


BRACES = re.compile(r"\{(\w+)(\.\.|(?:,\w+)+)(\w*)\}")


SPLIT_LIKE = re.compile(r"(train|valid|validation|dev|eval|test)(?![a-z])", re.IGNORECASE)


BYTES_OF = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}


TABLES = (".parquet", *MANIFESTS)


TARS = (".tar", ".tar.gz", ".tgz")


SLICE = re.compile(r"([^\[+]+)(\[.*\])?")


def local_rows(path: str, split: str) -> datasets.Dataset | None:
    """The rows of a split at a local path, or None for what `datasets` has to read itself.

    split: may be cut, as in `train[:90%]`. A file, a pattern of tars and a folder without folders or files named after
        splits hold whatever split is asked for; in a pattern `{split}` stands for its name.
    Raises UserError where the split is missing or nothing is there to learn from.
    """
    named = SLICE.fullmatch(split)
    name, cut = (named[1], named[2]) if named else (split, None)
    rows = whole_split(path, name)
    if rows is None or not cut:
        return rows
    [part] = datasets.ReadInstruction.from_spec(f"rows{cut}").to_absolute({"rows": len(rows)})
    return rows.select(range(part.from_, part.to))


def whole_split(path: str, split: str) -> datasets.Dataset | None:
    where = Path(path).expanduser()
    if is_pattern(path):
        return rows_of_files(path, sorted(pattern_files(path, split)))
    if where.is_file():
        return table_rows(where)
    if not where.is_dir():
        return None
    if (where / "dataset_dict.json").is_file() or (where / "state.json").is_file():
        return saved_rows(where, split)
    if files := split_files(where, split):
        return rows_of_files(path, files)
    return folder_rows(where, split)


def split_files(folder: Path, split: str) -> list[Path]:
    """The file named after the split, else its tars, else its numbered tables."""
    whole = [file for each in TABLES if (file := folder / f"{split}{each}").is_file()]
    tars = sorted(folder.glob(f"{split}*.tar")) or sorted((folder / split).glob("*.tar"))
    numbered = (sorted(folder.glob(f"{split}-*{each}")) for each in TABLES)
    return whole[:1] or tars or next(filter(None, numbered), [])


def rows_of_files(path: str, files: list[Path]) -> datasets.Dataset:
    """Raises UserError where there are none."""
    if not files or files[0].name.endswith(TARS):
        return tar_rows(path, files)
    return joined([table_rows(file) for file in files])


def joined(tables: list[datasets.Dataset]) -> datasets.Dataset:
    """The rows of all; a column that holds numbers in one of them and text in another holds text."""
    kinds: dict[str, set[str]] = {}
    for table in tables:
        for name, feature in table.features.items():
            if isinstance(feature, datasets.Value) and feature.dtype != "null":
                kinds.setdefault(name, set()).add(feature.dtype)
    mixed = {name for name, found in kinds.items() if len(found) > 1 and "string" in found}
    return datasets.concatenate_datasets([with_text(table, mixed & set(table.column_names)) for table in tables])


def with_text(rows: datasets.Dataset, columns: set[str]) -> datasets.Dataset:
    text = dict.fromkeys(columns, datasets.Value("string"))
    return rows.cast(datasets.Features({**rows.features, **text})) if columns else rows


def table_rows(file: Path, cache: Path | None = None) -> datasets.Dataset:
    """The rows of a manifest or a Parquet file, none if it is empty. Raises UserError for another format.

    cache: where they are kept as Arrow, if not in the cache of `datasets`
    """
    if not file.stat().st_size:
        return datasets.Dataset.from_dict({})
    if file.suffix.lower() in MANIFESTS:
        return kept(read_manifest_file, [file], cache)
    if file.suffix.lower() != ".parquet" and not starts_like_parquet(file):
        raise UserError(
            f"data.path={file}: {file.suffix or 'a file without a suffix'} is no format that can be read",
            f"data.path=FILE, one of {', '.join(TABLES)}, .tar, or data.path=FOLDER",
        )
    if file.suffix.lower() == ".parquet" and is_empty(file):
        return datasets.Dataset.from_dict({})
    try:
        return datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=cache and str(cache))
    except datasets.exceptions.DatasetGenerationError:
        return kept(read_broken_parquet, [file], cache)


def starts_like_parquet(file: Path) -> bool:
    with file.open("rb") as content:
        return content.read(4) == b"PAR1"


def is_empty(file: Path) -> bool:
    """Whether a Parquet file holds no rows: `datasets` gives an error that says something else.

    Raises ArrowInvalid where its end is damaged.
    """
    try:
        return not pyarrow.parquet.read_metadata(file).num_rows
    except pa.ArrowInvalid:
        return False
    except OSError as error:
        raise pa.ArrowInvalid(str(error)) from error


def read_manifest_file(files: list[Path]) -> datasets.Dataset:
    return read_manifest(files[0])


def read_broken_parquet(files: list[Path]) -> datasets.Dataset:
    """The row groups of a Parquet file that can be read; the rows of the others are null, with a PROBLEM.

    Raises ArrowInvalid where the file is no Parquet at all.
    """
    with pyarrow.parquet.ParquetFile(files[0]) as file:
        tables = [row_group(file, number) for number in range(file.num_row_groups)]
    return datasets.Dataset(pa.concat_tables(tables, promote_options="default"))


def row_group(file: pyarrow.parquet.ParquetFile, number: int) -> pa.Table:
    try:
        return file.read_row_group(number)
    except (OSError, pa.ArrowInvalid) as error:
        text = f"broken Parquet: row group {number}, {' '.join(str(error).split())[:100]}"
        return pa.table({PROBLEM: [text] * file.metadata.row_group(number).num_rows})


def saved_rows(folder: Path, split: str) -> datasets.Dataset:
    """A split of what `Dataset.save_to_disk` wrote; a single Dataset is whatever split is asked for."""
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise missing_split(folder, split, list(saved))
    return saved[split]


def folder_rows(folder: Path, split: str) -> datasets.Dataset | None:
    """The audio of the folder that is named after the split, or of one that has no folders named after splits."""
    if (folder / split).is_dir():
        return read_folder(folder / split) if has_audio(folder / split) else None
    if not has_audio(folder):
        return None
    inside = sorted(each.stem if each.is_file() else each.name for each in folder.iterdir())
    if others := [each for each in inside if SPLIT_LIKE.match(each)]:
        raise missing_split(folder, split, others)
    return read_folder(folder)


def missing_split(folder: Path, split: str, others: list[str]) -> UserError:
    return UserError(
        f"data.path={folder}: there is no split {split!r}, there are {', '.join(others)}",
        "data.train_split, data.validation_split, data.test_split that are there, or cut one: 'train[:90%]', 'train[90%:]'",
    )


def has_audio(folder: Path) -> bool:
    """Whether a folder, searched through, has audio or metadata of audio; the first file found decides."""
    names = (name for _, _, names in os.walk(folder, followlinks=True) for name in names)
    return any(name in METADATA or is_audio_file(name) for name in names)


def is_pattern(path: str) -> bool:
    """Whether a path stands for several files, or for tars, which are looked for when they are read."""
    return path.endswith(TARS) or (path.endswith(TABLES) and any(each in path for each in "*?{"))


def pattern_files(pattern: str, split: str) -> Iterator[Path]:
    """The files of a name with globs, ranges `{000..127}`, lists `{a,b}` and `{split}`."""
    for name in expanded(str(Path(pattern.replace("{split}", split)).expanduser())):
        yield from map(Path, glob.glob(name, recursive=True) or ([name] if os.path.exists(name) else []))


def expanded(pattern: str) -> Iterator[str]:
    braces = BRACES.search(pattern)
    if not braces:
        yield pattern
        return
    first, between, last = braces.groups()
    if between == ".." and first.isdigit() and last.isdigit():
        values = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        values = braces[0][1:-1].split(",")
    for value in values:
        yield from expanded(pattern[: braces.start()] + value + pattern[braces.end() :])


def tar_rows(path: str, shards: list[Path], cache: Path | None = None) -> datasets.Dataset:
    if not shards:
        raise UserError(f"data.path={path}: there is no such file", "'data.path=\"SHARDS-{000..127}.tar\"', or a glob")
    return kept(read_shards, shards, cache)


def kept(
    read: Callable[[list[Path]], datasets.Dataset], files: list[Path], cache: Path | None = None
) -> datasets.Dataset:
    """`read(files)` from a cache, mapped into memory; read once, and again where a file has changed."""
    facts = [(os.path.abspath(file), (at := file.stat()).st_size, at.st_mtime_ns) for file in files]
    key = hashlib.sha256(repr((INDEX_VERSION, read.__name__, facts)).encode()).hexdigest()[:32]
    folder = (cache or Path(datasets.config.HF_DATASETS_CACHE) / "sedtrain") / key
    if not folder.is_dir():
        rows = read(files)
        if not len(rows):
            return rows
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = tempfile.mkdtemp(dir=folder.parent)
        rows.save_to_disk(new)
        try:
            os.rename(new, folder)
        except OSError:  # another process was faster
            shutil.rmtree(new)
    return datasets.load_from_disk(str(folder))


def with_readable_text(rows: datasets.Dataset, columns: list[str]) -> datasets.Dataset:
    """`rows` where texts that are not UTF-8, which no access survives, are null, with a PROBLEM. Reads no audio."""
    for column in columns:
        stored = rows.features.arrow_schema.field(column).type
        cells = rows.with_format("arrow")[column][:]
        if stored not in BYTES_OF or is_valid(cells):
            continue
        texts = [text for chunk in cells.chunks for text in readable_cells(chunk)]
        problems = rows[PROBLEM][:] if PROBLEM in rows.column_names else [None] * len(rows)
        for index, (is_there, text) in enumerate(zip(cells.is_valid().to_pylist(), texts, strict=True)):
            if is_there and text is None:
                problems[index] = f"text that is not UTF-8: column {column}"
        rows = rows.remove_columns([each for each in (column, PROBLEM) if each in rows.column_names])
        rows = rows.add_column(column, as_array(texts)).add_column(PROBLEM, as_array(problems))
    return rows


def readable_cells(cells: pa.Array) -> list[Any]:
    """Cells as plain values; texts that are not UTF-8 are None."""
    if cells.type not in BYTES_OF:
        values: list[Any] = cells.to_pylist()
        return values
    return [decoded(content) for content in cells.view(BYTES_OF[cells.type]).to_pylist()]


def is_valid(cells: pa.ChunkedArray) -> bool:
    try:
        cells.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def decoded(content: bytes | None) -> str | None:
    try:
        return None if content is None else content.decode()
    except UnicodeDecodeError:
        return None


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
