"""The n-best texts of an utterance."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import repeat, takewhile
from typing import Self

from transformers import GenerationConfig


@dataclass(frozen=True)
class HeardWord:
    """A word in the encoder's frames `start` to `end`, the last not included.

    confidence: mean probability that CTC gives its tokens in their frames, from 0 to 1
    """

    text: str
    start: int
    end: int
    confidence: float


@dataclass(frozen=True)
class Hypotheses:
    """The n-best texts of one utterance, the best first.

    ids:    tokens of each, without prompt, end and padding
    scores: by which the search ranks them; None if it computes none
    limit:  tokens that the best one may have; 0: any number
    confidence: mean probability that CTC gives the tokens of the best one in their frames, 0 where it hears nothing;
        None if it was not asked, or there is nothing to ask
    agreement: share of the tokens that CTC alone would write too
    words:  of the best one, where they are looked for; None where it cannot be aligned
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
        """How far CTC is of the opinion of the search, from 0 to 1; None if it was not asked."""
        return None if self.confidence is None else self.confidence * self.agreement

    @property
    def is_cut(self) -> bool:
        """True if the best one was cut at the limit."""
        return 0 < self.limit <= len(self.ids[0])

    @classmethod
    def of_rows(
        cls, rows: Sequence[Sequence[int]], scores: list[float] | None, ends: Collection[int], pad: int
    ) -> Self:
        """From rows of tokens behind the prompt, each cut at the first of `ends`."""
        texts = (takewhile(lambda token: token not in ends, row) for row in rows)
        return cls([[token for token in text if token != pad] for text in texts], scores)


def end_tokens(config: GenerationConfig) -> list[int]:
    """The tokens that end a text."""
    ends: int | list[int] = config.eos_token_id
    return ends if isinstance(ends, list) else [ends]
