"""Text normalizers with a name and a version: error rates are comparable only under the same one."""

import difflib
import importlib
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TypeVar

from sedtrain.errors import UserError

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Normalizer:
    """Rewrites texts: references and hypotheses before scoring, or texts before training."""

    name: str
    version: str
    rewrite: Callable[[str], str]

    def __call__(self, text: str) -> str:
        return self.rewrite(text)

    def __reduce__(self) -> tuple[Callable[[str], "Normalizer"], tuple[str]]:
        return normalizer, (self.name,)  # pickles only the name: some `rewrite` functions cannot be pickled

    def label(self) -> dict[str, str]:
        """Name and version, as written into results and saved models."""
        return {"name": self.name, "version": self.version}


def normalizer(name: str, option: str = "normalizer") -> Normalizer:
    """The normalizer called `none`, `lowercase`, `whisper_english` or `whisper_basic`.

    `none` and `lowercase` are idempotent. `whisper_english` writes number words as digits ("three one four" becomes
    "314") and British spelling as American: use it to compare with published English scores, not for spoken digits.
    `whisper_basic`, for any language, drops all marks, including the vowel signs of Devanagari and related scripts.

    option: where the user wrote the name. Raises UserError for an unknown name.
    """
    return find(NORMALIZERS, name, "normalizer", option)()


def find(table: Mapping[str, Entry], name: str, noun: str, option: str) -> Entry:
    """The entry called `name`. Raises UserError, with the closest name, if there is none."""
    if name in table:
        return table[name]
    close = difflib.get_close_matches(name, table, n=1)
    guess = f": did you mean {close[0]!r}?" if close else ""
    raise UserError(option, name, f"there is no {noun} called {name!r}{guess}", f"write one of {', '.join(table)}")


def lowercase(text: str) -> str:
    # Twice, since lower() can break NFKC (U+1E9E, U+0130), and NFKC can add capitals (U+212A).
    lowered = unicodedata.normalize("NFKC", text).lower()
    return " ".join(unicodedata.normalize("NFKC", lowered).split())


def whisper(language: str) -> Normalizer:
    """Whisper's normalizer `english` or `basic`. transformers' versions lack the 1,741 spellings behind published scores."""
    module = importlib.import_module(f"whisper_normalizer.{language}")
    rewrite = getattr(module, f"{language.title()}TextNormalizer")()
    return Normalizer(f"whisper_{language}", f"whisper-normalizer {version('whisper-normalizer')}", rewrite)


NORMALIZERS: dict[str, Callable[[], Normalizer]] = {
    "none": lambda: Normalizer("none", "1", str),
    "lowercase": lambda: Normalizer("lowercase", f"1 (Unicode {unicodedata.unidata_version})", lowercase),
    "whisper_english": lambda: whisper("english"),
    "whisper_basic": lambda: whisper("basic"),
}
