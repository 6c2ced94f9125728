"""Reads folders and manifests of other toolkits as rows with the same columns for all of them.

An unusable line becomes a row with a PROBLEM that names its file and line.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa

from sedtrain.data.audio import is_media_file
from sedtrain.data.audio_paths import files_in
from sedtrain.data.folders import by_stem, kaldi_rows, listed_rows, path_below
from sedtrain.data.parquet import ROWS_AT_ONCE, refuse_unpacking
from sedtrain.data.paths import files_of, local_path, missing_split
from sedtrain.data.readers import json_row, json_rows, reading
from sedtrain.data.separated import read_separated
from sedtrain.data.tables import PROBLEM, Row, as_table, lines_of, problem
from sedtrain.errors import UserError

COLUMNS = ("audio", "text", "translation", "id", "speaker", "language", "seconds", "start", "end")
TRANSLATED = ("covost",)
"""Formats with translations."""
SPELLINGS = {"validation": ("validation", "dev", "valid")}
COMMON_VOICE = {"text": "sentence", "speaker": "client_id", "language": "locale", "translation": "translation"}
NEMO = {
    "audio": ("audio_filepath",), "text": ("text", "answer"), "speaker": ("speaker",),
    "language": ("target_lang", "lang"), "seconds": ("duration",), "start": ("offset",),
}  # fmt: skip


def formatted_rows(format: str, path: Path, split: str, name: str | None) -> datasets.Dataset:
    """The rows of a split. Raises UserError if a file is missing or does not have the format."""
    return datasets.Dataset(as_table(FORMATS[format](path, split, name), COLUMNS))


def recognised(path: str | None) -> str | None:
    """The format of a folder if its files are unmistakable, else None."""
    folder = local_path(path or "")
    is_kaldi = path and folder.is_dir() and ((folder / "wav.scp").is_file() or any(folder.glob("*/wav.scp")))
    return "kaldi" if is_kaldi else None


def spellings(split: str) -> tuple[str, ...]:
    return SPELLINGS.get(split, (split,))


def split_file(folder: Path, patterns: Iterable[str], split: str) -> Path:
    """The file of a split. Raises UserError if there is none, or if there are several."""
    names = [name for name in spellings(split) if not Path(name).is_absolute()]
    found = [file for name in names for pattern in patterns for file in folder.glob(pattern.replace("SPLIT", name))]
    if not found:
        wrong = f"there is no file {' or '.join(patterns).replace('SPLIT', split)} in this folder"
        raise UserError("data.path", str(folder), wrong, "write data.path=FOLDER with it, or the name of another split")
    if len(found) > 1:
        wrong = f"there are several files for {split!r}: {', '.join(sorted(file.name for file in found))}"
        raise UserError("data.path", str(folder), wrong, "write data.name=DIRECTION, such as data.name=en_de")
    return found[0]


def split_folder(path: Path, split: str) -> Path:
    """The subfolder of a split if there is one, else `path`."""
    return next((path / name for name in spellings(split) if (path / name).is_dir()), path)


def named(row: Row, file: Path) -> Row:
    """The row with the name of its file added to its problem, before the line."""
    return row | {PROBLEM: row[PROBLEM].replace(": ", f": {file.name}, ", 1)}


# --- folders and tables


def rows_of_kaldi(path: Path, split: str, name: str | None) -> Iterator[Row]:
    """Reads Kaldi's files in the split's folder or in `path`. Raises UserError if wav.scp or text is missing."""
    folder = split_folder(path, split)
    for needed in ("wav.scp", "text"):
        if not (folder / needed).is_file():
            if folder == path and (inside := sorted(file.parent.name for file in path.glob("*/wav.scp"))):
                raise missing_split(path, split, inside)
            wrong = f"this is no folder of Kaldi: it has no file {needed!r}"
            raise UserError("data.path", str(folder), wrong, "write data.path=FOLDER with wav.scp and text")
    return kaldi_rows(folder)


def rows_of_librispeech(path: Path, split: str, name: str | None) -> Iterator[Row]:
    """Reads `*.trans.txt` below the split's folder or below `path`. The speaker of `19-198-0000` is `19`."""
    folder = split_folder(path, split)
    files = sorted(files_in(folder))
    audio = by_stem(filter(is_media_file, files))
    listed = [Path(file) for file in files if file.lower().endswith(".trans.txt")]
    others = [entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.isdigit()]
    if not listed or (folder == path and others):
        raise missing_split(path, split, sorted(others) or ["none with *.trans.txt"])
    rows = (row for file in listed for row in listed_rows(file, audio))
    return ({**row, "speaker": str(row.get("id", "")).partition("-")[0] or None} for row in rows)


def rows_of_common_voice(
    path: Path, split: str, name: str | None, patterns: Iterable[str] = ("SPLIT.tsv",)
) -> Iterator[Row]:
    """Reads the .tsv of a split; its audio is in the folder `clips` beside it, else in data.audio_folder."""
    file = split_file(path, [pattern.replace("NAME", name or "*") for pattern in patterns], split)
    table = tabs_of(file)
    if missing := {"path", "sentence"} - set(table.column_names):
        wrong = f"{file.name} has no column {sorted(missing)[0]!r}, it has {', '.join(table.column_names)}"
        raise UserError("data.path", str(path), wrong, "write data.path=FOLDER as Common Voice is unpacked")
    clips, seconds = path / "clips", clip_seconds(path)
    has_clips = clips.is_dir()
    for row in (row for some in table.to_batches(ROWS_AT_ONCE) for row in some.to_pylist()):
        clip = row["path"]
        if row.get(PROBLEM):
            yield named({PROBLEM: row[PROBLEM]}, file)
        else:
            audio = path_below(clips, clip) if clip and has_clips else clip
            said = {role: row.get(column) for role, column in COMMON_VOICE.items()}
            yield {"audio": audio, "id": clip and os.path.splitext(clip)[0], "seconds": seconds.get(clip), **said}


def tabs_of(file: Path) -> pa.Table:
    with reading(file):
        [table] = read_separated(file, "\t")
        return table


def clip_seconds(folder: Path) -> dict[str | None, float]:
    """The seconds of each clip by name, from clip_durations.tsv; older releases do not have this file."""
    file = folder / "clip_durations.tsv"
    if not file.is_file():
        return {}
    table = tabs_of(file)
    names = table.column_names
    found = zip(*(table[names[number]].to_pylist() for number in (0, 1)), strict=True) if len(names) > 1 else ()
    return {name: float(length) / 1000 for name, length in found if length and length.isdecimal()}


# --- JSON lines


def rows_of_nemo(path: Path, split: str, name: str | None) -> Iterator[Row]:
    for file in files_of(str(path), split) or [split_file(path, ["SPLIT*.json*"], split)]:
        with reading(file):
            for row in json_rows(file):
                yield named(row, file) if PROBLEM in row else nemo_row(row)


def nemo_row(row: Row) -> Row:
    return {role: next((row[key] for key in keys if row.get(key) is not None), None) for role, keys in NEMO.items()}


def rows_of_lhotse(path: Path, split: str, name: str | None) -> Iterator[Row]:
    """Reads cuts as JSON lines, also packed: a file, a pattern, or a folder with a file named `cuts` and the split."""
    patterns = ["*cuts*SPLIT.jsonl", "*cuts*SPLIT.jsonl.gz", "SPLIT.jsonl.gz"]
    for file in files_of(str(path), split) or [split_file(path, patterns, split)]:
        with reading(file), fsspec.open(file, compression="infer") as lines:
            if file.suffix == ".gz":
                refuse_unpacking(str(file), file.name)
            for number, line in enumerate(lines_of(lines), start=1):
                if line is None or line.strip():
                    cut = json_row(line, position := f"{file.name}, line {number}")
                    yield from [cut] if PROBLEM in cut else rows_of_cut(cut, position)


def rows_of_cut(cut: Row, position: str) -> Iterator[Row]:
    """Yields a row for each supervision of a cut, with its times in the recording; a wrong cut yields one problem."""
    try:
        yield from list(supervision_rows(cut, position))
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError):
        yield problem("broken cut", f"{position}: it has not the fields of a MonoCut with a recording and supervisions")


def supervision_rows(cut: Row, position: str) -> Iterator[Row]:
    supervisions = cut.get("supervisions") or []
    if reason := wrong_with(cut):
        yield {"id": cut.get("id")} | problem(*reason[:1], f"{position}: {reason[1]}")
        return
    if not supervisions:
        yield {"id": cut["id"]} | problem("no transcript", f"{position}: the cut has no supervision")
    for supervision in supervisions:
        start = round(cut["start"] + supervision["start"], 8)
        times = {"start": start, "end": round(start + supervision["duration"], 8)}
        id = cut["id"] if len(supervisions) == 1 else f"{cut['id']}-{supervision['id']}"
        said = {name: supervision.get(name) for name in ("text", "speaker", "language")}
        yield {"id": id, "audio": cut["recording"]["sources"][0]["source"], **said, **times}


def wrong_with(cut: Mapping[str, Any]) -> tuple[str, str] | None:
    """Reason and detail for a cut whose audio is not a range of one single-channel file, else None."""
    if (kind := cut.get("type", "MonoCut")) not in ("MonoCut", "Cut"):
        return "cut of another kind", f"{kind}, of which only Lhotse makes audio"
    if not (recording := cut.get("recording")):
        return "no audio", "the cut has no recording"
    if recording.get("transforms"):
        return "changed audio", f"its recording is transformed: {json.dumps(recording['transforms'])[:80]}"
    sources = recording["sources"]
    if len(sources) != 1 or len(sources[0]["channels"]) != 1:
        return "several channels", "the recording has several sources or channels"
    if (kind := sources[0]["type"]) != "file":
        return "no file", f"the source of its recording is a {kind}" + ", which is never run" * (kind == "command")
    return None


FORMATS: dict[str, Callable[[Path, str, str | None], Iterator[Row]]] = {
    "kaldi": rows_of_kaldi,
    "librispeech": rows_of_librispeech,
    "common_voice": rows_of_common_voice,
    "covost": partial(rows_of_common_voice, patterns=("covost_v2.NAME.SPLIT.tsv", "SPLIT.tsv")),
    "nemo": rows_of_nemo,
    "lhotse": rows_of_lhotse,
}
