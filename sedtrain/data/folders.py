"""Reads a folder of audio files as rows; texts are in a metadata file, in *.trans.txt, in .txt files or in Kaldi's files.

A folder of Kaldi or ESPnet has wav.scp and text, and may have segments, utt2spk, utt2lang and utt2dur. Each line is a
name and its value. Kaldi also runs commands to get audio; those are refused.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import datasets

from sedtrain.data.audio import is_audio_file, is_media_file, leaves_folder
from sedtrain.data.audio_paths import files_in
from sedtrain.data.parquet import ROWS_AT_ONCE
from sedtrain.data.readers import read_rows
from sedtrain.data.tables import (
    MAX_TEXT_BYTES,
    PROBLEM,
    Row,
    as_table,
    in_words,
    lines_of,
    problem,
    text_or_problem,
)
from sedtrain.errors import UserError

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
ARCHIVED = re.compile(r":\d+$")  # matches a path that ends with an offset in an archive
KALDI = {"text": "text", "speaker": "utt2spk", "language": "utt2lang", "seconds": "utt2dur"}
"""Kaldi's file for each column."""


def has_audio(folder: Path) -> bool:
    """True if a folder or a subfolder holds audio or a metadata file."""
    return any(os.path.basename(file) in METADATA or is_media_file(file) for file in files_in(folder))


def read_folder(folder: Path, above: Path | None = None) -> datasets.Dataset:
    """Rows for the audio of a folder and its subfolders: columns audio, text, id, or the columns of metadata files.

    above: a parent folder; its metadata file is used if the folder has none
    Raises UserError if there is no transcript.
    """
    files = sorted(files_in(folder))
    inside = [Path(file) for file in files if os.path.basename(file) in METADATA]
    metadata = [own] if (own := metadata_of(folder)) else inside
    if not metadata and above and (outside := metadata_of(above)):
        metadata = [outside]
    if metadata:
        return datasets.Dataset(as_table(row for file in metadata for row in metadata_rows(file, folder)))
    audio = [file for file in files if is_media_file(file)]
    stems = by_stem(audio)
    if listed := [file for file in files if file.lower().endswith(".trans.txt")]:
        return datasets.Dataset(as_table(row for file in listed for row in listed_rows(Path(file), stems)))
    texts = {os.path.splitext(file)[0]: file for file in files if file.lower().endswith(".txt")}
    if not texts.keys() & stems.keys():
        wrong = f"there is no transcript of its {len(audio)} audio files"
        write = "write metadata.csv or metadata.jsonl with file_name and text, a .txt beside each audio file, or *.trans.txt"
        raise UserError("data.path", str(folder), wrong, write)
    used = [*filter(is_audio_file, audio), *(file for stem, file in stems.items() if stem in texts)]
    return datasets.Dataset(as_table(beside_row(file, texts, folder) for file in dict.fromkeys(used)))


def by_stem(audio: Iterable[str]) -> dict[str, str]:
    """Files by name without suffix; of several with one name, a readable one."""
    return {os.path.splitext(file)[0]: file for file in sorted(audio, key=is_audio_file)}


def metadata_of(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def metadata_rows(path: Path, folder: Path) -> Iterator[Row]:
    """The rows of a metadata file for files in `folder`; file_name gives `audio`, and `id` if there is no such column."""
    rows = read_rows(path)
    if "file_name" not in rows.column_names:
        wrong = f"{path.name} has no column 'file_name', it has {in_words(rows.column_names)}"
        write = f"write a {path.name} with file_name, relative to its folder, and text"
        raise UserError("data.path", str(path.parent), wrong, write)
    start = "" if path.is_relative_to(folder) else os.path.join(os.path.abspath(folder), "")
    for row in (row for some in rows.with_format("arrow").iter(ROWS_AT_ONCE) for row in some.to_pylist()):
        name = row["file_name"]
        audio = name and path_below(path.parent, str(name))
        if not audio or audio.startswith(start):
            yield {"id": name, **row, "audio": audio}


def path_below(folder: Path, name: str) -> str:
    """The path of a file in the folder. A name that leaves the folder is returned as it is; reading it is refused."""
    return name if leaves_folder(name) else os.path.abspath(folder / name)


def beside_row(audio: str, texts: Mapping[str, str], folder: Path) -> Row:
    """The row of an audio file. texts: text files by name without suffix"""
    stem = os.path.splitext(audio)[0]
    row: Row = {"audio": os.path.abspath(audio), "text": None, "id": os.path.relpath(stem, folder)}
    if stem not in texts:
        return row | problem("no transcript", f"{os.path.basename(stem)}.txt")
    file = Path(texts[stem])
    if not file.is_file():
        return row | problem("missing file", f"{file.name} is no file")
    found = text_or_problem(None if file.stat().st_size > MAX_TEXT_BYTES else file.read_bytes(), file.name)
    return row | (found if PROBLEM in found else {"text": found["text"].strip()})


def listed_rows(path: Path, audio: Mapping[str, str]) -> Iterator[Row]:
    """Yields a row for every line `ID TEXT` of a .trans.txt; the audio file ID is in the same folder.

    audio: audio files by path without suffix
    """
    with path.open("rb") as file:
        lines = [part for line in lines_of(file) for part in ([None] if line is None else line.splitlines())]
    for number, line in enumerate(lines, start=1):
        row = text_or_problem(line, f"{path.name}, line {number}")
        id, _, text = row.get("text", "").partition(" ")
        if PROBLEM in row:
            yield row
        elif id:
            found = audio.get(str(path.parent / id))
            row = {"audio": found and os.path.abspath(found), "text": text.strip(), "id": id}
            yield row if found else row | problem("missing file", f"the audio of {id}")


# --- Kaldi


def kaldi_rows(folder: Path) -> Iterator[Row]:
    broken: list[Row] = []
    lines = {name: keyed_lines(folder / name, broken) for name in ("wav.scp", "segments", *KALDI.values())}
    recordings = lines["wav.scp"]
    refuse_commands(folder, recordings)
    has_segments = (folder / "segments").is_file()
    for id in lines["segments" if has_segments else "wav.scp"]:
        row: Row = {"id": id, **{column: lines[name].get(id, (0, None))[1] for column, name in KALDI.items()}}
        row |= segment(id, *lines["segments"][id]) if has_segments else {"recording": id}
        yield whole_row(row, recordings) if PROBLEM not in row else row
    for id, (number, _) in lines["text"].items():
        if id not in lines["segments" if has_segments else "wav.scp"]:
            missing = "segment" if has_segments else "recording"
            yield {"id": id} | problem(f"no {missing}", f"text, line {number}, {id}")
    yield from broken


def keyed_lines(file: Path, broken: list[Row]) -> dict[str, tuple[int, str]]:
    """Number and rest of each line `KEY REST`, by key. Appends a row to `broken` for each unreadable line."""
    found: dict[str, tuple[int, str]] = {}
    if not file.is_file():
        return found
    with file.open("rb") as content:
        for number, line in enumerate(lines_of(content), start=1):
            position = f"{file.name}, line {number}"
            row = text_or_problem(line, position)
            key, *rest = re.split(r"[ \t]+", row.get("text", "").strip(" \t\r\n"), maxsplit=1)
            if PROBLEM in row:
                broken.append(row)
            elif key in found:
                broken.append(problem("two lines of one name", f"{position}, {key} as in line {found[key][0]}"))
            elif key:
                found[key] = (number, rest[0] if rest else "")
    return found


def refuse_commands(folder: Path, recordings: Mapping[str, tuple[int, str]]) -> None:
    """Raises UserError for archives in wav.scp, and for commands: a dataset must not run programs."""
    for number, path in recordings.values():
        if path.endswith("|") or path.startswith("|") or path == "-":
            wrong = f"wav.scp, line {number} is a command ({path[:80]}), which is never run"
        elif ARCHIVED.search(path):
            wrong = f"wav.scp, line {number} is an offset in an archive ({path[:80]})"
        else:
            continue
        write = "write wav.scp with the paths of audio files, converted once by you"
        raise UserError("data.path", str(folder), wrong, write)


def segment(id: str, number: int, rest: str) -> Row:
    """Recording, start and end of a line `UTTERANCE RECORDING START END`; END -1 is the end of the recording."""
    position, fields = f"segments, line {number}, {id}", rest.split()
    try:
        recording, start, end = fields[0], *map(float, fields[1:3])
        if not 0 <= start < (end if end != -1 else start + 1):
            return problem("no such segment", f"{position}: {fields[1]} to {fields[2]} s")
    except (IndexError, ValueError):
        return problem("broken line", f"{position}: it is not UTTERANCE RECORDING START END")
    return {"recording": recording, "start": start, "end": None if end == -1 else end}


def whole_row(row: Row, recordings: Mapping[str, tuple[int, str]]) -> Row:
    """The row with the file of its recording, or with the problem that the file or the text is missing."""
    recording = row.pop("recording")
    number, file = recordings.get(recording, (0, ""))
    if not file:
        wrong = f"wav.scp, line {number} names no file" if number else f"wav.scp has no recording {recording}"
        return row | problem("no recording", wrong)
    if row["text"] is None:
        return row | problem("no transcript", f"text has no line for {row['id']}")
    return row | {"audio": file}
