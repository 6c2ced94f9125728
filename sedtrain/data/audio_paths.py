"""Finds audio files in a folder, by the option `audio=`, or on standard input. Needs neither `datasets` nor Arrow."""

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

from sedtrain.data.audio import fault_of, is_audio_file, is_media_file, opened
from sedtrain.data.headers import RefusedAudio
from sedtrain.errors import UserError

STANDARD_INPUT = "-"
MOST_BYTES = 1 << 32  # of standard input; a WAV file holds no more either
AT_ONCE = 1 << 20


def audio_paths(audio: str | Sequence[str] | None) -> list[str]:
    """The files that `audio` names, without repeats. A name is a file, a glob, a folder (with subfolders) or `-`.

    `-` is standard input. Raises UserError for a name that matches no file, and for a single file that is no audio.
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
        except RefusedAudio as error:
            raise UserError("audio", found[0], fault_of(error), "write audio=FILE that libsndfile can read") from error
    return found


def matching_files(where: Path) -> list[str]:
    """The audio files of a folder, the file itself, or the files that a glob matches, sorted."""
    if where.is_dir():
        found = list(filter(is_media_file, files_in(where)))
    else:
        found = [str(where)] if where.exists() else glob.glob(str(where), recursive=True)
    return sorted(filter(os.path.isfile, found))


@contextmanager
def stored(path: str) -> Iterator[str]:
    """The path of a recording. Standard input is copied to a temporary file first. Raises UserError if it is too long."""
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


def files_in(folder: Path) -> Iterator[str]:
    """Yields every file in a folder and its subfolders. Follows links, except to a folder that contains the link."""
    for root, folders, names in os.walk(folder, followlinks=True):
        outside = Path(root).parent.resolve()
        if root != str(folder) and outside.is_relative_to(Path(root).resolve()):
            folders.clear()
        else:
            yield from (os.path.join(root, name) for name in names)


def audio_files(option: str, folder: str, write: str) -> list[str]:
    """The audio files of a folder and its subfolders, sorted, so that the order is the same on every machine.

    option, write: the option that names the folder, and the advice of the message for a folder without audio
    Raises UserError if there is no audio file, or if one cannot be read.
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
                    raise RefusedAudio("no samples", "it has no samples")
        except RefusedAudio as error:
            write = "write a folder whose audio files can all be read"
            raise UserError(option, folder, f"{file} cannot be read ({error})", write) from error
    return files
