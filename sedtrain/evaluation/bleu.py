"""The tokenizer of BLEU: the one that publications use for the language of the texts, or `metrics.bleu.tokenize`."""

import re
from collections.abc import Iterable
from itertools import islice

from sedtrain.data.corpus import Corpus, pairs_of
from sedtrain.errors import UserError
from sedtrain.evaluation.metrics import MetricSet

OPTION = "metrics.bleu.tokenize"
BY_LANGUAGE = {
    **dict.fromkeys(("zh", "zho", "chi", "cmn", "yue", "chinese", "mandarin", "cantonese"), "zh"),
    **dict.fromkeys(("ja", "jpn", "japanese"), "ja-mecab"),
    **dict.fromkeys(("ko", "kor", "korean"), "ko-mecab"),
}
"""Tokenizers by the words of a language's name, such as `zh-CN`, `cmn_hans_cn` or `Mandarin Chinese`; others take 13a."""
PACKAGES = {"ja-mecab": "sacrebleu[ja]", "ko-mecab": "sacrebleu[ko]"}
EAST_ASIAN = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")  # kana, Chinese characters, Hangul
NUM_TEXTS = 1000  # of a split whose language nothing names


def bleu_tokenizer(tokenize: str, corpus: Corpus, splits: Iterable[str]) -> str:
    """The tokenizer for the texts of these splits; `tokenize` names it, or is `auto`.

    Raises UserError where nothing says the language of Chinese, Japanese or Korean texts, where languages need different
    tokenizers, and where a tokenizer's package is not installed.
    """
    languages = [(split, language) for split in dict.fromkeys(splits) for language, _ in pairs_of(corpus, split)]
    if tokenize == "auto":
        found = {tokenizer_of(corpus, split, language): language for split, language in languages}
        if len(found) > 1:
            names = " and ".join(f"{name} ({language or 'unnamed'})" for name, language in sorted(found.items()))
            wrong = f"the languages of the texts need different tokenizers: {names}"
            raise UserError(OPTION, tokenize, wrong, f"write {OPTION}=char, or score one language at a time")
        tokenize = next(iter(found), "13a")
    refuse_missing(tokenize)
    return tokenize


def tokenizer_of(corpus: Corpus, split: str, language: str | None) -> str:
    if language is not None:
        words = re.split("[^a-z]+", language.lower())
        return next((BY_LANGUAGE[word] for word in words if word in BY_LANGUAGE), "13a")
    letters = [letter for text in islice(corpus.texts(split), NUM_TEXTS) for letter in text if letter.isalpha()]
    if 2 * sum(map(bool, map(EAST_ASIAN.match, letters))) > len(letters):
        wrong = (
            "nothing says the language of the texts, which have no spaces between words: BLEU needs a tokenizer for it"
        )
        raise UserError("data.language", None, wrong, "write data.language=zh, ja or ko")
    return "13a"


def refuse_missing(tokenize: str) -> None:
    """Raises UserError where a tokenizer's package is not installed."""
    try:
        MetricSet(["bleu"], tokenize=tokenize).signatures()
    except (ImportError, RuntimeError) as error:
        write = f"pip install '{PACKAGES.get(tokenize, 'sacrebleu')}', or write {OPTION}=char"
        raise UserError(OPTION, tokenize, "the package of this tokenizer is not installed", write) from error
