"""Text normalizers with a name and a version: two error rates compare only under the same one."""

import difflib
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TypeVar

from sedtrain.errors import UserError

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Normalizer:
    """A rewriting of text: of references and hypotheses before they are scored, or of texts before they are learnt."""

    name: str
    version: str
    rewrite: Callable[[str], str]

    def __call__(self, text: str) -> str:
        return self.rewrite(text)

    def __reduce__(self) -> tuple[Callable[[str], "Normalizer"], tuple[str]]:
        return normalizer, (self.name,)  # workers get it by name: not every rewriting can be pickled

    def label(self) -> dict[str, str]:
        """What is written of it beside a score and into a saved model."""
        return {"name": self.name, "version": self.version}


def normalizer(name: str) -> Normalizer:
    """The normalizer called `none`, `lowercase`, `whisper_english` or `whisper_basic`; else a UserError.

    The first two promise that twice is once. `whisper_english` writes number words as digits ("three one four"
    becomes "314") and British spelling as American: use it to compare with published English scores, not for spoken
    digits. `whisper_basic`, for any language, drops every mark: of Devanagari and its like the vowel signs.
    """
    return pick(NORMALISERS, name, "normalizer")()


def pick(table: Mapping[str, Entry], name: str, noun: str) -> Entry:
    """The entry called `name`; a UserError with the closest names where there is none."""
    if name in table:
        return table[name]
    close = difflib.get_close_matches(name, table, n=1)
    raise UserError(
        f"there is no {noun} called {name!r}" + (f": did you mean {close[0]!r}?" if close else ""),
        f"one of {', '.join(table)}",
    )


def collapse_whitespace(text: str) -> str:
    return " ".join(text.split())


def _lowercase(text: str) -> str:
    # Lower case can leave NFKC (U+1E9E, U+0130), and NFKC can bring capitals back (U+212A): hence twice.
    lowered = unicodedata.normalize("NFKC", text).lower()
    return collapse_whitespace(unicodedata.normalize("NFKC", lowered))


def _none() -> Normalizer:
    return Normalizer("none", "1", str)


def _lower() -> Normalizer:
    return Normalizer("lowercase", f"1 (Unicode {unicodedata.unidata_version})", _lowercase)


# transformers has these two as well, but without the table of 1,741 spellings that published scores use.
def _whisper_english() -> Normalizer:
    from whisper_normalizer.english import EnglishTextNormalizer

    return Normalizer("whisper_english", _whisper_version(), EnglishTextNormalizer())


def _whisper_basic() -> Normalizer:
    from whisper_normalizer.basic import BasicTextNormalizer

    return Normalizer("whisper_basic", _whisper_version(), BasicTextNormalizer())


def _whisper_version() -> str:
    return f"whisper-normalizer {version('whisper-normalizer')}"


NORMALISERS: dict[str, Callable[[], Normalizer]] = {
    "none": _none,
    "lowercase": _lower,
    "whisper_english": _whisper_english,
    "whisper_basic": _whisper_basic,
}
