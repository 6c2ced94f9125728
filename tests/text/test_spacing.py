"""What a WordPiece tokenizer encodes comes back as it was written, as far as its tokens tell."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    BertTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

from sedtrain.text.spacing import is_unspaced, with_spacing
from sedtrain.text.tokenizers import encode_target, start_end_pad, train_tokenizer

LETTERS, MARKS, HAN = "abcdefghijklmnopqrstuvwxyz", "'-.,!?:;\"()/%$&", "今天气很好我们去公园"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [
    *LETTERS,
    *MARKS,
    *HAN,
    "，",
    "。",
    *"0123456789",
    "は",
    "い",
    "、",
    *(f"##{each}" for each in LETTERS + "0123456789はい"),
]
ENGLISH = [
    "it's the well-known man's idea, isn't it?",
    "yes (he said so): 3.5 of 1,000, or 99%!",
    'at 10:30 he said: "no", and left; she & i did too.',
    "and/or",
]
FRENCH = ["l'homme dit : quoi ? non !", "c'est aujourd'hui , dit-il"]
CHINESE = ["今天天气很好，我们去公园。", "我们很好。", "今天气is好", "我们去ab公园"]
JAPANESE = ["今天は好い。", "公は去い、好い"]  # without the marks of voiced kana, which an uncased BERT drops


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *PIECES]) + "\n", encoding="utf-8")
    return BertTokenizer.from_pretrained(folder, do_lower_case=True)


def back(tokenizer, text):
    return tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)


def bare(text):
    return "".join(text.split())


@pytest.mark.parametrize("texts", [ENGLISH, FRENCH, CHINESE, JAPANESE])
def test_texts_of_a_language_come_back_as_they_are_written(tokenizer, texts):
    spaced = with_spacing(tokenizer, texts)
    assert [back(spaced, text) for text in texts] == texts
    assert any(back(tokenizer, text) != text for text in texts)


def test_one_text_keeps_its_spaces_around_a_hyphen_and_another_language_has_none(tokenizer):
    assert back(with_spacing(tokenizer, ["a - b", "c - d"]), "e - f") == "e - f"
    assert back(with_spacing(tokenizer, ["a-b", "c-d"]), "e-f") == "e-f"


words = st.text(st.sampled_from(LETTERS), min_size=1, max_size=4)
hyphenated = st.lists(words, min_size=1, max_size=3).map("-".join)
possessive = st.tuples(hyphenated, st.sampled_from(["", "'s", "'"])).map(lambda pair: pair[0] + pair[1].rstrip("'"))
bracketed = st.lists(possessive, min_size=1, max_size=3).map(lambda some: f"({' '.join(some)})")
phrases = st.lists(possessive | bracketed, min_size=1, max_size=5).map(" ".join)
sentences = st.tuples(st.lists(phrases, min_size=1, max_size=3).map(", ".join), st.sampled_from(".!?")).map("".join)


@given(texts=st.lists(sentences, min_size=1, max_size=6))
@settings(max_examples=50)
def test_a_text_whose_spaces_follow_rules_comes_back(tokenizer, texts):
    spaced = with_spacing(tokenizer, texts)
    assert [back(spaced, text) for text in texts] == texts


@given(texts=st.lists(st.text(st.sampled_from(LETTERS[:4] + MARKS + HAN[:3] + "は1 é\t"), max_size=12), max_size=5))
@settings(max_examples=150)
def test_no_character_is_lost_and_spaces_are_wrong_less_often_than_with_one_at_each_boundary(tokenizer, texts):
    spaced = with_spacing(tokenizer, texts)
    num_wrong, num_apart = 0, 0
    for text in texts:
        plain = unicodedata.normalize("NFD", " ".join(text.split())).replace("\u0301", "")  # which the vocabulary lacks
        decoded = back(spaced, text)
        assert bare(decoded) == bare(plain)
        num_wrong += Levenshtein.distance(decoded, plain)
        num_apart += Levenshtein.distance(" ".join(back(with_spacing(tokenizer, []), text).split()), plain)
    assert num_wrong <= num_apart


def test_a_saved_tokenizer_decodes_alike_in_stock_transformers_and_encodes_the_same_targets(tokenizer, tmp_path):
    spaced = with_spacing(tokenizer, ENGLISH)
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), spaced).save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path).tokenizer):
        assert [back(loaded, text) for text in ENGLISH] == ENGLISH
        assert start_end_pad(loaded) == start_end_pad(spaced) == start_end_pad(tokenizer)
        assert loaded.all_special_ids == tokenizer.all_special_ids and len(loaded) == len(tokenizer)
    start, _, _ = start_end_pad(tokenizer)
    for text in ENGLISH:
        assert encode_target(spaced, text, start) == encode_target(tokenizer, text, start)


def test_spaces_are_learnt_anew_from_the_texts_of_the_next_training(tokenizer, tmp_path):
    with_spacing(tokenizer, ENGLISH).save_pretrained(tmp_path)
    again = with_spacing(AutoTokenizer.from_pretrained(tmp_path), FRENCH)
    assert [back(again, text) for text in FRENCH] == FRENCH
    plain = with_spacing(with_spacing(tokenizer, []), FRENCH)
    assert [back(plain, text) for text in FRENCH] == FRENCH


def test_what_was_set_for_a_tokenizer_stays_set(tokenizer, tmp_path):
    settings = {
        "padding_side": "left",
        "truncation_side": "left",
        "model_max_length": 77,
        "chat_template": "{{messages}}",
    }
    tokenizer = BertTokenizer(
        tokenizer.get_vocab(), extra_special_tokens=["<x>"], split_special_tokens=True, **settings
    )
    tokenizer.add_tokens(["abc"])
    spaced = with_spacing(tokenizer, ENGLISH)
    spaced.save_pretrained(tmp_path)
    for each in (spaced, AutoTokenizer.from_pretrained(tmp_path)):
        assert {name: getattr(each, name) for name in settings} == settings
        assert each.all_special_tokens == tokenizer.all_special_tokens and each.split_special_tokens
        assert each("a abc", padding="max_length")["input_ids"] == tokenizer("a abc", padding="max_length")["input_ids"]


def test_a_word_that_is_unknown_joins_no_others(tokenizer):
    assert back(with_spacing(tokenizer, ["aßb", "aßb"]), "a b") == "a b"


def test_another_tokenizer_stays_itself_and_cleans_nothing_up():
    tokenizer = train_tokenizer(["one , two"], "char", 100)
    tokenizer.clean_up_tokenization_spaces = True
    assert with_spacing(tokenizer, ["one , two"]) is tokenizer
    assert back(tokenizer, "one , two") == "one , two"


@pytest.mark.parametrize(
    ("text", "unspaced"),
    [
        ("今天天气很好", True), ("今天 天气 ok", True), ("きょうはいい天気です", True),
        ("สวัสดีครับ", True), ("ສະບາຍດີ", True), ("សួស្តី", True),
        ("안녕하세요 여러분", False), ("it's fine", False), ("नमस्ते दुनिया", False),
        ("the word 我", False), ("", False), ("123 !", False),
    ],
)  # fmt: skip
def test_languages_without_spaces_between_words_are_known(text, unspaced):
    assert is_unspaced([text]) is unspaced
