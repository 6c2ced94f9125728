"""Which utterances are left out before any audio is decoded: too long, too short, without text, unreadable."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sedtrain.batch import Skipped, require
from sedtrain.data.manifests import NOT_TEXT
from sedtrain.data.rows import UtteranceRows

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # Unicode's Cc but tab, line feed, carriage return
Reason = tuple[str, str]
"""A few words to be counted by, and a detail."""


@dataclass(frozen=True)
class Limits:
    """What an utterance has to keep to be used. Raises UserError for limits that nothing could keep."""

    min_seconds: float
    max_seconds: float
    min_characters: int = 1
    max_characters: int = 10_000

    def __post_init__(self) -> None:
        require(self.min_seconds >= 0, "data.min_seconds", self.min_seconds, "0 or more")
        above = f"above data.min_seconds, {self.min_seconds}"
        require(self.max_seconds > self.min_seconds, "data.max_seconds", self.max_seconds, above)
        require(self.min_characters >= 1, "data.min_characters", self.min_characters, "1 or more")
        at_least = f"{self.min_characters}, data.min_characters, or more"
        require(self.max_characters >= self.min_characters, "data.max_characters", self.max_characters, at_least)

    def sift(
        self,
        rows: UtteranceRows,
        indices: Sequence[int],
        seconds: Sequence[float | None] | None = None,
        rewrite: Callable[[str], str] = str,
    ) -> tuple[dict[int, float], list[Skipped]]:
        """The seconds of the rows that are used, by index, and the others with the reason.

        seconds: of each row, where they are known already; None of one whose length cannot be found
        rewrite: what is done to texts before they are learnt, which has to leave something
        """
        kept: dict[int, float] = {}
        skipped: list[Skipped] = []
        known = rows.seconds(indices) if seconds is None else seconds
        for index, length, text in zip(indices, known, rows.texts(indices), strict=True):
            reason = rows.problem(index, length) or self.refused_length(length) or self.refused_text(text, rewrite)
            if reason:
                skipped.append(rows.skipped(index, *reason))
            else:
                assert length is not None
                kept[index] = length
        return kept, skipped

    def refused_length(self, seconds: float | None) -> Reason | None:
        if seconds is None:
            return "unreadable audio", ""
        if seconds < self.min_seconds:
            return "too short", f"{seconds:.2f} s < data.min_seconds={self.min_seconds}"
        if seconds > self.max_seconds:
            return "too long", f"{seconds:.2f} s > data.max_seconds={self.max_seconds}"
        return None

    def refused_text(self, text: str, rewrite: Callable[[str], str] = str) -> Reason | None:
        number = len(text.strip())
        if not number:
            return "empty text", ""
        if text.startswith(NOT_TEXT):
            return "text that is not text", shortened(text.removeprefix(NOT_TEXT))
        if found := CONTROL.search(text):
            return "control characters in the text", f"U+{ord(found[0]):04X} in {shortened(text)}"
        if number < self.min_characters:
            return "text too short", f"{number} characters < data.min_characters={self.min_characters}"
        if number > self.max_characters:
            return "text too long", f"{number} characters > data.max_characters={self.max_characters}"
        return None if rewrite(text).strip() else ("text empty once normalised", shortened(text))


def shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
