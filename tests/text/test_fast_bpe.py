"""The tokenizer of Speech2Text2, from files in the published layout."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sedtrain.errors import UserError
from sedtrain.text.fast_bpe import Speech2Text2Tokenizer
from sedtrain.text.tokenizers import encode_target

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
WORDS = {  # a target language's text, and its tokens with these merges
    "de": ("Für Zürich", ["f@@", "ür", "zür@@", "i@@", "ch"]),
    "ca": ("l'avió és", ["l@@", "'@@", "a@@", "v@@", "i@@", "ó", "é@@", "s"]),
    "tr": ("ığdır  ç", ["ı@@", "ğ@@", "d@@", "ır", "ç"]),
    "ar": ("نعم\tلا", ["ن@@", "عم", "لا"]),
}
MERGES = "ü r</w> 12\nü r 11\nz ür 7\nc h</w> 5\nı r</w>\nع م</w>\nل ا</w>\n"


def tokenizer_of(folder, tokens, merges=MERGES, **options):
    vocabulary = {token: id for id, token in enumerate([*SPECIAL, *dict.fromkeys(tokens)])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    settings = {"tokenizer_class": "Speech2Text2Tokenizer", "do_lower_case": True, **options}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if merges is not None:
        (folder / "merges.txt").write_text(merges, encoding="utf-8")
    return Speech2Text2Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("language", WORDS)
def test_a_text_of_each_target_language_is_split_by_the_merges_and_comes_back_in_lower_case(language, tmp_path):
    text, tokens = WORDS[language]
    tokenizer = tokenizer_of(tmp_path, tokens)
    assert tokenizer.tokenize(text) == tokens
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert tokenizer.decode(ids) == " ".join(text.lower().split())
    assert encode_target(tokenizer, text, decoder_start_token_id=2) == [*ids, 2]
    assert tokenizer.batch_decode([[2, *ids, 2]]) == [f"</s> {tokenizer.decode(ids)} </s>"]
    assert tokenizer.batch_decode([[2, *ids, 2]], skip_special_tokens=True) == [tokenizer.decode(ids)]


def split_by_the_rule(word, merges):
    """The merges of fastBPE by regular expressions: the first pair of the list that the word has is joined, until none is."""
    symbols = " ".join([*word[:-1], word[-1] + "</w>"])
    while found := next((pair for pair in merges if re.search(rf"(?<!\S){re.escape(pair)}(?!\S)", symbols)), None):
        symbols = re.sub(rf"(?<!\S){re.escape(found)}(?!\S)", found.replace(" ", ""), symbols)
    return symbols.replace("</w>", "").replace(" ", "@@ ").split()


SYMBOLS = st.text("abc", min_size=1, max_size=3)
PAIRS = st.lists(st.builds("{} {}{}".format, SYMBOLS, SYMBOLS, st.sampled_from(["", "</w>"])), max_size=8, unique=True)


@given(merges=PAIRS, words=st.lists(st.text("abcABC", min_size=1, max_size=7), max_size=4), as_is=st.booleans())
def test_any_text_is_split_as_the_published_rule_says_and_comes_back(merges, words, as_is, tmp_path_factory):
    text = " ".join(words)
    expected = [token for word in words for token in split_by_the_rule(word if as_is else word.lower(), merges)]
    lines = "".join(f"{pair}\n" for pair in merges)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tokenizer_of(folder, expected, lines, do_lower_case=not as_is)
    assert tokenizer.tokenize(text) == expected
    assert tokenizer.decode(tokenizer(text).input_ids) == (text if as_is else text.lower())


def test_characters_without_a_token_are_unknown_and_ids_beyond_the_vocabulary_too(tmp_path):
    tokenizer = tokenizer_of(tmp_path, ["f@@", "ür"])
    assert tokenizer("für x").input_ids == [4, 5, 3]
    assert tokenizer.decode([4, 5, 99]) == "für <unk>"


def test_a_text_that_ends_within_a_word_has_no_mark_behind_it(tmp_path):
    assert tokenizer_of(tmp_path, ["f@@", "ür"]).decode([5, 4]) == "ür f"


def test_a_saved_tokenizer_writes_the_same_files_and_ids(tmp_path):
    tokenizer = tokenizer_of(tmp_path, WORDS["de"][1])
    tokenizer.add_tokens(["<de>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = Speech2Text2Tokenizer.from_pretrained(tmp_path / "saved")
    for name in ("vocab.json", "merges.txt"):
        before, after = ((folder / name).read_text(encoding="utf-8") for folder in (tmp_path, tmp_path / "saved"))
        assert json.loads(before) == json.loads(after) if name == "vocab.json" else re.sub(r" \d+", "", before) == after
    assert loaded("Zürich <de> für").input_ids == tokenizer("Zürich <de> für").input_ids == [6, 7, 8, 9, 4, 5]
    assert len(loaded) == len(tokenizer) == 10


def test_without_merges_it_decodes_and_refuses_to_encode(tmp_path):
    tokenizer = tokenizer_of(tmp_path, ["f@@", "ür"], merges=None)
    assert tokenizer.decode([4, 5]) == "für"
    with pytest.raises(UserError) as raised:
        tokenizer("für")
    [error] = raised.value.errors
    assert (error.option, error.value) == ("decoder.checkpoint", str(tmp_path))
    assert error.wrong == "its tokenizer has no merges.txt, so it decodes but cannot encode"
    assert error.write == "write decoder.checkpoint=FOLDER that has merges.txt beside vocab.json"


@pytest.mark.parametrize(
    ("vocabulary", "wrong"),
    [
        ("[]", "vocab.json is no object of tokens with their ids"),
        ("{}", "vocab.json is no object of tokens with their ids"),
        ('{"a": "1"}', "vocab.json gives 'a' the id '1'"),
        ('{"a": true}', "vocab.json gives 'a' the id 'True'"),
        ('{"a": -1}', "vocab.json gives 'a' the id '-1'"),
        ('{"a": 1000000000}', "vocab.json gives 'a' the id '1000000000'"),
        ('{"a": 1, "b": 1}', "vocab.json gives an id to two tokens"),
    ],
)
def test_a_vocabulary_that_is_none_is_refused(vocabulary, wrong, tmp_path):
    tokenizer_of(tmp_path, [])
    (tmp_path / "vocab.json").write_text(vocabulary)
    with pytest.raises(ValueError, match=f"^{re.escape(wrong)}$"):
        Speech2Text2Tokenizer.from_pretrained(tmp_path)


def test_merges_that_are_none_are_refused(tmp_path):
    wrong = r"^merges.txt has a line with one symbol, 'alone', instead of a pair$"
    with pytest.raises(ValueError, match=wrong):
        tokenizer_of(tmp_path, [], "a b\nalone\n")
