"""Subtitles: SubRip (srt) and WebVTT (vtt) of a transcription."""

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from unicodedata import east_asian_width

from sedtrain.decoding.transcription import Segment, Transcription, Word
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
