"""The bonus of hot words, token by token, against a count over the whole text."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sedtrain.decoding.fusion import word_beginnings
from sedtrain.decoding.hotwords import HotWords, tree_of
from sedtrain.errors import UserError
from sedtrain.text.tokenizers import train_tokenizer

TOKENIZERS = {
    "char": train_tokenizer(["abc"], "char", 10),
    "bpe": train_tokenizer(["ab abc bc cab"] * 5, "bpe", 30),
}
END = 2
WORD = st.text("ab", min_size=1, max_size=4)


def gains_of(tokenizer, words, text, num_given=1):
    """What each token of a text and its end adds to the scores."""
    begins = word_beginnings(tokenizer, len(tokenizer), torch.device("cpu"))
    scorer = HotWords(tree_of(tokenizer, tuple(words)), 1.0, begins, [END], num_given)
    ids = torch.tensor([[1] * num_given + tokenizer(text, add_special_tokens=False)["input_ids"] + [END]])
    scores = torch.zeros(1, len(tokenizer))
    return [scorer(ids[:, :place], scores)[0, ids[0, place]].item() for place in range(num_given, ids.shape[1])]


@given(st.sampled_from(sorted(TOKENIZERS)), st.lists(WORD, max_size=3), st.lists(WORD, min_size=1, max_size=5))
def test_a_whole_text_has_the_bonus_of_its_hot_words_alone(kind, words, written):
    tokenizer, text = TOKENIZERS[kind], " ".join(written)
    tokens = [len(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in written]
    with_space = [number + (kind == "char" and place > 0) for place, number in enumerate(tokens)]
    expected = sum(number for word, number in zip(written, with_space, strict=True) if word in words)
    assert sum(gains_of(tokenizer, words, text)) == expected


def test_a_word_that_is_left_gives_its_bonus_back():
    assert gains_of(TOKENIZERS["char"], ["abc"], "abb c") == [1, 1, -2, 1, -1, 0]


def test_a_word_within_another_gives_its_bonus_back():
    assert gains_of(TOKENIZERS["char"], ["ab"], "abc ab") == [1, 1, -2, 1, 1, 1, 0]


def test_a_term_of_several_words_keeps_the_bonus_of_the_shorter_one_in_it():
    assert gains_of(TOKENIZERS["char"], ["a", "a b c"], "a b b") == [1, 1, 1, 1, -3, 0]


def test_a_word_within_the_beginning_of_a_term_is_found_where_the_term_is_left():
    assert gains_of(TOKENIZERS["char"], ["a b c", "b"], "a b b") == [1, 1, 1, 1, 0, 0]
    assert sum(gains_of(TOKENIZERS["char"], ["a b c", "b c a"], "a b c a")) == 7
    assert sum(gains_of(TOKENIZERS["char"], ["a b c c", "b"], "a b c")) == 2


def test_a_prompt_is_no_part_of_the_text():
    assert gains_of(TOKENIZERS["bpe"], ["ab"], "ab", num_given=3) == gains_of(TOKENIZERS["bpe"], ["ab"], "ab")


def test_all_words_that_the_tokenizer_cannot_write_are_refused():
    with pytest.raises(UserError) as refused:
        tree_of(TOKENIZERS["char"], ("ab", "Ab", "", "b"))
    assert "the decoder's tokenizer cannot write 'Ab', ''" in str(refused.value)
