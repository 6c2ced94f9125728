"""Writes transcriptions as text, JSON or subtitles (SubRip srt, WebVTT vtt): on the terminal, or in files of a folder."""

import html
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

from sedtrain.decoding.transcription import Segment, Transcription, Word
from sedtrain.errors import UserError
from sedtrain.run_dir import without_nan, write_whole, writing_to
from sedtrain.text.spacing import UNSPACED

LINE, LINES = 42, 2  # columns of a line, lines of a subtitle
MOST_SECONDS, PAUSE_SECONDS = 7.0, 1.0  # of a subtitle; a longer pause between words begins another
PIECE = re.compile(rf"{UNSPACED.pattern} ?|(?:(?!{UNSPACED.pattern})\S)+ ?")
TimedPiece = tuple[str, Word]


@dataclass(frozen=True)
class Cue:
    """A subtitle from `start` to `end`, in milliseconds."""

    start: int
    end: int
    text: str


def as_srt(found: Transcription, language: str | None) -> str:
    """SubRip cannot write `-->` in a text."""
    numbered = enumerate(cues(found), start=1)
    blocks = [f"{number}\n{interval(cue, ',')}\n{cue.text.replace('-->', '->')}\n" for number, cue in numbered]
    return "\n".join(blocks)


def as_vtt(found: Transcription, language: str | None) -> str:
    blocks = [f"{interval(cue, '.')}\n{html.escape(cue.text, quote=False)}\n" for cue in cues(found)]
    return "\n".join(["WEBVTT\n", *blocks])


def interval(cue: Cue, point: str) -> str:
    return f"{stamp(cue.start, point)} --> {stamp(cue.end, point)}"


def stamp(milliseconds: int, point: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{point}{rest:03}"


def cues(found: Transcription) -> Iterator[Cue]:
    """Subtitles of at most two lines where words have times, else one subtitle per segment."""
    for segment in found.segments:
        for pieces in subtitles(segment):
            start = round(1000 * pieces[0][1].start)
            end = max(round(1000 * pieces[-1][1].end), start + 1)
            yield Cue(start, end, "\n".join(wrapped([text for text, _ in pieces])))


def subtitles(segment: Segment) -> list[list[TimedPiece]]:
    """The pieces of the text, grouped by subtitle."""
    pieces = timed_pieces(segment)
    if pieces is None:
        whole = Word(segment.text, segment.start, segment.end, 0.0)
        only = [(piece, whole) for piece in PIECE.findall(" ".join(segment.text.split()))]
        return [only] if only else []
    found: list[list[TimedPiece]] = []
    for piece in pieces:
        if found and fits([*found[-1], piece]):
            found[-1].append(piece)
        else:
            found.append([piece])
    return found


def timed_pieces(segment: Segment) -> list[TimedPiece] | None:
    """The text, cut where its words begin; None if its words have no times."""
    text, places = " ".join(segment.text.split()), [0]
    for word in segment.words or ():
        place = text.find(word.text, places[-1])
        if place < 0:
            return None
        places.append(place + len(word.text))
    if not segment.words:
        return None
    starts = [end - len(word.text) for word, end in zip(segment.words, places[1:], strict=True)]
    ends = [*starts[1:], len(text)]
    return [(text[start:end], word) for start, end, word in zip(starts, ends, segment.words, strict=True)]


def fits(pieces: Sequence[TimedPiece]) -> bool:
    """True if the last piece may join the others, which already share a subtitle."""
    (_, first), (_, last) = pieces[0], pieces[-1]
    pause = last.start - pieces[-2][1].end
    seconds = last.end - first.start
    return len(wrapped([text for text, _ in pieces])) <= LINES and pause < PAUSE_SECONDS and seconds <= MOST_SECONDS


def wrapped(pieces: Sequence[str]) -> list[str]:
    """Pieces joined to lines of at most LINE columns."""
    lines: list[str] = []
    for piece in pieces:
        if lines and width((lines[-1] + piece).rstrip()) <= LINE:
            lines[-1] += piece
        else:
            lines.append(piece)
    return [line.strip() for line in lines]


def width(text: str) -> int:
    """Columns of a text; wide characters take two."""
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def as_json(found: Transcription, language: str | None) -> str:
    """One line of JSON; times in seconds."""
    values = {
        "audio": found.audio,
        "seconds": round(found.seconds, 3),
        "language": language,
        "text": found.text,
        "segments": [of_segment(segment) for segment in found.segments],
    }
    return json.dumps(without_nan(values), ensure_ascii=False, allow_nan=False) + "\n"


def of_segment(segment: Segment) -> dict[str, Any]:
    return {
        **times(segment),
        "text": segment.text,
        "score": segment.score,
        "words": None if segment.words is None else [of_word(word) for word in segment.words],
        "others": [{"text": text, "score": score} for text, score in segment.others],
        "doubt": segment.doubt,
    }


def of_word(word: Word) -> dict[str, Any]:
    return {"text": word.text, **times(word), "confidence": round(word.confidence, 4)}


def times(part: Segment | Word) -> dict[str, float]:
    return {"start": round(part.start, 3), "end": round(part.end, 3)}


TRANSCRIPT_WRITERS: dict[str, Callable[[Transcription, str | None], str]] = {
    "text": lambda found, language: f"{found.text}\n",
    "json": as_json,
    "srt": as_srt,
    "vtt": as_vtt,
}


def show(content: str) -> None:
    """Prints. If the reader of the pipe has gone, as after `| head`, ends the command with the status of SIGPIPE."""
    try:
        print(content, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        raise SystemExit(128 + signal.SIGPIPE) from None


@dataclass(frozen=True)
class Outputs:
    """The formats to write, and where to: files in `folder`, or one format on the terminal if it is None.

    language: the language that the model was asked to write
    """

    formats: tuple[str, ...]
    folder: Path | None
    language: str | None

    def names(self, paths: Sequence[str]) -> dict[str, str]:
        """The file name of each recording, without suffix, in the same layout as the recordings.

        All keep their suffix where two names differ only in it. Raises UserError for subtitles of several recordings on a
        terminal, and for a folder that cannot be made.
        """
        if self.folder is None:
            if len(paths) > 1 and {"srt", "vtt"} & {*self.formats}:
                wrong = "subtitles of several recordings do not go to the terminal together"
                raise UserError("out", None, wrong, "write out=FOLDER")
            return {}
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        whole = [os.path.abspath("stdin" if path == "-" else path) for path in paths]
        root = os.path.commonpath([os.path.dirname(path) for path in whole])
        names = [os.path.relpath(path, root) for path in whole]
        stems = [os.path.splitext(name)[0] for name in names]
        distinct = len({stem.casefold() for stem in stems}) == len(stems)
        return dict(zip(paths, stems if distinct else names, strict=True))

    def write(self, found: Transcription, name: str | None) -> None:
        """Prints a transcription or writes its files, each whole. Raises UserError if the folder cannot be written to."""
        for each in self.formats:
            content = TRANSCRIPT_WRITERS[each](found, self.language)
            if self.folder is None or name is None:
                show(f"{found.audio}\t{content}" if each == "text" else content)
                continue
            file = self.folder / f"{name}.{'txt' if each == 'text' else each}"
            with writing_to(self.folder):
                file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(file, content)
