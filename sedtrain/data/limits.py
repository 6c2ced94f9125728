"""Limits on the lengths of audio and text, and the reason for skipping an utterance beyond them."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from sedtrain.data.tables import NOT_TEXT
from sedtrain.data.utterances import Reason
from sedtrain.errors import UserError

LIMITED = frozenset({"too short", "too long", "text too short", "text too long"})
"""Reasons that come from the user's own limits. They are no faults and never stop a run."""
SCORED = 4
"""Factor by which a scored utterance may be longer than a training utterance: scoring keeps no activations."""


@dataclass(frozen=True)
class Limits:
    """Limits on the lengths of audio and text. Raises UserError for limits that no utterance can meet.

    min_characters: 0 allows empty texts
    longest: the option that gives `max_seconds`, for messages
    """

    min_seconds: float
    max_seconds: float
    min_characters: int = 1
    max_characters: int = 10_000
    longest: str = "data.max_seconds"

    def __post_init__(self) -> None:
        if self.max_seconds <= self.min_seconds:
            above = f"above min_seconds, {self.min_seconds}"
            write = f"write data.max_seconds=NUMBER {above}"
            raise UserError("data.max_seconds", self.max_seconds, f"this has to be {above}", write)
        if self.max_characters < self.min_characters:
            or_more = f"min_characters, {self.min_characters}, or more"
            write = f"write data.max_characters=NUMBER, {or_more}"
            raise UserError("data.max_characters", self.max_characters, f"this has to be {or_more}", write)

    def scored(self, batch_seconds: float) -> "Limits":
        """Limits of a split that is scored in batches: skips only audio that may not fit in memory."""
        by_length = (SCORED * self.max_seconds, f"{SCORED} * {self.longest}")
        most, option = max(by_length, (batch_seconds, "data.batch_seconds"))
        return Limits(0.0, most, 0, sys.maxsize, option)

    def refused_length(self, seconds: float) -> Reason | None:
        if seconds < self.min_seconds:
            return "too short", f"{seconds:.2f} s < data.min_seconds={self.min_seconds}"
        return too_long(seconds, self.max_seconds, self.longest) if seconds > self.max_seconds else None

    def refused_text(self, text: str, rewrite: Callable[[str], str] = str) -> Reason | None:
        """The reason to skip a text, else None.

        rewrite: normalizes texts before they are learnt; a text that becomes empty is skipped
        """
        number = len(text.strip())
        if text.startswith(NOT_TEXT):
            return "text that is not text", shortened(text.removeprefix(NOT_TEXT))
        if not any(character.isprintable() and character != " " for character in text):
            return ("empty text", shortened(text) if number else "") if self.min_characters else None
        if number < self.min_characters:
            return "text too short", f"{number} characters < data.min_characters={self.min_characters}"
        if number > self.max_characters:
            return "text too long", f"{number} characters > data.max_characters={self.max_characters}"
        is_emptied = self.min_characters and not rewrite(text).strip()
        return ("text empty once normalized", shortened(text)) if is_emptied else None


WHOLE = Limits(0.0, inf, 0, sys.maxsize)
"""Limits of a test split, which skip nothing by length: decoding cuts long utterances into windows."""


def too_long(seconds: float, most: float, option: str) -> Reason:
    return "too long", f"{seconds:.2f} s > {option}={most:g}"


def shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
