"""The metrics of a run: the package's, with the tokenizer for BLEU that publications use for the language, and a user's own.

A user's own metric is a function, or a metric of Hugging Face `evaluate`.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any

from sedtrain.data.corpus import Corpus, pairs_of
from sedtrain.errors import UserError, one_line
from sedtrain.evaluation.metric_set import MetricSet, OwnMetric
from sedtrain.evaluation.metrics import METRICS
from sedtrain.text.normalizers import normalizer

OPTION = "metrics.bleu.tokenize"
BY_LANGUAGE = {
    **dict.fromkeys(("zh", "zho", "chi", "cmn", "yue", "chinese", "mandarin", "cantonese"), "zh"),
    **dict.fromkeys(("ja", "jpn", "japanese"), "ja-mecab"),
    **dict.fromkeys(("ko", "kor", "korean"), "ko-mecab"),
}
"""Tokenizers by a word in a language's name, such as `zh-CN`, `cmn_hans_cn` or `Mandarin Chinese`; other languages take 13a."""
PACKAGES = {"ja-mecab": "sacrebleu[ja]", "ko-mecab": "sacrebleu[ko]"}
EAST_ASIAN = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")  # kana, Chinese characters, Hangul
NUM_TEXTS = 1000  # texts of a split that are looked at if nothing names its language
TRIAL = ["two words"]


def metric_set(
    names: Sequence[str],
    normalizer_name: str,
    tokenize: str,
    corpus: Corpus,
    splits: Iterable[str],
    own: Sequence[OwnMetric] = (),
) -> MetricSet:
    """Metrics for these splits of a corpus. Raises UserError for an unknown normalizer, or no tokenizer for BLEU."""
    rewrites = any(METRICS[name].signature is None for name in names)
    tokenizer = bleu_tokenizer(tokenize, corpus, splits) if "bleu" in names else "13a"
    return MetricSet(names, normalizer(normalizer_name if rewrites else "none"), tokenizer, own)


# --- the tokenizer of BLEU


def bleu_tokenizer(tokenize: str, corpus: Corpus, splits: Iterable[str]) -> str:
    """The tokenizer for the texts of these splits; `tokenize` names it, or is `auto`.

    Raises UserError if Chinese, Japanese or Korean texts have no named language, if languages need different tokenizers, or
    if the tokenizer's package is not installed.
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
        wrong = "the texts have no spaces between words, and nothing names the language, whose tokenizer BLEU needs"
        raise UserError("data.language", None, wrong, "write data.language=zh, ja or ko")
    return "13a"


def refuse_missing(tokenize: str) -> None:
    """Raises UserError if the tokenizer's package is not installed."""
    try:
        MetricSet(["bleu"], tokenize=tokenize).signatures()
    except (ImportError, RuntimeError) as error:
        write = f"pip install '{PACKAGES.get(tokenize, 'sacrebleu')}', or write {OPTION}=char"
        raise UserError(OPTION, tokenize, "the package of this tokenizer is not installed", write) from error


# --- a user's own


def of_function(name: str, function: Callable[..., Any], signature: str, higher_is_better: bool | None) -> OwnMetric:
    """A metric from a function of references and hypotheses. Raises UserError if it fails on a pair of texts."""
    metric = OwnMetric(name, function, signature, higher_is_better)
    metric.value(TRIAL, TRIAL)
    return metric


def of_evaluate(name: str, evaluate: str, higher_is_better: bool | None, key: str | None, **options: Any) -> OwnMetric:
    """A metric of the package `evaluate`; its code is run.

    evaluate: a folder, or a name on the Hub that the command line has allowed
    key: name of the number to take, if it returns several
    options: options of its `compute`
    Raises UserError if it cannot be loaded or gives no number.
    """
    import evaluate as package

    folder = Path(evaluate).expanduser()
    try:
        loaded = package.load(str(folder) if folder.exists() else evaluate, keep_in_memory=True)
    except Exception as error:
        wrong = f"it cannot be loaded: {type(error).__name__}: {one_line(error, 300)}"
        write = "write the folder of a metric, whose script has the same name"
        raise UserError(f"metrics.{name}.evaluate", evaluate, wrong, write) from error

    def value(references: list[str], hypotheses: list[str]) -> float:
        found = loaded.compute(predictions=hypotheses, references=references, **options) or {}
        numbers = {each: number for each, number in found.items() if isinstance(number, Real)}
        only = list(numbers) if len(numbers) == 1 else []
        chosen = next((each for each in ([key] if key else [name, loaded.name, *only]) if each in numbers), None)
        if chosen is None:
            raise ValueError(f"it returns {sorted(found)}: write +metrics.{name}.key=NAME of a number among them")
        return float(numbers[chosen])

    return of_function(name, value, f"evaluate {version('evaluate')}: {evaluate}", higher_is_better)
