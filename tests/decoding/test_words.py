"""The words of a decoded text have the tokens that write them, with every kind of tokenizer."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from sedtrain.decoding.alignment import words_in
from sedtrain.text.spacing import with_spacing
from sedtrain.text.tokenizers import train_tokenizer

TEXTS = [
    "it's the well-known man's idea, isn't it?",
    "eins zwei drei",
    "今天天气很好，我们去公园。",
    "wir kaufen 3,5 äpfel",
]
PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdefghijklmnopqrstuvwxyzä'-,?.0123456789今天气很好我们去公园，。",
]


def byte_level():
    """The tokenizer of GPT-2's kind, in which a character may be several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<unk>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    vocabulary = [*PIECES, *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyzä0123456789")]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    pieces = BertTokenizer.from_pretrained(folder, do_lower_case=False)
    return {
        "bpe": train_tokenizer(TEXTS, "bpe", 60),
        "char": train_tokenizer(TEXTS, "char", 60),
        "wordpiece": pieces,
        "spaced": with_spacing(pieces, TEXTS),
        "bytes": byte_level(),
    }


def found(tokenizer, text):
    """The decoded text, and its words with the texts of their tokens."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    words = list(words_in(tokenizer, ids, text))
    return text, [(word, tokenizer.decode(ids[first:last]).strip()) for word, first, last in words], words, len(ids)


@pytest.mark.parametrize("kind", ["bpe", "char", "wordpiece", "spaced", "bytes"])
@pytest.mark.parametrize("text", [TEXTS[0], TEXTS[1], TEXTS[3]])
def test_words_stand_between_spaces_and_their_tokens_write_them(tokenizers, kind, text):
    text, words, tokens, number = found(tokenizers[kind], text)
    assert [word for word, _ in words] == text.split()
    assert all("".join(word.split()) == "".join(written.split()) for word, written in words)
    ends = [0, *(last for _, _, last in tokens)]
    gaps = [first - end for (_, first, _), end in zip(tokens, ends, strict=False)]
    own = {"char": {1}, "bytes": {1}, "bpe": {0, 1}}  # tokens of a space, which belong to no word
    assert set(gaps[1:]) <= own.get(kind, {0})
    assert ends[-1] == number


@pytest.mark.parametrize("kind", ["char", "spaced", "bytes"])
def test_without_spaces_a_token_is_a_word_with_its_marks(tokenizers, kind):
    text, words, *_ = found(tokenizers[kind], TEXTS[2])
    assert text == TEXTS[2]
    assert [word for word, _ in words] == ["今", "天", "天", "气", "很", "好，", "我", "们", "去", "公", "园。"]
    assert all(written == word for word, written in words)


def test_a_token_that_is_not_shown_belongs_to_no_word(tokenizers):
    tokenizer = tokenizers["char"]
    ids = tokenizer("zwei", add_special_tokens=False)["input_ids"]
    assert list(words_in(tokenizer, [tokenizer.unk_token_id, *ids], "zwei")) == [("zwei", 1, 5)]
    assert list(words_in(tokenizer, [], "")) == []


@given(text=st.text("ab ä今天，。'-é\u0301", max_size=12))
@pytest.mark.parametrize("kind", ["char", "bytes", "bpe"])
def test_words_are_the_whole_text_in_order(tokenizers, kind, text):
    text, words, tokens, number = found(tokenizers[kind], text)
    assert "".join(word for word, _ in words) == "".join(text.split())
    assert all(0 <= first < last <= number for _, first, last in tokens)
    assert all(one[2] <= two[1] for one, two in pairwise(tokens))
