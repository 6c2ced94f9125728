"""JSON lines and comma or tab separated values become rows, whatever is wrong with some of the lines.

A line that cannot be read is a row of which only PROBLEM is known, so that it is counted and listed like all others.
"""

import csv
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa

from sedtrain.data.audio import is_audio_file, leaves_folder
from sedtrain.errors import UserError

PROBLEM = "_problem"
"""The column that says why a row cannot be used: `reason` or `reason: detail`."""


NOT_TEXT = "\0object\0"
"""What a list or an object begins with that stands among texts."""


Row = dict[str, Any]


NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")  # 007 is text


NEMO_AUDIO = "audio_filepath"


NEMO_OPTIONAL = ("duration", "offset")


def as_dataset(rows: Iterable[Row]) -> datasets.Dataset:
    """Rows by columns; a column of things that no one type can hold becomes text."""
    columns: dict[str, list[Any]] = {}
    number = 0
    for row in rows:
        for name, value in row.items():
            column = columns.setdefault(name, [])
            column.extend([None] * (number - len(column)))
            column.append(value)
        number += 1
    arrays = {name: as_array(column + [None] * (number - len(column))) for name, column in columns.items()}
    return datasets.Dataset(pa.table(arrays))


def as_array(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, UnicodeError):
        return pa.array([None if value is None or value != value else as_words(value) for value in values])


def as_words(value: Any) -> str:
    words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, dict)):
        words = NOT_TEXT + words
    return words.encode("utf-8", "replace").decode("utf-8")  # JSON can spell halves of characters: \ud800


def read_manifest(path: Path) -> datasets.Dataset:
    """The rows of a manifest; by its suffix JSON lines (or one JSON list of objects), tab or comma separated values."""
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return as_dataset(with_numbers(list(csv_rows(path, "\t" if suffix == ".tsv" else ","))))
    rows = as_dataset(json_rows(path))
    if NEMO_AUDIO in rows.column_names:  # NeMo leaves out a duration that is not known and an offset of 0
        for name in NEMO_OPTIONAL:
            if name not in rows.column_names:
                rows = rows.add_column(name, pa.nulls(len(rows), pa.float64()))
    return rows


def json_rows(path: Path) -> Iterator[Row]:
    content = path.read_bytes() if path.suffix.lower() == ".json" else b""
    if content.lstrip().startswith(b"["):
        values = json.loads(content)
        yield from (each if isinstance(each, dict) else problem("broken JSON", "no object") for each in values)
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield json_row(line, f"line {number}")


def json_row(content: bytes, place: str) -> Row:
    try:
        row = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return problem("text that is not UTF-8", place)
    except (ValueError, RecursionError) as error:
        return problem("broken JSON", f"{place}, {str(error).partition(':')[0]}")
    return row if isinstance(row, dict) else problem("broken JSON", f"{place} is no object")


def csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    """Cells as text, empty ones None; tab separated values know no quotes, as in Common Voice."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if delimiter == "\t":
            lines = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        else:
            lines = csv.reader(file, delimiter=delimiter)
        header = next(lines, [])
        for cells in lines:
            place = f"line {lines.line_num}"
            if any("\udc80" <= character <= "\udcff" for cell in cells for character in cell):
                yield problem("text that is not UTF-8", place)
            elif cells and len(cells) != len(header):
                yield problem("broken CSV", f"{place} has {len(cells)} cells, the header {len(header)}")
            elif cells:
                yield {name: cell or None for name, cell in zip(header, cells, strict=True)}


def with_numbers(rows: list[Row]) -> list[Row]:
    """Columns that hold nothing but numbers as numbers."""
    names = {name for row in rows for name in row}
    for name in names - {PROBLEM}:
        cells = [row[name] for row in rows if row.get(name) is not None]
        if cells and all(NUMBER.fullmatch(cell) for cell in cells):
            as_number = int if all(cell.lstrip("-").isdigit() and len(cell) < 19 for cell in cells) else float
            for row in rows:
                if row.get(name) is not None:
                    row[name] = as_number(row[name])
    return rows


def problem(reason: str, detail: str) -> Row:
    return {PROBLEM: f"{reason}: {detail}"}


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
