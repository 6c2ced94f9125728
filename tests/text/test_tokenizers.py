import json
import subprocess
import sys
import unicodedata
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sedtrain.errors import UserError
from sedtrain.text.normalizers import normalizer
from sedtrain.text.tokenizers import encode_target, start_end_pad, train_tokenizer

DIGITS = ["three one four", "one five nine two", "six five three five", "eight nine seven zero"] * 3
MULTILINGUAL = [
    "Grüße, wie geht's?",
    "C'est déjà fini !",
    "你好世界。",
    "नमस्ते दुनिया",
    "a <s> b </s> <pad> c",
] * 2
KINDS = ["bpe", "char"]
TOKENIZERS = {kind: train_tokenizer(MULTILINGUAL, kind, 300) for kind in KINDS}

seen_characters = sorted(set("".join(MULTILINGUAL)))


def ids_without_end(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.sampled_from(seen_characters)))
@settings(max_examples=100, deadline=None)
def test_decoding_gives_back_the_text_up_to_white_space(kind, text):
    tokenizer = TOKENIZERS[kind]
    composed = " ".join(unicodedata.normalize("NFC", text).split())
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == composed


@pytest.mark.parametrize("name", ["none", "lowercase", "whisper_basic"])
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=50)
def test_a_tokenizer_of_normalized_texts_gives_back_a_normalized_text(kind, name, data):
    rewrite = normalizer(name)
    tokenizer = train_tokenizer(map(rewrite, [*MULTILINGUAL, *seen_characters]), kind, 300)
    text = rewrite(data.draw(st.text(st.sampled_from(seen_characters))))
    target = encode_target(tokenizer, text, tokenizer.bos_token_id)
    assert tokenizer.decode(target, skip_special_tokens=True) == " ".join(unicodedata.normalize("NFC", text).split())


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_have_the_first_four_ids(kind):
    tokenizer = train_tokenizer(DIGITS, kind, 100)
    assert tokenizer.convert_ids_to_tokens(range(4)) == ["<pad>", "<s>", "</s>", "<unk>"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.unk_token_id == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_ends_with_the_end_token_and_has_no_start_token(kind):
    ids = train_tokenizer(DIGITS, kind, 100)("three one")["input_ids"]
    assert ids[-1] == 2 and ids.count(2) == 1 and 1 not in ids


def test_of_few_words_each_becomes_one_token():
    tokenizer = train_tokenizer(DIGITS, "bpe", 200)
    assert all(len(ids_without_end(tokenizer, text)) == len(text.split()) for text in DIGITS)


def test_a_word_keeps_its_token_before_punctuation():
    tokenizer = train_tokenizer(["one, two!", "two, one."] * 3, "bpe", 100)
    assert tokenizer.tokenize("one, one! one.") == ["▁one", ",", "▁one", "!", "▁one", "."]


def test_characters_are_one_token_each():
    tokenizer = train_tokenizer(DIGITS, "char", 100)
    assert tokenizer.tokenize("three one") == [*"three", "▁", *"one"]
    assert len(tokenizer) == len(set("".join(DIGITS)) - {" "}) + len(["▁"]) + 4


def test_words_can_be_told_apart_after_training_on_single_words():
    tokenizer = train_tokenizer(["one", "two"], "char", 100)
    assert tokenizer.decode(ids_without_end(tokenizer, "one two")) == "one two"


def test_case_is_kept_and_canonical_spellings_are_one():
    tokenizer = TOKENIZERS["bpe"]
    assert ids_without_end(tokenizer, "Gru\u0308ße") == ids_without_end(tokenizer, "Grüße")
    assert tokenizer.decode(ids_without_end(tokenizer, "Grüße")) == "Grüße"


def test_a_special_token_spelled_out_in_a_text_is_text():
    ids = TOKENIZERS["bpe"]("a </s> b")["input_ids"]
    assert ids.count(2) == 1 and ids[-1] == 2


def test_the_vocabulary_stays_within_its_size():
    assert len(train_tokenizer(DIGITS, "bpe", 40)) == 40


def test_another_order_of_texts_trains_the_same_tokenizer():
    first, second = (train_tokenizer(texts, "bpe", 60) for texts in (DIGITS, DIGITS[::-1]))
    assert first.get_vocab() == second.get_vocab()


def test_a_saved_tokenizer_loads_in_a_fresh_process_with_the_same_ids(tmp_path):
    TOKENIZERS["bpe"].save_pretrained(tmp_path)
    script = (
        "import json, sys; from transformers import AutoTokenizer;"
        "print(json.dumps(AutoTokenizer.from_pretrained(sys.argv[1])(json.loads(sys.argv[2]))['input_ids']))"
    )
    command = [sys.executable, "-c", script, str(tmp_path), json.dumps(MULTILINGUAL)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert json.loads(printed) == TOKENIZERS["bpe"](MULTILINGUAL)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_loads_with_the_same_behaviour(tmp_path, kind):
    tokenizer = TOKENIZERS[kind]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert dict(loaded(MULTILINGUAL)) == dict(tokenizer(MULTILINGUAL))  # and no token_type_ids
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    text = "C'est déjà fini !"
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text


class Streamed(str):
    """A text of which it is known when it is let go."""


class Stream:
    """`length` texts one after the other; how many were read, and how many of them were alive at once."""

    def __init__(self, length):
        self.length, self.read, self.alive, self.most_alive = length, 0, 0, 0

    def __iter__(self):
        for number in range(self.length):
            text = Streamed(DIGITS[number % len(DIGITS)])
            weakref.finalize(text, self.let_go)
            self.read, self.alive = self.read + 1, self.alive + 1
            self.most_alive = max(self.most_alive, self.alive)
            yield text

    def let_go(self):
        self.alive -= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_read_once_and_never_held(kind):
    stream = Stream(5000)
    tokenizer = train_tokenizer(stream, kind, 100)
    assert stream.read == 5000
    assert stream.most_alive < 10
    assert (
        tokenizer.get_vocab() == train_tokenizer([DIGITS[i % len(DIGITS)] for i in range(5000)], kind, 100).get_vocab()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_texts_are_read_than_are_asked_for(kind):
    stream = Stream(5000)
    tokenizer = train_tokenizer(stream, kind, 100, max_texts=2)
    assert stream.read == 2
    assert tokenizer.get_vocab() == train_tokenizer(DIGITS[:2], kind, 100).get_vocab()


@pytest.mark.parametrize("texts", [[], ["", " \n"]])
@pytest.mark.parametrize("kind", KINDS)
def test_training_on_nothing_is_refused(texts, kind):
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        train_tokenizer(iter(texts), kind, 100)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_smaller_than_the_characters_is_refused_with_both_numbers(kind):
    with pytest.raises(UserError) as error:
        train_tokenizer(["abcdefghijklmnopqrstuvwxyz"], kind, 20)
    assert str(error.value) == (
        "1 problem:\n\n  tokenizer.vocab_size = 20\n    the characters of the texts alone need 31 tokens\n"
        "    write tokenizer.vocab_size=31 or more"
    )


def word_tokenizer(words, template=None, **special_tokens):
    """A tokenizer of whole words; `template` is what its family writes around a text."""
    vocab = {token: id for id, token in enumerate([*dict.fromkeys(special_tokens.values()), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=special_tokens.get("unk_token")))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        around = [(token, vocab[token]) for token in template.split() if token != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


BERT_LIKE = word_tokenizer(
    ["a", "b"], "[CLS] $A [SEP]", pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
)
GPT2_LIKE = word_tokenizer(["a", "b"], bos_token="<end>", eos_token="<end>", unk_token="<end>")
BART_LIKE = word_tokenizer(
    ["a", "b"], "<s> $A </s>", bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
)
MBART_LIKE = word_tokenizer(
    ["a", "b"], "$A </s> en_XX", pad_token="<pad>", eos_token="</s>", unk_token="<unk>", cls_token="en_XX"
)
OPT_LIKE = word_tokenizer(["a", "b"], "</s> $A", bos_token="</s>", eos_token="</s>", pad_token="<pad>")


@pytest.mark.parametrize("text", ["", "a", "a b"])
@pytest.mark.parametrize(
    ("tokenizer", "start", "labels"),
    [
        (BERT_LIKE, "[CLS]", "{} [SEP]"),
        (GPT2_LIKE, "<end>", "{} <end>"),
        (BART_LIKE, "</s>", "<s> {} </s>"),
        (BART_LIKE, "<s>", "{} </s>"),
        (MBART_LIKE, "en_XX", "{} </s>"),
        (OPT_LIKE, "</s>", "{} </s>"),
        (TOKENIZERS["char"], "<s>", "{} </s>"),
    ],
)
def test_targets_drop_the_start_token_and_have_one_end_token(tokenizer, start, labels, text):
    ids = encode_target(tokenizer, text, tokenizer.convert_tokens_to_ids(start))
    tokens = [token for token in tokenizer.convert_ids_to_tokens(ids) if token != "▁"]
    assert tokens == labels.format(text).split()


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (BERT_LIKE, ["[CLS]", "[SEP]", "[PAD]"]),
        (GPT2_LIKE, ["<end>", "<end>", "<end>"]),
        (BART_LIKE, ["<s>", "</s>", "<pad>"]),
        (MBART_LIKE, ["en_XX", "</s>", "<pad>"]),
        (TOKENIZERS["bpe"], ["<s>", "</s>", "<pad>"]),
    ],
)
def test_start_end_and_pad_follow_the_tokenizer(tokenizer, expected):
    assert tokenizer.convert_ids_to_tokens(start_end_pad(tokenizer)) == expected


def test_an_id_of_zero_is_an_id():
    assert start_end_pad(GPT2_LIKE) == (0, 0, 0)


def test_a_tokenizer_without_end_token_is_refused():
    with pytest.raises(UserError, match="has no end token") as error:
        start_end_pad(word_tokenizer(["a"], bos_token="<s>", unk_token="<unk>"))
    assert error.value.option == "decoder.checkpoint" and "eos_token" in error.value.write
