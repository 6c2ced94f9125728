"""Counts what a tokenizer cannot write or give back of training texts, before training starts."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Protocol
from unicodedata import normalize

from transformers import PreTrainedTokenizerBase

NUM_SHOWN = 10  # characters
NUM_CHANGED = 3  # texts
WIDTH = 40  # characters of a text that is shown


class Scores(Protocol):
    """Error rates of hypotheses, read one by one."""

    def update(self, references: Sequence[str], hypotheses: Sequence[str]) -> object: ...

    def compute(self) -> Mapping[str, float]: ...


class VocabularyReport:
    """Characters and tokens of texts, read one by one; only counts and the first text with a character are kept.

    rewrite: applied to each text before it is encoded
    scores:  of texts that are encoded and decoded; no model of this tokenizer writes these texts with fewer errors

    num_texts, num_emptied:  texts that are not empty; how many of them `rewrite` empties
    characters:              counts in rewritten texts, without white space
    num_tokens, num_unknown: tokens of rewritten texts; how many of them are the unknown token
    num_changed, changed:    texts that come back as others, and the first of them
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts: Iterable[str],
        rewrite: Callable[[str], str] = str,
        scores: Scores | None = None,
    ) -> None:
        self.tokenizer, self.rewrite, self.scores = tokenizer, rewrite, scores
        self.num_texts = self.num_emptied = self.num_tokens = self.num_unknown = self.num_changed = 0
        self.changed: list[tuple[str, str]] = []
        self.characters: Counter[str] = Counter()
        self.first_text: dict[str, str] = {}
        for text in texts:
            self.read(text)

    def read(self, text: str) -> None:
        if not text.strip():
            return
        target = self.rewrite(text)
        self.num_texts += 1
        self.num_emptied += not target.strip()
        ids = self.ids(target)
        self.num_tokens += len(ids)
        self.num_unknown += ids.count(self.tokenizer.unk_token_id)
        counts = Counter("".join(normalize("NFC", target).split()))
        for character in counts.keys() - self.first_text.keys():
            self.first_text[character] = text
        self.characters.update(counts)
        if self.scores is not None:
            self.compare(text, self.tokenizer.decode(ids, skip_special_tokens=True))

    def compare(self, text: str, decoded: str) -> None:
        assert self.scores is not None
        self.scores.update([text], [decoded])
        if text.split() != decoded.split():
            self.num_changed += 1
            if len(self.changed) < NUM_CHANGED:
                self.changed.append((text, decoded))

    def ids(self, target: str) -> list[int]:
        ids: list[int] = self.tokenizer(text_target=target, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    @cached_property
    def unwritable(self) -> Counter[str]:
        """Counts of the characters that the tokenizer writes as unknown or not at all."""
        found: Counter[str] = Counter()
        for character, count in self.characters.items():
            ids = self.ids(character)
            if not ids or self.tokenizer.unk_token_id in ids:
                found[character] = count
        return found

    @property
    def finds_nothing(self) -> bool:
        floors = self.scores.compute().values() if self.num_changed and self.scores else ()
        return not (self.unwritable or self.num_unknown or self.num_emptied or any(floors))

    def __str__(self) -> str:
        """A summary, then a line for each frequent character that cannot be written and for each text that changes."""
        return "\n".join([*self.written(), *self.given_back()])

    def given_back(self) -> Iterator[str]:
        if self.num_changed and self.scores:
            floors = " and ".join(f"{name.upper()} {value:.2%}" for name, value in self.scores.compute().items())
            what = f"  {self.num_changed:,} of {self.num_texts:,} texts are others when they are encoded and decoded"
            yield f"{what}: no model scores better than {floors} on them all"
            yield from (f"  {shown(text, back)!r} comes back as {shown(back, text)!r}" for text, back in self.changed)

    def written(self) -> list[str]:
        if not (self.unwritable or self.num_unknown or self.num_emptied):
            return [f"the tokenizer writes all {len(self.characters):,} characters of {self.num_texts:,} texts"]
        lines = [
            f"the tokenizer cannot write {len(self.unwritable):,} of the {len(self.characters):,} characters of "
            f"{self.num_texts:,} texts; {self.num_unknown:,} of {self.num_tokens:,} tokens are unknown "
            f"({self.num_unknown / max(self.num_tokens, 1):.2%})"
        ]
        lines += [self.line(character, count) for character, count in self.unwritable.most_common(NUM_SHOWN)]
        if rest := sum(islice(sorted(self.unwritable.values(), reverse=True), NUM_SHOWN, None)):
            lines.append(f"  and {len(self.unwritable) - NUM_SHOWN:,} more, {rest:,} times")
        if self.num_emptied:
            lines.append(f"  {self.num_emptied:,} texts are empty once they are normalized for training")
        return lines

    def line(self, character: str, count: int) -> str:
        """A character that cannot be written, and the first text with it, before it was rewritten."""
        text = self.first_text[character]
        position = normalize("NFC", text).find(character)
        start = max(position - WIDTH // 2, 0)
        source = ", brought in by the normalizer," if position < 0 else ""
        return f"  {character!r} (U+{ord(character):04X}) {count:,} times{source} as in {text[start : start + WIDTH]!r}"


def shown(text: str, other: str) -> str:
    """The part of a text around the first character in which it differs from another."""
    pairs = enumerate(zip(text, other, strict=False))
    start = max(next((index for index, (left, right) in pairs if left != right), 0) - WIDTH // 2, 0)
    return text[start : start + WIDTH]
