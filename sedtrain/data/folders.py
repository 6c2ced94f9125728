"""A folder of audio files as rows: their texts stand in a metadata file, in *.trans.txt, or in a .txt beside each."""

import os
from collections.abc import Iterator
from pathlib import Path

import datasets

from sedtrain.data.audio import is_audio_file, leaves_folder
from sedtrain.data.paths import files_in
from sedtrain.data.readers import read_rows
from sedtrain.data.tables import MAX_TEXT_BYTES, Row, as_dataset, decoded, lines_of, problem
from sedtrain.errors import UserError

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def has_audio(folder: Path) -> bool:
    """True if a folder, searched through, has audio or metadata of audio."""
    return any(os.path.basename(file) in METADATA or is_audio_file(file) for file in files_in(folder))


def read_folder(folder: Path) -> datasets.Dataset:
    """The audio files of a folder, searched through, with their texts: columns audio, text, id, or those of a metadata file.

    Raises UserError where there is no audio or no transcript.
    """
    for name in METADATA:
        if (folder / name).is_file():
            return metadata_rows(folder / name)
    files = sorted(files_in(folder))
    audio = [file for file in files if is_audio_file(file)]
    if not audio:
        write = "write data.path=FOLDER with .wav, .flac, .mp3, .ogg or .opus files"
        raise UserError("data.path", str(folder), "there is no audio in this folder", write)
    if listed := [file for file in files if file.endswith(".trans.txt")]:
        known = set(audio)
        return as_dataset(row for file in listed for row in listed_rows(Path(file), known))
    beside = {file for file in files if file.endswith(".txt")}
    if not any(transcript_of(file) in beside for file in audio):
        wrong = f"there is no transcript of its {len(audio)} audio files"
        write = "write metadata.csv or metadata.jsonl with file_name and text, a .txt beside each audio file, or *.trans.txt"
        raise UserError("data.path", str(folder), wrong, write)
    return as_dataset(beside_row(file, transcript_of(file) in beside, folder) for file in audio)


def metadata_rows(path: Path) -> datasets.Dataset:
    """The rows of a metadata file, with `audio` from its file_name, and that as `id` if it has none."""
    rows = read_rows(path)
    if "file_name" not in rows.column_names:
        wrong = f"{path.name} has no column 'file_name', it has {', '.join(rows.column_names)}"
        write = f"write a {path.name} with file_name, relative to its folder, and text"
        raise UserError("data.path", str(path.parent), wrong, write)
    names = rows["file_name"][:]
    if "audio" in rows.column_names:
        rows = rows.remove_columns("audio")
    if "id" not in rows.column_names:
        rows = rows.add_column("id", names)
    return rows.add_column("audio", [name and path_below(path.parent, str(name)) for name in names])


def path_below(folder: Path, name: str) -> str:
    """The path of a file of the folder; a name that leaves it stays as it is, to be refused when it is read."""
    return name if leaves_folder(name) else os.path.abspath(folder / name)


def transcript_of(audio: str) -> str:
    return os.path.splitext(audio)[0] + ".txt"


def beside_row(audio: str, has_transcript: bool, folder: Path) -> Row:
    file = Path(transcript_of(audio))
    row: Row = {
        "audio": os.path.abspath(audio),
        "text": None,
        "id": os.path.splitext(os.path.relpath(audio, folder))[0],
    }
    if not has_transcript:
        return row | problem("no transcript", file.name)
    if file.stat().st_size > MAX_TEXT_BYTES:
        return row | problem("text too large", file.name)
    text = decoded(file.read_bytes())
    return row | (problem("text that is not UTF-8", file.name) if text is None else {"text": text.strip()})


def listed_rows(path: Path, audio: set[str]) -> Iterator[Row]:
    """A row for every line `ID TEXT` of a .trans.txt; the audio is the file of that name in the same folder."""
    with path.open("rb") as file:
        lines = [line for each in lines_of(file) for line in ([None] if each is None else each.splitlines())]
    for number, line in enumerate(lines, start=1):
        if line is None:
            yield problem("text too large", f"{path.name}, line {number}")
            continue
        if (words := decoded(line)) is None:
            yield problem("text that is not UTF-8", f"{path.name}, line {number}")
            continue
        id, _, text = words.partition(" ")
        if id:
            names = (str(path.parent / f"{id}.{suffix}") for suffix in ("flac", "wav", "opus", "mp3", "ogg"))
            found = next((name for name in names if name in audio), None)
            row: Row = {"audio": found and os.path.abspath(found), "text": text.strip(), "id": id}
            yield row if found else row | problem("missing file", f"the audio of {id}")
