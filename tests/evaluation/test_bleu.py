"""BLEU and chrF of texts as they are, with the tokenizer of their language: the numbers of sacrebleu called directly."""

import sys

import pytest
from corpora import data_module, refused, write
from sacrebleu.metrics import BLEU, CHRF

from sedtrain.evaluation.metric_set import CorpusMetrics, MetricSet
from sedtrain.evaluation.metrics_of_run import metric_set
from sedtrain.text.normalizers import normalizer

GERMAN = (
    ["Der Hund läuft im Park.", "Die Katze schläft auf dem Sofa.", "Das Auto ist neu."],
    ["der Hund läuft im Park.", "die katze schläft auf dem Sofa .", "das Auto ist neu."],
)
CHINESE = (["我今天去北京看望我的朋友。", "天气非常好。"], ["我今天去上海看望我的朋友。", "天气很好。"])


def scores(metrics, references, hypotheses):
    corpus = CorpusMetrics(metrics)
    corpus.update(references, hypotheses)
    return {name: 100 * value for name, value in corpus.compute().items()}


def corpus_of(folder, texts, **options):
    write(folder / "test.parquet", [0.5] * len(texts), translation=texts)
    return data_module(folder, target="translation", **options).corpus


def chosen(folder, texts, tokenize="auto", **options):
    return metric_set(["bleu", "chrf"], "lowercase", tokenize, corpus_of(folder, texts, **options), ["test"])


@pytest.mark.parametrize(("texts", "language", "tokenize"), [(GERMAN, "de", "13a"), (CHINESE, "zh", "zh")])
def test_a_translation_is_scored_as_sacrebleu_scores_it(tmp_path, texts, language, tokenize):
    references, hypotheses = texts
    metrics = chosen(tmp_path, references, language=language)
    found = scores(metrics, references, hypotheses)
    for name, direct in (("bleu", BLEU(tokenize=tokenize)), ("chrf", CHRF())):
        assert found[name] == pytest.approx(direct.corpus_score(hypotheses, [references]).score)
        assert metrics.signatures()[name] == str(direct.get_signature())


def test_a_wrong_case_costs_and_chinese_is_no_single_word(tmp_path):
    references, hypotheses = GERMAN
    assert scores(chosen(tmp_path, references), references, references)["bleu"] == 100
    assert scores(chosen(tmp_path, references), references, hypotheses)["bleu"] < 70
    references, hypotheses = CHINESE
    assert scores(chosen(tmp_path, references, language="zh"), references, hypotheses)["bleu"] > 40
    assert scores(chosen(tmp_path, references, language="zh", tokenize="13a"), references, hypotheses)["bleu"] < 5


def test_a_normalizer_rewrites_the_texts_of_error_rates_alone():
    found = scores(
        MetricSet(["wer", "bleu"], normalizer("lowercase")), ["Der  Hund läuft heim"], ["der hund läuft heim"]
    )
    assert found["wer"] == 0
    assert found["bleu"] == pytest.approx(
        BLEU().corpus_score(["der hund läuft heim"], [["Der  Hund läuft heim"]]).score
    )


@pytest.mark.parametrize(
    ("language", "tokenize"),
    [
        ("zh-CN", "zh"),
        ("cmn_hans_cn", "zh"),
        ("Mandarin Chinese", "zh"),
        ("de", "13a"),
        ("fr_fr", "13a"),
        (None, "13a"),
    ],
)
def test_the_tokenizer_is_that_of_the_language(tmp_path, language, tokenize):
    signature = chosen(tmp_path, GERMAN[0], language=language).signatures()["bleu"]
    assert f"|tok:{tokenize}|" in signature and signature.startswith("nrefs:1|case:mixed|")


def test_an_option_names_another_tokenizer(tmp_path):
    assert "|tok:char|" in chosen(tmp_path, CHINESE[0], "char").signatures()["bleu"]


@pytest.mark.parametrize(("language", "tokenize", "extra"), [("ja", "ja-mecab", "ja"), ("ko_kr", "ko-mecab", "ko")])
def test_a_tokenizer_that_is_not_installed_is_refused_with_its_package(
    tmp_path, monkeypatch, language, tokenize, extra
):
    for name in ("MeCab", "mecab_ko"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("ja_mecab", "ko_mecab"):
        monkeypatch.delitem(sys.modules, f"sacrebleu.tokenizers.tokenizer_{name}", raising=False)
    assert refused(chosen, tmp_path, ["あ"], language=language) == (
        f"1 problem:\n\n  metrics.bleu.tokenize = '{tokenize}'\n"
        "    the package of this tokenizer is not installed\n"
        f"    pip install 'sacrebleu[{extra}]', or write metrics.bleu.tokenize=char"
    )


def test_chinese_whose_language_nothing_names_is_refused(tmp_path):
    assert refused(chosen, tmp_path, CHINESE[0]) == (
        "1 problem:\n\n  data.language = null\n"
        "    the texts have no spaces between words, and nothing names the language, whose tokenizer BLEU needs\n"
        "    write data.language=zh, ja or ko"
    )


def test_languages_that_need_different_tokenizers_are_refused(tmp_path):
    write(tmp_path / "test.parquet", [0.5, 0.5], translation=["Der Hund", "天气"], language=["de", "zh"])
    columns = {"audio": "audio", "translation": "translation", "language": "language"}
    data = data_module(tmp_path, columns=columns, target="translation")
    message = refused(metric_set, ["bleu"], "none", "auto", data.corpus, ["test"])
    assert "the languages of the texts need different tokenizers: 13a (de) and zh (zh)" in message
    assert "write metrics.bleu.tokenize=char, or score one language at a time" in message
