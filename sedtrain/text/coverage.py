"""What a tokenizer cannot write of the texts that it is to write, counted before training starts."""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import islice
from unicodedata import normalize

from transformers import PreTrainedTokenizerBase

NUM_SHOWN = 10
WIDTH = 40


class VocabularyReport:
    """What a tokenizer makes of texts, read one by one; a character's count and its first text are all that is kept.

    rewrite: what is done to a text before it becomes labels

    num_texts, num_emptied: texts that are not empty, and those of them that are once they are rewritten
    characters: how often each occurs in rewritten texts, white space aside
    num_tokens, num_unknown: tokens of rewritten texts, and those of them that stand for something unknown
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], rewrite: Callable[[str], str] = str
    ) -> None:
        self.tokenizer, self.rewrite = tokenizer, rewrite
        self.num_texts = self.num_emptied = self.num_tokens = self.num_unknown = 0
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

    def ids(self, target: str) -> list[int]:
        ids: list[int] = self.tokenizer(text_target=target, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    @cached_property
    def unwritable(self) -> Counter[str]:
        """How often each character occurs that the tokenizer writes as unknown or not at all."""
        ids = {character: self.ids(character) for character in self.characters}
        unknown = self.tokenizer.unk_token_id
        return Counter(
            {each: self.characters[each] for each, written in ids.items() if not written or unknown in written}
        )

    @property
    def finds_nothing(self) -> bool:
        return not (self.unwritable or self.num_unknown or self.num_emptied)

    def __str__(self) -> str:
        """One line where everything can be written, else a line for each of the most frequent characters that cannot."""
        if self.finds_nothing:
            return f"the tokenizer writes all {len(self.characters):,} characters of {self.num_texts:,} texts"
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
        return "\n".join(lines)

    def line(self, character: str, count: int) -> str:
        """A character that cannot be written, and the first text it is in, or came from."""
        text = self.first_text[character]
        start = max(normalize("NFC", text).find(character) - WIDTH // 2, 0)
        brought = "" if character in normalize("NFC", text) else ", brought in by the normalizer,"
        return (
            f"  {character!r} (U+{ord(character):04X}) {count:,} times{brought} as in {text[start : start + WIDTH]!r}"
        )
