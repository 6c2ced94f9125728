"""A folder as Kaldi and ESPnet have it: wav.scp, text and, where they are there, segments, utt2spk, utt2lang and utt2dur.

Each line of a file is a name and what it stands for. Commands, which Kaldi runs to get audio, are refused.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from sedtrain.data.tables import PROBLEM, Row, lines_of, problem, text_or_problem
from sedtrain.errors import UserError

ARCHIVED = re.compile(r":\d+$")
COLUMNS = {"text": "text", "speaker": "utt2spk", "language": "utt2lang", "seconds": "utt2dur"}
"""The files of columns."""


def kaldi_rows(folder: Path) -> Iterator[Row]:
    broken: list[Row] = []
    lines = {name: keyed_lines(folder / name, broken) for name in ("wav.scp", "segments", *COLUMNS.values())}
    recordings = lines["wav.scp"]
    refuse_commands(folder, recordings)
    has_segments = (folder / "segments").is_file()
    for id in lines["segments" if has_segments else "wav.scp"]:
        row: Row = {"id": id, **{column: lines[name].get(id, (0, None))[1] for column, name in COLUMNS.items()}}
        row |= segment(id, *lines["segments"][id]) if has_segments else {"recording": id}
        yield whole_row(row, recordings) if PROBLEM not in row else row
    for id, (number, _) in lines["text"].items():
        if id not in lines["segments" if has_segments else "wav.scp"]:
            missing = "segment" if has_segments else "recording"
            yield {"id": id} | problem(f"no {missing}", f"text, line {number}, {id}")
    yield from broken


def keyed_lines(file: Path, broken: list[Row]) -> dict[str, tuple[int, str]]:
    """The number and the rest of each line `KEY REST`, by its key; rows of unreadable lines go into `broken`."""
    found: dict[str, tuple[int, str]] = {}
    if not file.is_file():
        return found
    with file.open("rb") as content:
        for number, line in enumerate(lines_of(content), start=1):
            place = f"{file.name}, line {number}"
            row = text_or_problem(line, place)
            key, *rest = re.split(r"[ \t]+", row.get("text", "").strip(" \t\r\n"), maxsplit=1)
            if PROBLEM in row:
                broken.append(row)
            elif key in found:
                broken.append(problem("two lines of one name", f"{place}, {key} as in line {found[key][0]}"))
            elif key:
                found[key] = (number, rest[0] if rest else "")
    return found


def refuse_commands(folder: Path, recordings: Mapping[str, tuple[int, str]]) -> None:
    """Raises UserError for a command in wav.scp, which nobody wants to run because a folder says so, and for archives."""
    for number, place in recordings.values():
        if place.endswith("|") or place.startswith("|") or place == "-":
            wrong = f"wav.scp, line {number} is a command ({place[:80]}), which is never run"
        elif ARCHIVED.search(place):
            wrong = f"wav.scp, line {number} is an offset in an archive ({place[:80]})"
        else:
            continue
        write = "write wav.scp with the paths of audio files, converted once by you"
        raise UserError("data.path", str(folder), wrong, write)


def segment(id: str, number: int, rest: str) -> Row:
    """Recording, start and end of a line `UTTERANCE RECORDING START END`; the end -1 is that of the recording."""
    place, fields = f"segments, line {number}, {id}", rest.split()
    try:
        recording, start, end = fields[0], *map(float, fields[1:3])
        if not 0 <= start < (end if end != -1 else start + 1):
            return problem("no such segment", f"{place}: {fields[1]} to {fields[2]} s")
    except (IndexError, ValueError):
        return problem("broken line", f"{place}: it is not UTTERANCE RECORDING START END")
    return {"recording": recording, "start": start, "end": None if end == -1 else end}


def whole_row(row: Row, recordings: Mapping[str, tuple[int, str]]) -> Row:
    """The row with the file of its recording, or what it lacks."""
    recording = row.pop("recording")
    number, file = recordings.get(recording, (0, ""))
    if not file:
        wrong = f"wav.scp, line {number} names no file" if number else f"wav.scp has no recording {recording}"
        return row | problem("no recording", wrong)
    if row["text"] is None:
        return row | problem("no transcript", f"text has no line for {row['id']}")
    return row | {"audio": file}
