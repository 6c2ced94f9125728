"""A folder of audio files with their transcripts, and tar shards of WebDataset, become rows.

Transcripts of a folder stand in a metadata.csv, .jsonl or .parquet with a column file_name (Hugging Face's
AudioFolder), in LibriSpeech's *.trans.txt, or in a .txt beside each audio file.
"""

import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import datasets

from sedtrain.batch import UserError
from sedtrain.data.clips import is_audio_file, leaves_folder
from sedtrain.data.manifests import Row, as_dataset, json_row, problem, read_manifest

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")  # WebDataset's: up to the first dot of the base name


def read_folder(folder: Path) -> datasets.Dataset:
    """The audio files of a folder, searched through, with their texts: columns audio, text, id, or those of a metadata file.

    Raises UserError where there is no audio or no transcript.
    """
    for name in METADATA:
        if (folder / name).is_file():
            return metadata_rows(folder / name)
    files = sorted(os.path.join(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names)
    audio = [file for file in files if is_audio_file(file)]
    if not audio:
        raise UserError(
            f"data.path={folder}: there is no audio in this folder",
            "data.path=FOLDER with .wav, .flac, .mp3, .ogg or .opus files",
        )
    listed = [file for file in files if file.endswith(".trans.txt")]
    beside = {file for file in files if file.endswith(".txt")}
    if listed:
        known = set(audio)
        return as_dataset(row for file in listed for row in listed_rows(Path(file), known))
    if not any(transcript_of(file) in beside for file in audio):
        raise UserError(
            f"data.path={folder}: there is no transcript of its {len(audio)} audio files",
            "metadata.csv or metadata.jsonl with file_name and text, a .txt beside each audio file, or *.trans.txt",
        )
    return as_dataset(beside_row(file, transcript_of(file) in beside, folder) for file in audio)


def metadata_rows(path: Path) -> datasets.Dataset:
    """The rows of a metadata file, with `audio` from its file_name, and that as `id` if it has none."""
    rows = datasets.Dataset.from_parquet(str(path)) if path.suffix == ".parquet" else read_manifest(path)
    if "file_name" not in rows.column_names:
        raise UserError(
            f"data.path={path.parent}: {path.name} has no column 'file_name', it has {', '.join(rows.column_names)}",
            f"a {path.name} with file_name, relative to its folder, and text",
        )
    names = rows["file_name"][:]
    if "audio" in rows.column_names:
        rows = rows.remove_columns("audio")
    if "id" not in rows.column_names:
        rows = rows.add_column("id", names)
    return rows.add_column("audio", [inside(path.parent, name) for name in names])


def inside(folder: Path, name: object) -> str | None:
    """Where a file of the folder is; a name that leaves it stays as it is, and is refused when it is to be read."""
    if name is None or leaves_folder(str(name)):
        return None if name is None else str(name)
    return os.path.abspath(folder / str(name))


def transcript_of(audio: str) -> str:
    return os.path.splitext(audio)[0] + ".txt"


def beside_row(audio: str, has_transcript: bool, folder: Path) -> Row:
    name = os.path.relpath(audio, folder)
    row: Row = {"audio": os.path.abspath(audio), "text": None, "id": os.path.splitext(name)[0]}
    if not has_transcript:
        return row | problem("no transcript", os.path.basename(transcript_of(audio)))
    try:
        return row | {"text": Path(transcript_of(audio)).read_bytes().decode("utf-8-sig").strip()}
    except UnicodeDecodeError:
        return row | problem("text that is not UTF-8", os.path.basename(transcript_of(audio)))


def listed_rows(path: Path, audio: set[str]) -> Iterator[Row]:
    """A row for every line `ID TEXT` of a .trans.txt; the audio is the file of that name in the same folder."""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            id, _, text = line.decode("utf-8-sig").partition(" ")
        except UnicodeDecodeError:
            yield problem("text that is not UTF-8", f"{path.name}, line {number}")
            continue
        if id:
            names = (str(path.parent / f"{id}.{suffix}") for suffix in ("flac", "wav", "opus", "mp3", "ogg"))
            found = next((name for name in names if name in audio), None)
            row: Row = {"audio": found and os.path.abspath(found), "text": text.strip(), "id": id}
            yield row if found else row | problem("missing file", f"the audio of {id}")


def read_shards(shards: Iterable[Path]) -> datasets.Dataset:
    """The samples of tar files: columns audio (where in which file), text (of .txt), id, and the fields of a .json."""
    with ThreadPoolExecutor() as pool:
        return as_dataset(row for rows in pool.map(shard_rows, shards) for row in rows)


def shard_rows(shard: Path) -> list[Row]:
    """The samples of one tar; its members are never unpacked, only where they begin is noted.

    Raises UserError for what is no plain tar.
    """
    samples: dict[str, Row] = {}
    place = os.path.abspath(shard)
    try:
        with tarfile.open(shard, "r:") as tar:
            try:
                for member in tar:
                    if member.isreg() and (match := KEY.fullmatch(member.name)):
                        content = tar.extractfile(member)
                        assert content is not None
                        row = samples.setdefault(match[1], {"id": f"{shard.stem}/{match[1]}", "audio": None})
                        row.update(member_of_sample(member, match[2].lower(), content, place))
            except (tarfile.ReadError, OSError) as error:
                samples[""] = problem("truncated tar", f"{shard.name}, {error}")
    except tarfile.ReadError as error:
        raise UserError(
            f"data.path: {shard} is no plain tar ({error})", "data.path=SHARDS.tar, unpacked if they are .tar.gz"
        ) from error
    return [refused(key, row) if key.startswith("/") or leaves_folder(key) else row for key, row in samples.items()]


def refused(key: str, row: Row) -> Row:
    return {"id": row["id"], "audio": None} | problem("path outside the dataset's folder", key)


def member_of_sample(member: tarfile.TarInfo, suffix: str, content: IO[bytes], place: str) -> Row:
    """What one member adds to its sample."""
    if is_audio_file(member.name):
        return {"audio": {"path": place, "offset": member.offset_data, "size": member.size}}
    if suffix == "txt":
        try:
            return {"text": content.read().decode("utf-8-sig").strip()}
        except UnicodeDecodeError:
            return problem("text that is not UTF-8", member.name)
    if suffix == "json":
        fields = json_row(content.read(), member.name)
        return {name: value for name, value in fields.items() if name not in ("audio", "id")}
    return {}
