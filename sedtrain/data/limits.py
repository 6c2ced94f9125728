"""Which utterances are left out before any audio is decoded: too long, too short, without text, unreadable."""

from collections.abc import Sequence
from dataclasses import dataclass

from sedtrain.batch import Skipped
from sedtrain.data.rows import UtteranceRows


@dataclass(frozen=True)
class Limits:
    """What an utterance has to keep to be used."""

    min_seconds: float
    max_seconds: float

    def sift(self, rows: UtteranceRows, indices: Sequence[int]) -> tuple[dict[int, float], list[Skipped]]:
        """The seconds of the rows that are used, by index, and the others with the reason."""
        kept: dict[int, float] = {}
        skipped: list[Skipped] = []
        for index, seconds, text in zip(indices, rows.seconds(indices), rows.texts(indices), strict=True):
            if reason := rows.problem(index, seconds) or self.reason_to_skip(seconds, text):
                skipped.append(Skipped(rows.id(index), *reason))
            else:
                assert seconds is not None
                kept[index] = seconds
        return kept, skipped

    def reason_to_skip(self, seconds: float | None, text: str) -> tuple[str, str] | None:
        if seconds is None:
            return "unreadable audio", ""
        if seconds < self.min_seconds:
            return "too short", f"{seconds:.2f} s < data.min_seconds={self.min_seconds}"
        if seconds > self.max_seconds:
            return "too long", f"{seconds:.2f} s > data.max_seconds={self.max_seconds}"
        return None if text.strip() else ("empty text", "")
