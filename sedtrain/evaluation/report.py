"""report.html: a run on one page that needs nothing else, with its scores, curves, errors and worst utterances."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path

import jiwer
import numpy as np

from sedtrain.evaluation.evaluate import Evaluation, Hypothesis
from sedtrain.evaluation.html import bars_figure, curves_figure, definitions, page, player, read_curves, row, table
from sedtrain.evaluation.intervals import Interval, bootstrap_intervals
from sedtrain.evaluation.metrics import METRICS, Counts, MetricSet
from sedtrain.evaluation.results import Results
from sedtrain.text.normalizers import Normalizer, collapse_whitespace, normalizer

AudioOf = Callable[[str], tuple[np.ndarray, int]]  # utterance id -> samples in -1..1, sampling rate
WordPair = tuple[str, str]  # reference word above hypothesis word, "" where one has none

KINDS = ("substitution", "deletion", "insertion")
NUM_WORST, NUM_CONFUSIONS, NUM_LENGTHS = 20, 12, 8
NAMES = {"wer": "WER", "cer": "CER", "bleu": "BLEU", "chrf": "chrF"}


def write_report(
    path: Path,
    results: Results,
    evaluation: Evaluation,
    metrics_csv: Path | None,
    audio_of: AudioOf | None,
    model: str = "",
) -> None:
    """Writes one HTML file without links to anything outside it.

    `metrics_csv` is what Lightning's CSVLogger wrote; without it, or where there is no such file, the page has no
    curves. `audio_of` is asked for the worst utterances only. `model` names encoder and decoder in the title.
    """
    normalize = normalizer(results.normalizer["name"])
    metric_set = MetricSet(list(evaluation.metrics), normalize)
    ranking = "wer" if "wer" in evaluation.metrics else "chrf"
    title = f"{model or 'Speech encoder-decoder'}: {results.task}"
    sections = [f"<h1>{escape(title)}</h1>", row(_scores(evaluation.metrics), _facts(results))]
    if metrics_csv and metrics_csv.exists():
        sections.append(_curves(metrics_csv))
    if evaluation.hypotheses:
        pairs = align(evaluation.hypotheses, normalize)
        by_length = _lengths(ranking, metric_set, evaluation.counts, pairs)
        values = metric_set.values(evaluation.counts)[ranking]
        sections += [
            row(by_length + _kinds(pairs), _confusions(pairs)) if ranking == "wer" else by_length,
            _worst(ranking, values, evaluation.hypotheses, pairs, audio_of),
        ]
    path.write_text(page(title, "\n".join(sections)), encoding="utf-8")


def align(hypotheses: Sequence[Hypothesis], normalize: Normalizer) -> list[list[WordPair]]:
    """The words of every utterance in pairs, as the word error rate pairs them; at least one utterance."""
    references = [collapse_whitespace(normalize(each.reference)) for each in hypotheses]
    words = jiwer.process_words(references, [collapse_whitespace(normalize(each.hypothesis)) for each in hypotheses])
    aligned = []
    for reference, hypothesis, chunks in zip(words.references, words.hypotheses, words.alignments, strict=True):
        sides = (
            (reference[c.ref_start_idx : c.ref_end_idx], hypothesis[c.hyp_start_idx : c.hyp_end_idx]) for c in chunks
        )
        aligned.append([pair for side in sides for pair in zip_longest(*side, fillvalue="")])
    return aligned


def kind(pair: WordPair) -> str:
    reference, hypothesis = pair
    if reference == hypothesis:
        return "hit"
    return "substitution" if reference and hypothesis else "deletion" if reference else "insertion"


def _scores(metrics: Mapping[str, Interval]) -> str:
    rows = [(NAMES[name], _percent(m.value), f"{100 * m.low:.2f} to {_percent(m.high)}") for name, m in metrics.items()]
    return "<h2>Scores</h2>" + table(("metric", "value", "95 % interval"), rows)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def _facts(results: Results) -> str:
    train = results.train
    facts = {
        "split": results.split,
        "utterances": f"{results.num_utterances:,}, {results.audio_seconds / 60:.1f} min of audio",
        "training": f"{train.seconds / 60:.1f} min, {train.steps:,} steps, {train.utterances:,} utterances, "
        f"{train.audio_seconds_per_second:.0f} s of audio per second"
        if train
        else "none",
        "decoding": ", ".join(f"{name} {value}" for name, value in results.decoding.items()),
        "RTFx": f"{results.rtfx:.1f} s of audio decoded per second",
        "normalizer": f"{results.normalizer['name']} {results.normalizer['version']}",
        "skipped": ", ".join(f"{count:,} {reason}" for reason, count in results.skipped.items()) or "none",
    }
    versions = {name: version or "not installed" for name, version in results.versions.items()}
    folded = f"<details><summary>versions</summary>{definitions(versions)}</details>"
    return f"<h2>Facts</h2>{definitions(facts)}{folded}"


def _curves(metrics_csv: Path) -> str:
    curves = read_curves(metrics_csv)
    losses = {name: curve for name, curve in curves.items() if name.endswith("loss")}
    scores = {name: curve for name, curve in curves.items() if name.removeprefix("val/") in METRICS}
    figures = [curves_figure("Loss, nats per token", losses)] if losses else []
    figures += [curves_figure("Scores of the validation split", scores, percent=True)] if scores else []
    return f"<h2>Learning curves</h2>{row(*figures)}" if figures else ""


def _lengths(name: str, metric_set: MetricSet, counts: Counts, pairs: Sequence[list[WordPair]]) -> str:
    """The score of short and of long utterances, in groups of about equal size; nothing where all have one length."""
    lengths = np.array([sum(reference != "" for reference, _ in words) for words in pairs])
    longest = np.unique(np.quantile(lengths, np.linspace(0, 1, NUM_LENGTHS + 1)[1:], method="higher"))
    if len(longest) == 1:
        return ""
    groups = [np.searchsorted(longest, lengths) == group for group in range(len(longest))]
    intervals = [bootstrap_intervals(metric_set, counts[group])[name] for group in groups]
    labels = ["–".join(map(str, sorted({lengths[group].min(), lengths[group].max()}))) for group in groups]
    figure = bars_figure("with 95 % intervals", labels, intervals, "words in the reference")
    return f"<h2>{NAMES[name]} by length</h2>{figure}"


def _kinds(pairs: Iterable[list[WordPair]]) -> str:
    counts = Counter(kind(pair) for words in pairs for pair in words)
    num_words = max(counts["hit"] + counts["substitution"] + counts["deletion"], 1)
    rows = [(f"{name}s", f"{counts[name]:,}", _percent(counts[name] / num_words)) for name in KINDS]
    return "<h2>Errors by kind</h2>" + table(("kind", "words", "of the reference"), rows)


def _confusions(pairs: Iterable[list[WordPair]]) -> str:
    counts = Counter(pair for words in pairs for pair in words if kind(pair) != "hit")
    rows = [(pair[0] or "–", pair[1] or "–", f"{count:,}") for pair, count in counts.most_common(NUM_CONFUSIONS)]
    listed = table(("reference", "hypothesis", "times"), rows, num_texts=2)
    return f"<h2>Most frequent errors</h2>{listed}" if rows else ""


def _worst(
    name: str,
    values: np.ndarray,
    hypotheses: Sequence[Hypothesis],
    pairs: Sequence[list[WordPair]],
    audio_of: AudioOf | None,
) -> str:
    """The utterances with the worst score, of equal ones the longest first; none that is without fault."""
    badness = 1 - values if METRICS[name].higher_is_better else values
    faulty = [index for index in range(len(values)) if badness[index] > 0]
    order = sorted(faulty, key=lambda index: (-badness[index], -len(pairs[index])))[:NUM_WORST]
    if not order:
        return ""
    key = ", ".join(f'<span class="key {each}">{each}</span>' for each in KINDS)
    articles = [
        f"<article><header><b>{escape(hypotheses[index].id)}</b>"
        f'<span class="quiet">{NAMES[name]} {_percent(values[index])}</span></header>'
        + (player(*audio_of(hypotheses[index].id)) if audio_of else "")
        + (_alignment(pairs[index]) if name == "wer" else _texts(hypotheses[index]))
        + "</article>"
        for index in order
    ]
    legend = f'<p class="quiet">Words: {key}</p>' if name == "wer" else ""
    return f"<section><h2>The {len(order)} worst utterances, by {NAMES[name]}</h2>{legend}{''.join(articles)}</section>"


def _alignment(words: Iterable[WordPair]) -> str:
    """Reference words above hypothesis words; on a narrow page the pairs wrap together."""
    columns = (
        f'<span class="pair {kind(pair)}"><span>{escape(pair[0])}</span><span>{escape(pair[1])}</span></span>'
        for pair in words
    )
    sides = '<div class="quiet"><span>reference</span><span>hypothesis</span></div>'
    return f'<div class="sides">{sides}<div class="words" dir="auto">{"".join(columns)}</div></div>'


def _texts(each: Hypothesis) -> str:
    return definitions({"reference": each.reference, "hypothesis": each.hypothesis})
