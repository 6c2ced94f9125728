"""Writes transcriptions as text, JSON or subtitles: on the terminal, or in files of a folder."""

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sedtrain.decoding.subtitles import as_srt, as_vtt
from sedtrain.decoding.transcription import Segment, Transcription, Word
from sedtrain.errors import UserError
from sedtrain.run_dir import without_nan, write_whole, writing_to


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
