from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sedtrain.evaluation.metric_set import CorpusMetrics, MetricSet
from sedtrain.evaluation.metrics import TRANSCRIPTION
from sedtrain.text.coverage import VocabularyReport
from sedtrain.text.normalizers import normalizer
from sedtrain.text.tokenizers import train_tokenizer

KNOWN = "eno trw"
TOKENIZERS = {kind: train_tokenizer(["one two three", "two"], kind, 100) for kind in ("bpe", "char")}
BYTES = {each: number for number, each in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def byte_level():
    tokenizer = Tokenizer(models.BPE(BYTES, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def words(*known, normalizer=None):
    """A tokenizer of whole words, as WordPiece is for characters that it does not have."""
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(["<unk>", *known])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if normalizer:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(texts=st.lists(st.text(st.sampled_from(KNOWN + "ßÖ7\u2581"))))
def test_characters_that_the_training_texts_did_not_have_are_counted(kind, texts):
    report = VocabularyReport(TOKENIZERS[kind], texts)
    counts = Counter("".join(texts))
    assert report.unwritable == {each: counts[each] for each in "ßÖ7\u2581" if counts[each]}
    assert report.characters == {each: count for each, count in counts.items() if each != " "}
    assert report.num_texts == sum(bool(text.strip()) for text in texts)


def test_unknown_tokens_are_counted_among_all():
    report = VocabularyReport(TOKENIZERS["char"], ["one ß", "", "7two"])
    assert (report.num_tokens, report.num_unknown) == (len("one▁ß") + len("7two"), 2)


def test_words_that_are_unknown_for_all_their_known_characters_are_told():
    report = VocabularyReport(words("a", "b"), ["a b ab"])
    assert not report.unwritable and not report.finds_nothing
    assert str(report) == (
        "the tokenizer cannot write 0 of the 2 characters of 1 texts; 1 of 3 tokens are unknown (33.33%)"
    )


def test_a_report_reads_a_generator():
    assert VocabularyReport(TOKENIZERS["char"], (text for text in ["one", "ß"])).unwritable == {"ß": 1}


def test_a_composed_character_is_one_character():
    tokenizer = train_tokenizer(["Grüße"], "char", 100)
    assert VocabularyReport(tokenizer, ["Gru\u0308ße"]).finds_nothing


def test_a_tokenizer_of_bytes_writes_everything():
    report = VocabularyReport(byte_level(), ["ß नमस्ते 你好"])
    assert report.finds_nothing
    assert str(report) == "the tokenizer writes all 9 characters of 1 texts"


def test_a_character_that_a_tokenizer_leaves_out_is_not_written():
    report = VocabularyReport(words("a", "b", normalizer=normalizers.Replace("b", "")), ["a b", "b b"])
    assert report.unwritable == {"b": 3}
    assert report.num_unknown == 0


def test_the_most_frequent_are_shown_with_the_first_text_they_are_in():
    report = VocabularyReport(TOKENIZERS["char"], ["one", "two ß", "ßß 7", "7 3"] * 10)
    assert str(report).splitlines() == [
        "the tokenizer cannot write 3 of the 8 characters of 40 texts; 60 of 150 tokens are unknown (40.00%)",
        "  'ß' (U+00DF) 30 times as in 'two ß'",
        "  '7' (U+0037) 20 times as in 'ßß 7'",
        "  '3' (U+0033) 10 times as in '7 3'",
    ]


def test_of_many_characters_the_rest_is_summed_up():
    report = VocabularyReport(TOKENIZERS["char"], ["0123456789" * 2 + "abc"])
    *_, tenth, rest = str(report).splitlines()
    assert len(str(report).splitlines()) == 12
    assert tenth.startswith("  '9' (U+0039) 2 times as in ")
    assert rest == "  and 3 more, 3 times"


def test_the_text_shown_is_cut_around_the_character():
    line = str(VocabularyReport(TOKENIZERS["char"], ["one " * 50 + "ß" + " two" * 50])).splitlines()[1]
    assert line == f"  'ß' (U+00DF) 1 times as in {'one ' * 5 + 'ß' + (' two' * 5)[:19]!r}"


def test_what_the_normalizer_brings_in_is_named_with_the_text_it_came_from():
    tokenizer = train_tokenizer(["ONE TWO", "Three"], "char", 100)
    report = VocabularyReport(tokenizer, ["ONE TWO"], normalizer("lowercase"))
    assert set(report.unwritable) == {"o", "n", "t", "w"}
    assert "  'o' (U+006F) 2 times, added by the normalizer, as in 'ONE TWO'" in str(report).splitlines()


def test_texts_of_which_the_normalizer_leaves_nothing_are_counted():
    report = VocabularyReport(TOKENIZERS["char"], ["[laughs]", "", "one (inaudible)"], normalizer("whisper_basic"))
    assert report.num_emptied == 1 and not report.finds_nothing
    assert str(report).splitlines()[-1] == "  1 texts are empty after normalization for training"


# --- what comes back


def floors():
    return CorpusMetrics(MetricSet(TRANSCRIPTION))


def test_texts_that_come_back_as_others_are_told_with_the_score_that_a_perfect_model_has():
    tokenizer = words(
        "a", "cafe", "it", normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    )
    report = VocabularyReport(tokenizer, ["a café", "it it", "a cafe", "cafés a"], scores=floors())
    assert str(report).splitlines()[-3:] == [
        "  encoding and decoding changes 2 of 4 texts: no model scores better than WER 25.00% and CER 29.17% "
        "on all of them",
        "  'a café' comes back as 'a cafe'",
        "  'cafés a' comes back as 'a'",
    ]
    assert not report.finds_nothing


def test_texts_that_differ_only_in_what_the_normalizer_of_the_scores_removes_have_no_floor():
    report = VocabularyReport(TOKENIZERS["char"], ["One two", "two"], normalizer("lowercase"), floors())
    assert report.finds_nothing
    assert str(report).splitlines() == [
        "the tokenizer writes all 5 characters of 2 texts",
        "  encoding and decoding changes 1 of 2 texts: no model scores better than WER 0.00% and CER 0.00% "
        "on all of them",
        "  'One two' comes back as 'one two'",
    ]


def test_what_the_normalizer_of_training_changes_is_a_floor_too():
    report = VocabularyReport(TOKENIZERS["char"], ["one, two"], normalizer("whisper_basic"), floors())
    assert not report.finds_nothing
    assert "  'one, two' comes back as 'one two'" in str(report).splitlines()


def test_texts_that_come_back_are_not_mentioned_and_of_others_the_first_difference_is_shown():
    assert "\n" not in str(VocabularyReport(TOKENIZERS["char"], ["one two", " two  one"], scores=floors()))
    text = "one " * 20 + "ß" + " two" * 20
    last = str(VocabularyReport(TOKENIZERS["char"], [text], scores=floors())).splitlines()[-1]
    assert last == f"  {'one ' * 5 + 'ß' + (' two' * 5)[:19]!r} comes back as {'one ' * 5 + ' two' * 5!r}"
