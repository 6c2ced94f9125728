"""Counts the characters of training texts that a tokenizer cannot write, and the texts that it changes."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Protocol
from unicodedata import normalize

from transformers import PreTrainedTokenizerBase

NUM_SHOWN, NUM_CHANGED, WIDTH = 10, 3, 40
"""Characters and changed texts that a report shows, and characters shown of a text."""


class Scores(Protocol):
    """Error rates, updated one text at a time."""

    def update(self, references: Sequence[str], hypotheses: Sequence[str]) -> object: ...

    def compute(self) -> Mapping[str, float]: ...


class VocabularyReport:
    """Statistics of the characters and tokens of texts. Keeps counts, and the first text with each character.

    rewrite: applied to each text before it is encoded
    scores:  compare decoded texts with the originals; no model with this tokenizer can make fewer errors on them

    num_texts, num_emptied:  non-empty texts; those of them that `rewrite` empties
    characters:              counts in rewritten texts, without white space
    num_tokens, num_unknown: tokens of rewritten texts; unknown tokens among them
    num_changed, changed:    texts that encoding and decoding changes, and the first of them
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
        """Counts of the characters that the tokenizer writes as unknown, or drops."""
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
        """A summary, with lines for the most frequent unwritable characters and the first changed texts."""
        return "\n".join([*self.lines_of_characters(), *self.lines_of_changes()])

    def lines_of_changes(self) -> Iterator[str]:
        if self.num_changed and self.scores:
            floors = " and ".join(f"{name.upper()} {value:.2%}" for name, value in self.scores.compute().items())
            changes = f"  encoding and decoding changes {self.num_changed:,} of {self.num_texts:,} texts"
            yield f"{changes}: no model scores better than {floors} on all of them"
            yield from (f"  {shown(text, back)!r} comes back as {shown(back, text)!r}" for text, back in self.changed)

    def lines_of_characters(self) -> list[str]:
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
            lines.append(f"  {self.num_emptied:,} texts are empty after normalization for training")
        return lines

    def line(self, character: str, count: int) -> str:
        """An unwritable character, with the first text that has it, before rewriting."""
        text = self.first_text[character]
        position = normalize("NFC", text).find(character)
        start = max(position - WIDTH // 2, 0)
        source = ", added by the normalizer," if position < 0 else ""
        return f"  {character!r} (U+{ord(character):04X}) {count:,} times{source} as in {text[start : start + WIDTH]!r}"


def shown(text: str, other: str) -> str:
    """The part of a text around its first difference from another."""
    pairs = enumerate(zip(text, other, strict=False))
    start = max(next((index for index, (left, right) in pairs if left != right), 0) - WIDTH // 2, 0)
    return text[start : start + WIDTH]
