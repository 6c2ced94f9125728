"""White space that WordPiece forgets around marks and ideographs, learnt from texts; scripts without spaces."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice, product
from unicodedata import category

from tokenizers import Regex, Tokenizer, decoders
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

NUM_TEXTS = 100_000  # spacing is learnt from the first so many texts
KEPT = (
    *("model_max_length", "padding_side", "truncation_side", "chat_template"),
    *("split_special_tokens", "extra_special_tokens"),
)
"""Settings of a tokenizer that its tokenizer.json does not hold."""
CONTINUED = "##"  # prefix of a token that continues a word
IDEOGRAPHS = (
    "\u2e80-\u2fff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
# Thai, Lao, Tibetan, Burmese and Khmer follow.
UNSPACED = re.compile(rf"[{IDEOGRAPHS}\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff]")
LETTER, NUMBER, IDEOGRAPH, MARK = "letter", "number", "ideograph", "mark"
CLASSES = {
    LETTER: rf"[\p{{L}}\p{{M}}&&[^{IDEOGRAPHS}]]",
    NUMBER: r"\p{N}",
    IDEOGRAPH: f"[{IDEOGRAPHS}]",
    MARK: rf"[^\s\p{{L}}\p{{M}}\p{{N}}{IDEOGRAPHS}]",
}
"""Classes of characters, as regular expressions. Next to a space, each mark is a kind of its own."""

Pair = tuple[str, str]
Context = tuple[str, Pair, str]
"""The kinds of two neighbours; around them, the class of the character beyond a neighbour that is a mark, else ""."""


def is_unspaced(texts: Iterable[str]) -> bool:
    """True if most letters belong to scripts without spaces between words, in which words cannot be counted."""
    characters = "".join(texts)
    num_unspaced = len(UNSPACED.findall(characters))
    return 2 * num_unspaced > sum(character.isalnum() or bool(UNSPACED.match(character)) for character in characters)


def with_spacing(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The tokenizer; a WordPiece tokenizer learns from the texts to decode "it's" instead of "it ' s".

    WordPiece splits at marks and ideographs, and forgets whether a space was beside them. Decoding writes a space between
    two neighbours if the texts mostly have one in this context. The rules are saved in the tokenizer's own file.
    """
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not is_wordpiece(backend):
        tokenizer.clean_up_tokenization_spaces = False  # else decoding rewrites " ," as ","
        return tokenizer
    spaced = Tokenizer.from_str(backend.to_str())
    rules = pattern(joined_contexts(boundaries(tokenizer, texts)))
    joining = [decoders.Fuse(), decoders.Replace(Regex(rules), "")] if rules else []
    spaced.decoder = decoders.Sequence([decoders.WordPiece(CONTINUED, cleanup=False), *joining])
    # the tokenizer's own class would replace the decoder when it is loaded
    return PreTrainedTokenizerFast(
        tokenizer_object=spaced,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **{name: getattr(tokenizer, name) for name in KEPT},
        **tokenizer.special_tokens_map,
    )


def is_wordpiece(backend: Tokenizer) -> bool:
    """True for a WordPiece decoder, with or without spacing learnt from other texts."""
    decoder = json.loads(backend.to_str())["decoder"] or {}
    kinds = [step["type"] for step in decoder.get("decoders", [decoder]) if step]
    return kinds[:1] == ["WordPiece"] and kinds[1:] in ([], ["Fuse", "Replace"])


def kind(character: str) -> str:
    """The class of a character; for a mark, the mark itself."""
    if re.match(f"[{IDEOGRAPHS}]", character):
        return IDEOGRAPH
    return {"L": LETTER, "M": LETTER, "N": NUMBER}.get(category(character)[0], character)


def class_of(kind: str) -> str:
    return kind if kind in CLASSES else MARK


def boundaries(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[tuple[Context, bool]]:
    """Yields the context of each space that decoding writes, and True if the text has no space there."""
    for text in islice(texts, NUM_TEXTS):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        words: list[list[int]] = []  # start, end, first token
        for id, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if words and tokenizer.convert_ids_to_tokens(id).startswith(CONTINUED):
                words[-1][1] = end
            else:
                words.append([start, end, id])
        kinds = [(kind(text[start]), kind(text[end - 1])) for start, end, _ in words]
        around = [(MARK, MARK), *kinds, (MARK, MARK)]
        for index in range(len(words) - 1):
            if tokenizer.unk_token_id in (words[index][2], words[index + 1][2]):
                continue  # unknown tokens are not decoded
            left, right = kinds[index][1], kinds[index + 1][0]
            before = class_of(around[index][1]) if class_of(left) == MARK else ""
            after = class_of(around[index + 3][0]) if class_of(right) == MARK else ""
            is_joined = not any(map(str.isspace, text[words[index][1] : words[index + 1][0]]))
            yield (before, (left, right), after), is_joined


def joined_contexts(found: Iterable[tuple[Context, bool]]) -> list[Context]:
    """The contexts that mostly have no space; an unseen context follows the majority of its pair."""
    votes: Counter[Context] = Counter()
    pair_votes: Counter[Pair] = Counter()
    for context, is_joined in found:
        votes[context] += 1 if is_joined else -1
        pair_votes[context[1]] += 1 if is_joined else -1
    classes = {True: CLASSES, False: [""]}
    return [
        context
        for pair in sorted(pair_votes)
        for context in product(classes[class_of(pair[0]) == MARK], [pair], classes[class_of(pair[1]) == MARK])
        if votes.get(context, pair_votes[pair]) > 0
    ]


def pattern(contexts: Iterable[Context]) -> str:
    """A regular expression (Oniguruma's) that matches the spaces to remove; "" for none."""
    rules = {
        f"(?<={left_side(before, left)})(?={right_side(right, after)})" for before, (left, right), after in contexts
    }
    return f" (?:{'|'.join(sorted(rules))})" if rules else ""


def left_side(before: str, left: str) -> str:
    neighbour = CLASSES.get(left, re.escape(left)) + " "
    at_start = f"^{neighbour}|" if before == MARK else ""  # an alternative, since a look-behind needs a fixed length
    return f"{at_start}{CLASSES[before]} {neighbour}" if before else neighbour


def right_side(right: str, after: str) -> str:
    neighbour = CLASSES.get(right, re.escape(right))
    at_end = f"{neighbour}$|" if after == MARK else ""
    return f"{at_end}{neighbour} {CLASSES[after]}" if after else neighbour
