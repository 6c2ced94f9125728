"""The n-best texts of an utterance."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import repeat, takewhile
from typing import Self

from transformers import GenerationConfig


@dataclass(frozen=True)
class HeardWord:
    """A word in the encoder's frames from `start` to before `end`.

    confidence: mean probability, from 0 to 1, that CTC gives the word's tokens in their frames
    """

    text: str
    start: int
    end: int
    confidence: float


@dataclass(frozen=True)
class Hypotheses:
    """The n-best texts of one utterance, the best first.

    ids:    tokens of each text, without prompt, end and padding
    scores: scores by which the search ranks the texts; None if it computes none
    limit:  most tokens that the best text could have; 0: any number
    confidence: mean probability that CTC gives the tokens of the best text in their frames, 0 where CTC hears nothing;
        None if CTC was not asked, or there is no CTC head
    agreement: share of the best text's tokens that CTC alone would write too
    words:  words of the best text; None if not asked for, or if the text cannot be aligned
    """

    ids: list[list[int]]
    scores: list[float] | None = None
    texts: tuple[str, ...] = ()
    limit: int = 0
    confidence: float | None = None
    agreement: float = 1.0
    words: tuple[HeardWord, ...] | None = None

    @property
    def scored_texts(self) -> list[tuple[str, float | None]]:
        return list(zip(self.texts, self.scores or repeat(None), strict=False))

    @property
    def support(self) -> float | None:
        """Support of CTC for the best text, from 0 to 1; None if CTC was not asked."""
        return None if self.confidence is None else self.confidence * self.agreement

    @property
    def is_cut(self) -> bool:
        """True if the best text was cut at the limit."""
        return 0 < self.limit <= len(self.ids[0])

    @classmethod
    def of_rows(
        cls, rows: Sequence[Sequence[int]], scores: list[float] | None, ends: Collection[int], pad: int
    ) -> Self:
        """From rows of tokens after the prompt, each cut at the first of `ends`."""
        return cls([[token for token in until_end(row, ends) if token != pad] for row in rows], scores)


def until_end(ids: Sequence[int], ends: Collection[int]) -> list[int]:
    """The ids before the first end."""
    return list(takewhile(lambda token: token not in ends, ids))


def end_tokens(config: GenerationConfig) -> list[int]:
    """The tokens that end a text."""
    ends: int | list[int] = config.eos_token_id
    return ends if isinstance(ends, list) else [ends]
