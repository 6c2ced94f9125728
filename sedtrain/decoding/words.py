"""The words of a decoded text and the tokens that write them, for any tokenizer."""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from operator import eq
from unicodedata import category

from transformers import PreTrainedTokenizerBase

from sedtrain.text.spacing import UNSPACED


def texts_of(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> list[str]:
    """Texts of rows of tokens, without special tokens and without white space around them."""
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


def words_in(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> Iterator[tuple[str, int, int]]:
    """The words of a decoded text, each with the number of its first token and of the one after its last.

    White space separates words. In scripts without it, such as Chinese, each token is a word, together with its marks.
    """
    tokens = iter(letter_tokens(tokenizer, ids, text))
    for written in text.split():
        word, first, last = "", 0, -1
        for letter in written:
            start, end = next(tokens)
            if word and start > last and may_part(word[-1], letter):
                yield word, first, last + 1
                word = ""
            first = first if word else start
            word, last = word + letter, end
        yield word, first, last + 1


def letter_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> list[tuple[int, int]]:
    """The first and the last token of each letter of a decoded text, without its white space.

    The text is decoded token by token. A letter belongs to the token that makes it appear, and to the tokens just before that
    show nothing yet, such as the first bytes of a character. White space and special tokens belong to no letter.
    """
    letters, found, first = "".join(text.split()), list[tuple[int, int]](), None
    for number, token in enumerate(ids):
        shown = "".join(tokenizer.decode(ids[: number + 1], skip_special_tokens=True).split())
        new = sum(takewhile(bool, map(eq, letters[len(found) :], shown[len(found) :])))
        if first is None and (new > 0 or tokenizer.decode([token], skip_special_tokens=True).strip()):
            first = number
        if new > 0 and first is not None:
            found += [(first, number)] * new
            first = None
    return found


def may_part(left: str, right: str) -> bool:
    """True if a word may end here, in a script without spaces: not before a closing mark, nor after an opening one."""
    closes = category(right)[0] == "M" or category(right) in ("Pe", "Pf", "Po")
    return bool(UNSPACED.match(left) or UNSPACED.match(right)) and not closes and category(left) not in ("Pi", "Ps")
