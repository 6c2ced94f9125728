"""Finds the files that a path, a pattern, a folder or a URL stands for, and fetches remote files."""

import glob
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
from aiohttp import ClientError

from sedtrain.data.readers import READERS, one_line, suffix_of
from sedtrain.errors import UserError

EMBEDDED = Path(__file__).parent / "spoken_digits"
BRACES = re.compile(r"\{(\w+)(\.\.|(?:,\w+)+)(\w*)\}")
NUM_ATTEMPTS = 5  # to fetch a file
FIRST_PAUSE = 1.0  # seconds, doubled after every failure
UNREACHABLE = (OSError, ClientError, TimeoutError)


def local_path(path: str) -> Path:
    return EMBEDDED if path == "spoken_digits" else Path(path).expanduser()


def is_here(path: str) -> bool:
    """True for an existing file or folder, and for a pattern; its files are searched later, when they are read."""
    return local_path(path).exists() or is_pattern(path)


def is_pattern(path: str) -> bool:
    """True for a path with globs, ranges `{000..127}`, lists `{a,b}` or `{split}`."""
    return any(character in path for character in "*?[{") and not local_path(path).exists()


def absolute_path(path: str) -> str:
    """`path` made absolute, so that it holds in any working folder; a Hub id or a URL stays as it is."""
    where = local_path(path)
    is_found_anywhere = where == EMBEDDED or "://" in path or not is_here(path)
    return path if is_found_anywhere else os.path.abspath(where)


def public_name(path: str) -> str:
    """`path` for readers elsewhere: only the name of a local file or folder."""
    return local_path(path).name if is_here(path) and "://" not in path else path


def files_of(path: str, split: str) -> list[Path]:
    """The files of a split: the file itself, the matches of a pattern, or the files of a folder named after the split.

    Raises UserError for a pattern that matches nothing.
    """
    where = local_path(path)
    if is_pattern(path):
        names = expanded(str(Path(path.replace("{split}", split)).expanduser()))
        files = (file for name in names for file in glob.glob(name, recursive=True) or [name])
        if found := sorted(map(Path, filter(os.path.isfile, files))):
            return found
        write = "write 'data.path=\"SHARDS-{000..127}.tar\"', or a glob, of files that are there"
        raise UserError("data.path", path, "there is no such file", write)
    return [where] if where.is_file() else split_files(where, split)


def split_files(folder: Path, split: str) -> list[Path]:
    """The file in the folder named after the split, else the split's tars, else its numbered files."""
    patterns = [f"{split}{suffix}" for suffix in READERS]
    patterns += [f"{split}*.tar", f"{split}/*.tar", *(f"{split}-*{suffix}" for suffix in READERS)]
    if Path(split).is_absolute():  # a path is no name of a split, and glob refuses it
        return []
    return next(filter(None, (sorted(folder.glob(pattern)) for pattern in patterns)), [])


def missing_split(folder: Path, split: str, others: list[str]) -> UserError:
    wrong = f"there is no split {split!r}, there are {', '.join(others)}"
    options, slices = "data.train_split, data.validation_split, data.test_split", "'train[:90%]', 'train[90%:]'"
    return UserError("data.path", str(folder), wrong, f"write {options} that are there, or slices of one: {slices}")


def expanded(pattern: str) -> Iterator[str]:
    """The names that a pattern with `{000..127}` and `{a,b}` stands for, in order."""
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


# --- on a server


def files_at(url: str) -> list[str]:
    """The URL, or the URLs that match its glob. Raises UserError if none matches, and for an unknown format."""
    if suffix_of(file_name(url)) is None:
        wrong = "this URL names no file of a format that can be read"
        raise UserError("data.path", url, wrong, f"write a URL of files of one of {', '.join(READERS)}")
    if not {"*", "["} & set(url):
        return [url]
    try:
        filesystem, pattern = fsspec.url_to_fs(url)
        found = sorted(map(filesystem.unstrip_protocol, filesystem.glob(pattern)))
    except UNREACHABLE as error:
        raise unreachable(url, error) from error
    if not found:
        write = "write a glob of files that are there and that the server lists, or {0000..0127} for their numbers"
        raise UserError("data.path", url, "there is no such file", write)
    return found


def names_of(places: list[str]) -> list[str]:
    """The name of each file without suffix; includes folders if the bare names are not distinct."""
    names = list(map(file_name, places))
    if len(set(map(without_format, names))) < len(names):
        common = os.path.commonpath([os.path.dirname(place) for place in places])
        names = [os.path.relpath(place, common) for place in places]
    return list(map(without_format, names))


def file_name(place: str) -> str:
    """The last component of a path or URL, without the query."""
    return Path(urlsplit(place).path if "://" in place else place).name


def without_format(name: str) -> str:
    return name[: len(name) - len(suffix_of(name) or "")]


def fetch(url: str, file: Path) -> None:
    """Downloads `url` to `file`, which never holds an incomplete copy. Raises UserError if the last attempt fails."""
    incomplete = file.with_name(f"{file.name}.incomplete")
    for attempt in range(NUM_ATTEMPTS):
        try:
            filesystem, name = fsspec.url_to_fs(url)
            filesystem.get_file(name, str(incomplete))
            incomplete.rename(file)
            return
        except UNREACHABLE as error:
            if attempt == NUM_ATTEMPTS - 1 or isinstance(error, FileNotFoundError):
                raise unreachable(url, error) from error
        time.sleep(FIRST_PAUSE * 2**attempt)


def unreachable(url: str, error: Exception) -> UserError:
    wrong = f"{url} cannot be fetched ({one_line(error)})"
    return UserError("data.path", url, wrong, "write a URL that can be reached")
