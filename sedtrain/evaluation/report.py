"""Writes report.html: scores, learning curves, errors and worst utterances of a run, on one page without links."""

import csv
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path

import numpy as np
from rapidfuzz.distance import Levenshtein

from sedtrain.evaluation import html
from sedtrain.evaluation.intervals import confidence_intervals
from sedtrain.evaluation.metrics import METRICS, MetricSet
from sedtrain.evaluation.results import Evaluation, Hypothesis, Results, percent
from sedtrain.run_dir import write_whole
from sedtrain.text.normalizers import Normalizer, normalizer

logger = logging.getLogger(__name__)

WordPair = tuple[str, str]  # reference word and hypothesis word; "" for none

KINDS = ("substitution", "deletion", "insertion")
NUM_WORST, NUM_CONFUSIONS, NUM_LENGTHS = 20, 12, 8


def write_report(
    path: Path,
    results: Results,
    evaluation: Evaluation,
    metrics_csv: Path | None,
    audio_of: Callable[[str], html.Audio] | None,
    model: str = "",
) -> None:
    """Writes one HTML file without links to anything outside it.

    metrics_csv: written by Lightning's CSVLogger; without this file the page has no curves
    audio_of:    audio by utterance id; called for the worst utterances only
    model:       encoder and decoder, for the title
    """
    normalize = normalizer(results.normalizer["name"])
    metric_set = MetricSet([name for name in evaluation.metrics if name in METRICS], normalize)
    ranking = metric_set.ranking()
    title = f"{model or 'Speech encoder-decoder'}: {results.task}"
    sections = [f"<h1>{escape(title)}</h1>", html.row(scores(results), facts(results))]
    if metrics_csv and metrics_csv.exists():
        sections.append(learning_curves(metrics_csv))
    if evaluation.hypotheses:
        pairs = [align(utterance, normalize) for utterance in evaluation.hypotheses]
        by_length = scores_by_length(ranking, metric_set, evaluation, pairs)
        values = metric_set.values(evaluation.counts)[ranking]
        sections += [
            html.row(by_length + errors_by_kind(pairs), frequent_errors(pairs)) if ranking == "wer" else by_length,
            worst_utterances(ranking, values, evaluation.hypotheses, pairs, audio_of),
        ]
    write_whole(path, html.page(title, "\n".join(sections)))


def align(utterance: Hypothesis, normalize: Normalizer) -> list[WordPair]:
    """The words in pairs, as the word error rate pairs them."""
    reference, hypothesis = normalize(utterance.reference).split(), normalize(utterance.hypothesis).split()
    return [
        pair
        for edit in Levenshtein.opcodes(reference, hypothesis)
        for pair in zip_longest(
            reference[edit.src_start : edit.src_end], hypothesis[edit.dest_start : edit.dest_end], fillvalue=""
        )
    ]


def kind(pair: WordPair) -> str:
    reference, hypothesis = pair
    if reference == hypothesis:
        return "hit"
    return "substitution" if reference and hypothesis else "deletion" if reference else "insertion"


def scores(results: Results) -> str:
    scored_as = f'<p class="quiet">{"<br>".join(map(escape, results.scored_as()))}</p>'
    return "<h2>Scores</h2>" + html.table(("metric", "value", results.interval_title), results.rows()) + scored_as


def facts(results: Results) -> str:
    train, cost, commit = results.train, "none", results.commit
    if train:
        audio = f"{train.audio_seconds_per_second:.0f} s of audio per second"
        steps = f"{train.steps:,} steps"
        steps += f" of {train.planned_steps:,}, ended by {train.ended_by}" if train.ended_by else ""
        cost = f"{train.seconds / 60:.1f} min, {steps}, {train.utterances:,} utterances, {audio}"
    facts = {
        "data": results.data,
        "split": results.split,
        "model": results.checkpoint or "of this run",
        "run folder": results.run_dir,
        "commit": f"{commit['id'][:12]}{', with changed files' if commit['dirty'] else ''}" if commit else "none",
        "sedtrain": results.versions.get("sedtrain") or "not installed",
        "utterances": f"{results.headline}, {results.audio_seconds / 60:.1f} min of audio",
        "training": cost,
        "decoding": ", ".join(f"{name} {value}" for name, value in results.decoding.items()),
        "RTFx": f"{results.rtfx:.1f} s of audio decoded per second",
        "skipped": ", ".join(f"{count:,} {reason}" for reason, count in results.skipped.items()) or "none",
    }
    versions = {name: version or "not installed" for name, version in results.versions.items()}
    folded = f"<details><summary>versions</summary>{html.definitions(versions)}</details>"
    return f"<h2>Facts</h2>{html.definitions(facts)}{folded}"


def learning_curves(metrics_csv: Path) -> str:
    try:
        curves = html.read_curves(metrics_csv)
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        logger.warning("%s is no table of metrics, and the page has no learning curves: %s", metrics_csv, error)
        return ""
    losses = {name: curve for name, curve in curves.items() if name.endswith("loss")}
    scores = {name: curve for name, curve in curves.items() if name.removeprefix("val/") in METRICS}
    figures = [html.curves_figure("Loss, nats per token", losses)] if losses else []
    figures += [html.curves_figure("Scores of the validation split", scores, percent=True)] if scores else []
    return f"<h2>Learning curves</h2>{html.row(*figures)}" if figures else ""


def scores_by_length(name: str, metric_set: MetricSet, evaluation: Evaluation, pairs: Sequence[list[WordPair]]) -> str:
    """Scores of utterances grouped by length, in groups of about equal size; "" where all have the same length."""
    lengths = np.array([sum(reference != "" for reference, _ in words) for words in pairs])
    longest = np.unique(np.quantile(lengths, np.linspace(0, 1, NUM_LENGTHS + 1)[1:], method="higher"))
    if len(longest) == 1:
        return ""
    groups = [np.flatnonzero(np.searchsorted(longest, lengths) == group).tolist() for group in range(len(longest))]
    speakers = [[evaluation.hypotheses[row].speaker for row in group] for group in groups]
    counts = [evaluation.counts[group] for group in groups]
    intervals = [confidence_intervals(metric_set, *of_group)[name] for of_group in zip(counts, speakers, strict=True)]
    labels = ["–".join(map(str, sorted({lengths[group].min(), lengths[group].max()}))) for group in groups]
    figure = html.bars_figure(f"with 95 % intervals, {evaluation.units}", labels, intervals, "words in the reference")
    return f"<h2>{METRICS[name].title} by length</h2>{figure}"


def errors_by_kind(pairs: Iterable[list[WordPair]]) -> str:
    counts = Counter(kind(pair) for words in pairs for pair in words)
    num_words = max(counts["hit"] + counts["substitution"] + counts["deletion"], 1)
    rows = [(f"{name}s", f"{counts[name]:,}", percent(counts[name] / num_words)) for name in KINDS]
    return "<h2>Errors by kind</h2>" + html.table(("kind", "words", "of the reference"), rows)


def frequent_errors(pairs: Iterable[list[WordPair]]) -> str:
    counts = Counter(pair for words in pairs for pair in words if kind(pair) != "hit")
    rows = [(pair[0] or "–", pair[1] or "–", f"{count:,}") for pair, count in counts.most_common(NUM_CONFUSIONS)]
    listed = html.table(("reference", "hypothesis", "times"), rows, num_texts=2)
    return f"<h2>Most frequent errors</h2>{listed}" if rows else ""


def worst_utterances(
    name: str,
    values: np.ndarray,
    hypotheses: Sequence[Hypothesis],
    pairs: Sequence[list[WordPair]],
    audio_of: Callable[[str], html.Audio] | None,
) -> str:
    """Utterances with the worst score, the longest first among equals; "" where no utterance has an error."""
    badness = 1 - values if METRICS[name].higher_is_better else values
    faulty = np.flatnonzero(badness > 0).tolist()
    worst = sorted(faulty, key=lambda index: (-badness[index], -len(pairs[index])))[:NUM_WORST]
    if not worst:
        return ""
    title, legend = METRICS[name].title, ""
    if name == "wer":
        keys = ", ".join(f'<span class="key {kind}">{kind}</span>' for kind in KINDS)
        legend = f'<p class="quiet">Words: {keys}</p>'
    articles = []
    for index in worst:
        utterance = hypotheses[index]
        score = f'<span class="quiet">{title} {percent(values[index])}</span>'
        sound = html.player(*audio_of(utterance.id)) if audio_of else ""
        texts = {"reference": utterance.reference, "hypothesis": utterance.hypothesis}
        words = aligned_words(pairs[index]) if name == "wer" else html.definitions(texts)
        articles.append(f"<article><header><b>{escape(utterance.id)}</b>{score}</header>{sound}{words}</article>")
    return f"<section><h2>The {len(worst)} worst utterances, by {title}</h2>{legend}{''.join(articles)}</section>"


def aligned_words(words: Iterable[WordPair]) -> str:
    """Reference words above hypothesis words, in pairs that wrap together."""
    columns = (
        f'<span class="pair {kind(pair)}"><span>{escape(pair[0])}</span><span>{escape(pair[1])}</span></span>'
        for pair in words
    )
    sides = '<div class="quiet"><span>reference</span><span>hypothesis</span></div>'
    return f'<div class="sides">{sides}<div class="words" dir="auto">{"".join(columns)}</div></div>'
