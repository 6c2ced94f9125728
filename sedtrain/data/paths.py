"""The files that a path, a pattern or a folder stands for."""

import glob
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

from sedtrain.data.audio import UNREADABLE, is_media_file, opened
from sedtrain.data.readers import READERS
from sedtrain.errors import UserError

EMBEDDED = Path(__file__).parent / "spoken_digits"
STANDARD_INPUT = "-"
MOST_BYTES = 1 << 32  # of standard input, as of a WAV file
AT_ONCE = 1 << 20
BRACES = re.compile(r"\{(\w+)(\.\.|(?:,\w+)+)(\w*)\}")


def local_path(path: str) -> Path:
    return EMBEDDED if path == "spoken_digits" else Path(path).expanduser()


def is_here(path: str) -> bool:
    """True for a file, a folder, and a pattern, whose files are looked for when they are read."""
    return local_path(path).exists() or is_pattern(path)


def is_pattern(path: str) -> bool:
    """True for a path that stands for files by globs, ranges `{000..127}`, lists `{a,b}` or `{split}`."""
    return any(character in path for character in "*?[{") and not local_path(path).exists()


def absolute_path(path: str) -> str:
    """`path` as it is found from any folder; a Hub id or a URL stays as it is."""
    where = local_path(path)
    is_found_anywhere = where == EMBEDDED or "://" in path or not is_here(path)
    return path if is_found_anywhere else os.path.abspath(where)


def public_name(path: str) -> str:
    """`path` for readers elsewhere: the name alone of a file or folder."""
    return local_path(path).name if is_here(path) and "://" not in path else path


def files_of(path: str, split: str) -> list[Path]:
    """The files that a split is stored in: the file or the pattern itself, or those of the folder that are named after it.

    Raises UserError for a pattern that matches nothing.
    """
    where = local_path(path)
    if is_pattern(path):
        if files := sorted(pattern_files(path, split)):
            return files
        write = "write 'data.path=\"SHARDS-{000..127}.tar\"', or a glob, of files that are there"
        raise UserError("data.path", path, "there is no such file", write)
    return [where] if where.is_file() else split_files(where, split)


def split_files(folder: Path, split: str) -> list[Path]:
    """The file of a folder that is named after the split, else its tars, else its numbered files."""
    patterns = [f"{split}{suffix}" for suffix in READERS]
    patterns += [f"{split}*.tar", f"{split}/*.tar", *(f"{split}-*{suffix}" for suffix in READERS)]
    if Path(split).is_absolute():  # no name
        return []
    return next(filter(None, (sorted(folder.glob(pattern)) for pattern in patterns)), [])


def pattern_files(pattern: str, split: str) -> Iterator[Path]:
    for name in expanded(str(Path(pattern.replace("{split}", split)).expanduser())):
        found = glob.glob(name, recursive=True) or [name]
        yield from (Path(file) for file in found if os.path.isfile(file))


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


def files_in(folder: Path) -> Iterator[str]:
    """Every file in a folder and in those below it. Follows links, but none to a folder around itself."""
    for root, folders, names in os.walk(folder, followlinks=True):
        outside = Path(root).parent.resolve()
        if root != str(folder) and outside.is_relative_to(Path(root).resolve()):
            folders.clear()
        else:
            yield from (os.path.join(root, name) for name in names)


def audio_paths(audio: str | Sequence[str] | None) -> list[str]:
    """The files that `audio` names, each once: files, globs, folders (searched through), and `-`, standard input.

    Raises UserError for a name that stands for no file, and for a single file that is no audio.
    """
    if not audio:
        write = "write audio=FILE, audio='FOLDER/*.wav' or 'audio=[a.wav,b.flac]'"
        raise UserError("audio", audio, "task=transcribe needs audio", write)
    found: list[str] = []
    for name in [audio] if isinstance(audio, str) else audio:
        where = Path(name).expanduser()
        files = [name] if name == STANDARD_INPUT else matching_files(where)
        if not files:
            wrong = "this is a pipe or a device" if where.exists() else "there is no such audio file"
            if where.is_dir():
                wrong = "this folder holds no audio"
            raise UserError("audio", name, wrong, "write audio=FILE, a glob that matches or a folder")
        found += files
    found = list(dict.fromkeys(found))
    if len(found) == 1 and found != [STANDARD_INPUT]:
        try:
            with opened(found[0]):
                pass
        except UNREADABLE as error:
            wrong = f"this is no audio that can be read ({error})"
            raise UserError("audio", found[0], wrong, "write audio=FILE that libsndfile can read") from error
    return found


def matching_files(where: Path) -> list[str]:
    """The audio in a folder, else the file, else the files that a glob matches."""
    if where.is_dir():
        found = list(filter(is_media_file, files_in(where)))
    else:
        found = [str(where)] if where.exists() else glob.glob(str(where), recursive=True)
    return sorted(filter(os.path.isfile, found))


@contextmanager
def stored(path: str) -> Iterator[str]:
    """The file of a recording; of `-`, a temporary one with what standard input gives. Raises UserError for too much of it."""
    if path != STANDARD_INPUT:
        yield path
        return
    with NamedTemporaryFile(prefix="sedtrain-") as file:
        while block := sys.stdin.buffer.read(AT_ONCE):
            file.write(block)
            if file.tell() > MOST_BYTES:
                wrong = f"standard input gives more than {MOST_BYTES // 1_000_000_000} GB"
                raise UserError("audio", path, wrong, "write audio=FILE")
        file.flush()
        try:
            yield file.name
        except UserError as error:
            write = "pipe a whole file of audio, such as cat a.wav | sedtrain task=transcribe checkpoint=RUN audio=-"
            raise UserError(error.option, path, error.wrong.replace(file.name, path), write) from error
