"""The text of a recording, with the times of its parts."""

from dataclasses import dataclass

from sedtrain.text.spacing import UNSPACED


@dataclass(frozen=True)
class Word:
    """A word from `start` to `end` seconds of the recording; confidence: from 0 to 1."""

    text: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True)
class Segment:
    """A part of a recording that was decoded at once, from `start` to `end` seconds.

    score:   score by which the search ranks texts; None if it computes none
    words:   words with their times; None if the model cannot time them
    others:  the next best texts of n-best search, with their scores
    cut_at:  number of tokens at which the text was cut; 0 if it ended by itself
    doubt:   a reason to think that nobody said this
    """

    text: str
    start: float
    end: float
    score: float | None = None
    words: tuple[Word, ...] | None = None
    others: tuple[tuple[str, float | None], ...] = ()
    cut_at: int = 0
    doubt: str | None = None


@dataclass(frozen=True)
class Transcription:
    """The text that a model wrote for one recording of `seconds`."""

    audio: str
    seconds: float
    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        """The texts of all segments, with spaces between them in scripts that use spaces."""
        text = ""
        for segment in self.segments:
            is_spaced = text and segment.text and not (UNSPACED.match(text[-1]) or UNSPACED.match(segment.text[0]))
            text += f" {segment.text}" if is_spaced else segment.text
        return text
