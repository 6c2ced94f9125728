"""Ranges of numbers, written as types of options (`rate: Positive`), and the tokenizers of BLEU."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """The finite numbers from `low` to `high`.

    words: names the range in error messages
    open:  excluded ends: "low", "high", "both" or none
    """

    words: str
    low: float = -inf
    high: float = inf
    open: str = ""

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.open in ("low", "both") else number >= self.low
        below = number < self.high if self.open in ("high", "both") else number <= self.high
        return above and below and abs(number) != inf


Finite = Annotated[float, Range("a finite number")]
Positive = Annotated[float, Range("a number above 0", low=0, open="low")]
NonNegative = Annotated[float, Range("a number of 0 or more", low=0)]
Fraction = Annotated[float, Range("a fraction from 0 to 1", low=0, high=1)]
PositiveFraction = Annotated[float, Range("a fraction above 0, at most 1", low=0, high=1, open="low")]
FractionBelowOne = Annotated[float, Range("a fraction from 0 to below 1", low=0, high=1, open="high")]
InnerFraction = Annotated[float, Range("a fraction between 0 and 1", low=0, high=1, open="both")]
Exponent = Annotated[float, Range("a number from -10 to 10", low=-10, high=10)]
Count = Annotated[int, Range("a whole number of 1 or more", low=1)]
UpTo1000 = Annotated[int, Range("a whole number from 1 to 1,000", low=1, high=1_000)]
UpTo1000OrZero = Annotated[int, Range("a whole number from 0 to 1,000", low=0, high=1_000)]
UpToMillion = Annotated[int, Range("a whole number from 1 to 1,000,000", low=1, high=1_000_000)]
CountOrZero = Annotated[int, Range("a whole number of 0 or more", low=0)]

BLEU_TOKENIZERS = ("13a", "zh", "ja-mecab", "ko-mecab", "intl", "char", "none")
"""sacrebleu's tokenizers that need no download."""
