"""Writes report.html: scores, learning curves, errors and worst utterances of a run, on one self-contained page."""

import csv
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from sedtrain.evaluation import html
from sedtrain.evaluation.attention_picture import MOST_SECONDS, Listening
from sedtrain.evaluation.groups import scores_by_group
from sedtrain.evaluation.metric_set import MetricSet
from sedtrain.evaluation.metrics import METRICS, word_pairs
from sedtrain.evaluation.results import Evaluation, Hypothesis, Results, percent
from sedtrain.text.normalizers import normalizer

logger = logging.getLogger(__name__)

WordPair = tuple[str, str]  # reference word and hypothesis word; "" for none

EDIT_KINDS = ("substitution", "deletion", "insertion")
NUM_WORST, NUM_CONFUSIONS = 20, 6  # utterances, and errors of each kind


def write_report(
    path: Path,
    results: Results,
    evaluation: Evaluation,
    metrics_csv: Path | None,
    audio_of: Callable[[str], html.Audio] | None,
    model: str = "",
    labels: Collection[str] = (),
    listen_to: Callable[[Hypothesis], Listening] | None = None,
) -> None:
    """Writes the page.

    metrics_csv: the run's metrics; without this file the page has no curves
    audio_of:    gives audio by utterance id; called for the worst utterances only
    labels:      names of the datasets of a mix, with which ids begin
    listen_to:   finds where the decoder listens while it writes a hypothesis; called for three utterances
    """
    normalize = normalizer(results.normalizer["name"])
    metric_set = MetricSet([name for name in evaluation.metrics if name in METRICS], normalize)
    ranking = metric_set.ranking()
    title = f"{model or 'Speech encoder-decoder'}: {results.task}"
    sections = [html.row(scores(results), facts(results))]
    if metrics_csv and metrics_csv.exists():
        sections.append(learning_curves(metrics_csv))
    if evaluation.hypotheses:
        pairs = [list(word_pairs(each.reference, each.hypothesis, normalize)) for each in evaluation.hypotheses]
        values = metric_set.values(evaluation.counts)[ranking]
        badness = 1 - values if METRICS[ranking].higher_is_better else values
        order = sorted(range(len(pairs)), key=lambda index: (-badness[index], -len(pairs[index])))
        worst = [index for index in order if badness[index] > 0][:NUM_WORST]
        num_words = [sum(reference != "" for reference, _ in words) for words in pairs]
        groups = scores_by_group(ranking, metric_set, evaluation, num_words, labels)
        sections += [
            html.row(*groups, *([word_errors(pairs)] if ranking == "wer" else [])),
            pictures([evaluation.hypotheses[index] for index in order], listen_to) if listen_to else "",
            worst_utterances(ranking, values, evaluation.hypotheses, pairs, audio_of, worst),
        ]
    html.write_page(path, title, sections)


def kind(pair: WordPair) -> str:
    reference, hypothesis = pair
    if reference == hypothesis:
        return "hit"
    return "substitution" if reference and hypothesis else "deletion" if reference else "insertion"


def scores(results: Results) -> str:
    scored_as = f'<p class="quiet">{"<br>".join(map(escape, results.scored_as()))}</p>'
    return html.headed("Scores", html.table(("metric", "value", results.interval_title), results.rows()), scored_as)


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
        "model": results.checkpoint or "trained in this run",
        "run folder": results.run_dir,
        "commit": f"{commit['id'][:12]}{', with changed files' if commit['dirty'] else ''}" if commit else "none",
        "sedtrain": results.versions.get("sedtrain") or "not installed",
        "utterances": f"{results.headline}, {results.audio_seconds / 60:.1f} min of audio",
        "training": cost,
        "decoding": ", ".join(
            f"{name} {value}" for name, value in results.decoding.items() if value not in (None, (), [])
        ),
        "RTFx": f"{results.rtfx:.1f} s of audio decoded per second",
        "skipped": ", ".join(f"{count:,} {reason}" for reason, count in results.skipped.items()) or "none",
    }
    versions = {name: version or "not installed" for name, version in results.versions.items()}
    return html.headed("Facts", html.definitions(facts), html.folded("versions", html.definitions(versions)))


def learning_curves(metrics_csv: Path) -> str:
    try:
        curves = html.read_curves(metrics_csv)
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        logger.warning("%s is no table of metrics, so the page has no learning curves: %s", metrics_csv, error)
        return ""
    figures = {
        "Cross-entropy without label smoothing, nats per token": ["train/cross_entropy", "val/loss"],
        "Losses of training, with any label smoothing, nats per token": ["train/loss", "train/ctc_loss"],
        "Scores of the validation split": [name for name in curves if name.removeprefix("val/") in METRICS],
    }
    drawn = [
        html.curves_figure(caption, found, percent=caption.startswith("Scores"))
        for caption, names in figures.items()
        if (found := {name: curves[name] for name in names if name in curves})
    ]
    return html.headed("Learning curves", html.row(*drawn)) if drawn else ""


def pictures(ranked: Sequence[Hypothesis], listen_to: Callable[[Hypothesis], Listening]) -> str:
    """Pictures of three utterances: the worst, and two from further down. Long ones and empty hypotheses are left out."""
    usable = [each for each in ranked if each.hypothesis and (each.seconds or 0) <= MOST_SECONDS]
    chosen = [usable[index] for index in sorted({len(usable) * part // 3 for part in range(3)})] if usable else []
    try:
        found = [(utterance.id, listen_to(utterance)) for utterance in chosen]
    except Exception as error:  # the page is worth writing even if a user's own decoder fails here
        logger.warning("the report has no picture of the attention: %s: %s", type(error).__name__, error)
        return ""
    if not found:
        return ""
    notes = ["shades: cross-attention of the decoder, mean of all layers and heads", "bars: where CTC hears the token"]
    if all(each.attention is None for _, each in found):
        notes[0] = "this decoder gives no attention weights"
    if all(each.spans is None for _, each in found):
        notes[1] = "without a CTC head there are no bars to compare them with"
    figures = [
        html.attention_figure(id, each.tokens, each.seconds, each.attention, each.spans)
        for id, each in found
        if each.tokens
    ]
    return html.headed("Where the decoder listens", html.quiet("; ".join(notes)), html.row(*figures))


def word_errors(pairs: Iterable[list[WordPair]]) -> str:
    """Numbers of errors by kind, and the most frequent errors of each kind."""
    counts = Counter(pair for words in pairs for pair in words)
    num_words = max(sum(count for (reference, _), count in counts.items() if reference), 1)
    kinds, frequent = [], []
    for name in EDIT_KINDS:
        errors = [(pair, count) for pair, count in counts.most_common() if kind(pair) == name]
        total = sum(count for _, count in errors)
        kinds.append((f"{name}s", f"{total:,}", percent(total / num_words)))
        frequent += [(name, *(word or "–" for word in pair), f"{count:,}") for pair, count in errors[:NUM_CONFUSIONS]]
    by_kind = html.headed("Errors by kind", html.table(("kind", "words", "of the reference"), kinds))
    listed = html.table(("kind", "reference", "hypothesis", "times"), frequent, num_texts=3)
    return by_kind + (html.headed("Most frequent errors", listed) if frequent else "")


def worst_utterances(
    name: str,
    values: np.ndarray,
    hypotheses: Sequence[Hypothesis],
    pairs: Sequence[list[WordPair]],
    audio_of: Callable[[str], html.Audio] | None,
    worst: Sequence[int],
) -> str:
    """The utterances of the rows `worst`, in this order; "" if there are none."""
    if not worst:
        return ""
    title, legend = METRICS[name].title, ""
    if name == "wer":
        keys = ", ".join(f'<span class="key {kind}">{kind}</span>' for kind in EDIT_KINDS)
        legend = f'<p class="quiet">Words: {keys}</p>'
    articles = []
    for index in worst:
        utterance = hypotheses[index]
        sound = html.player(*audio_of(utterance.id)) if audio_of else ""
        texts = {"reference": utterance.reference, "hypothesis": utterance.hypothesis}
        words = aligned_words(pairs[index]) if name == "wer" else html.definitions(texts)
        score = f"{title} {percent(values[index])}"
        articles.append(html.article(utterance.id, score, sound, words, other_texts(utterance)))
    return f"<section>{html.headed(f'The {len(worst)} worst utterances, by {title}', legend, *articles)}</section>"


def other_texts(utterance: Hypothesis) -> str:
    """All texts of an n-best search with their scores, folded; "" if there is only one."""
    if not utterance.others:
        return ""
    texts = [(utterance.hypothesis, utterance.score), *utterance.others]
    rows = [(text or "–", "none" if score is None else f"{score:.3f}") for text, score in texts]
    listed = html.table(("text", "score"), rows)
    return html.folded(f"{len(texts)}-best texts", html.wide(listed))


def aligned_words(words: Iterable[WordPair]) -> str:
    """Reference words above hypothesis words, in pairs that wrap together."""
    columns = (
        f'<span class="pair {kind(pair)}"><span>{escape(pair[0])}</span><span>{escape(pair[1])}</span></span>'
        for pair in words
    )
    sides = '<div class="quiet"><span>reference</span><span>hypothesis</span></div>'
    return f'<div class="sides">{sides}<div class="words" dir="auto">{"".join(columns)}</div></div>'
