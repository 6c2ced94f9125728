"""The files that a split is stored in, here or on a server, and copies of those on a server."""

import os
import time
from pathlib import Path
from urllib.parse import urlsplit

import datasets
import fsspec
from aiohttp import ClientError

from sedtrain.data.paths import expanded, files_of, local_path
from sedtrain.data.readers import READERS, one_line, suffix_of
from sedtrain.data.source import Source
from sedtrain.data.sources import hub_or_folder, is_saved, readable
from sedtrain.errors import UserError

NUM_ATTEMPTS = 5
FIRST_PAUSE = 1.0  # seconds, doubled after every failure
UNREACHABLE = (OSError, ClientError, TimeoutError)


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


def files_at(url: str) -> list[str]:
    """The URL, or those that a glob stands for. Raises UserError where none is found, or the URL names no file to read."""
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
    """The name of each file without its suffix; with its folders if names alone are not distinct."""
    names = list(map(file_name, places))
    if len(set(map(without_format, names))) < len(names):
        common = os.path.commonpath([os.path.dirname(place) for place in places])
        names = [os.path.relpath(place, common) for place in places]
    return list(map(without_format, names))


def file_name(place: str) -> str:
    """The name of a file by its path or URL."""
    return Path(urlsplit(place).path if "://" in place else place).name


def without_format(name: str) -> str:
    return name[: len(name) - len(suffix_of(name) or "")]


def fetch(url: str, file: Path) -> None:
    """Raises UserError when the last attempt fails; nothing incomplete is left under the name of `file`."""
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
