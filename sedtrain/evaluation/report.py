"""report.html: a run on one page that needs nothing else, with its scores, curves, errors and worst utterances."""

import base64
import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path

import jiwer
import matplotlib
import numpy as np
import soundfile
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sedtrain.evaluation.evaluate import Evaluation, Hypothesis
from sedtrain.evaluation.intervals import Interval, bootstrap_intervals
from sedtrain.evaluation.metrics import METRICS, Counts, MetricSet
from sedtrain.evaluation.normalisers import Normaliser, normaliser
from sedtrain.evaluation.results import Results

AudioOf = Callable[[str], tuple[np.ndarray, int]]  # utterance id -> samples in -1..1, sampling rate
WordPair = tuple[str, str]  # reference word above hypothesis word, "" where one has none
Curves = dict[str, tuple[list[int], list[float]]]  # metric -> steps, values

KINDS = ("substitution", "deletion", "insertion")
NO_WORD = "–"
NUM_WORST, NUM_CONFUSIONS, NUM_LENGTHS = 20, 15, 8
NAMES = {"wer": "WER", "cer": "CER", "bleu": "BLEU", "chrf": "chrF"}
INK = "#010203"  # stands for the page's text colour, which follows the reader's theme
FIGURE_STYLE = {
    **dict.fromkeys(
        ["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"], INK
    ),
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.15},
    **{"legend.frameon": False, "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "report"},
    # Okabe and Ito's blue, vermilion and green: told apart by all readers, 3:1 against white and against black
    "axes.prop_cycle": matplotlib.cycler(color=["#0072B2", "#D55E00", "#009E73"], linestyle=["-", "--", ":"]),
}
STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1b1f24; --quiet: #59636e; --line: #d5dae0;
  --sub: #7a4d00; --sub-ground: #fff1c2; --del: #a40e26; --del-ground: #ffe3e0; --ins: #0a4a9e; --ins-ground: #dcebff; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --ink: #e3e7eb; --quiet: #9aa4af; --line: #343a42;
  --sub: #f2cc60; --sub-ground: #3b2e05; --del: #ffaaa3; --del-ground: #4a1619; --ins: #8cc5ff; --ins-ground: #10304f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
.quiet, dt, th, figcaption, summary { color: var(--quiet); font-size: .875rem; font-weight: 400; } p { margin: .25rem 0; }
table { border-collapse: collapse; } th, td { padding: .25rem 1.25rem .25rem 0; border-bottom: 1px solid var(--line); }
th, td { text-align: left; vertical-align: top; } .number { text-align: right; white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.25rem; margin: .5rem 0; } dd { margin: 0; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: .5rem 2rem; }
figure { margin: .5rem 0; max-width: 30rem; } svg { width: 100%; height: auto; } svg text { font-family: inherit !important; }
article { border-top: 1px solid var(--line); padding: .75rem 0; }
article header { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; }
audio { display: block; width: 100%; max-width: 24rem; height: 2.25rem; margin: .4rem 0; }
.sides { display: grid; grid-template-columns: max-content 1fr; gap: 0 .9rem; } .words { display: flex; flex-wrap: wrap; gap: .3rem .1rem; }
.pair span, .sides > .quiet span { display: block; min-height: 1.5rem; line-height: 1.5rem; }
.pair span { padding: 0 .25rem; } .pair, .key { border-radius: .2rem; } .key { padding: .1rem .3rem; }
.substitution { color: var(--sub); background: var(--sub-ground); }
.deletion { color: var(--del); background: var(--del-ground); text-decoration: line-through; }
.insertion { color: var(--ins); background: var(--ins-ground); text-decoration: underline; }
"""


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
    normalise = normaliser(results.normaliser["name"])
    metric_set = MetricSet(list(evaluation.metrics), normalise)
    pairs = align(evaluation.hypotheses, normalise)
    ranking = "wer" if "wer" in evaluation.metrics else "chrf"
    title = f"{model or 'Speech encoder-decoder'}: {results.task}"
    curves = read_curves(metrics_csv) if metrics_csv and metrics_csv.exists() else {}
    sections = [f"<h1>{escape(title)}</h1>", _row(_scores(evaluation.metrics) + _facts(results)), _curves(curves)]
    if pairs:
        by_length = _lengths(ranking, metric_set, evaluation.counts, pairs)
        values = metric_set.values(evaluation.counts)[ranking]
        sections += [
            _row(by_length + (_errors(pairs) if ranking == "wer" else "")),
            _worst(ranking, values, evaluation.hypotheses, pairs, audio_of),
        ]
    path.write_text(_page(title, "\n".join(sections)), encoding="utf-8")


def align(hypotheses: Sequence[Hypothesis], normalise: Normaliser) -> list[list[WordPair]]:
    """The words of every utterance in pairs, as the word error rate pairs them."""
    references = [normalise(each.reference) for each in hypotheses]
    words = jiwer.process_words(references, [normalise(each.hypothesis) for each in hypotheses])
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


def read_curves(metrics_csv: Path) -> Curves:
    """The numbers of every column against the optimizer step; cells that the logger left blank are passed over."""
    curves: Curves = {}
    with metrics_csv.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            for name in row.keys() - {"step", "epoch", None}:
                if row["step"] and row[name]:
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(int(row["step"]))
                    values.append(float(row[name]))
    return dict(sorted(curves.items()))


def audio_uri(samples: np.ndarray, sampling_rate: int) -> str:
    """The sound itself as a link: FLAC, which browsers play at every sampling rate, phones included."""
    file = io.BytesIO()
    soundfile.write(file, samples, sampling_rate, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def _row(sections: str) -> str:
    """Sections beside each other where the page is wide enough."""
    return f'<div class="row">{sections}</div>'


def _scores(metrics: Mapping[str, Interval]) -> str:
    rows = [(NAMES[name], _percent(m.value), f"{100 * m.low:.2f} to {_percent(m.high)}") for name, m in metrics.items()]
    return "<section><h2>Scores</h2>" + _table(("metric", "value", "95 % interval"), rows) + "</section>"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def _facts(results: Results) -> str:
    train = results.train
    facts = {
        "split": f"{results.split}, {results.num_utterances:,} utterances, {results.audio_seconds / 60:.1f} min of audio",
        "training": f"{train.seconds / 60:.1f} min, {train.steps:,} steps, {train.utterances:,} utterances, "
        f"{train.audio_seconds_per_second:.0f} s of audio per second"
        if train
        else "none",
        "decoding": ", ".join(f"{name} {value}" for name, value in results.decoding.items()),
        "RTFx": f"{results.rtfx:.1f} s of audio decoded per second",
        "normaliser": f"{results.normaliser['name']} {results.normaliser['version']}",
        "skipped": ", ".join(f"{count:,} {reason}" for reason, count in results.skipped.items()) or "none",
    }
    versions = {name: version or "not installed" for name, version in results.versions.items()}
    folded = f"<details><summary>versions</summary>{_definitions(versions)}</details>"
    return f"<section><h2>Facts</h2>{_definitions(facts)}{folded}</section>"


def _curves(curves: Curves) -> str:
    def plot(names: list[str]) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for name in names:
                axes.plot(*curves[name], label=name, marker="." if name.startswith("val/") else "")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            axes.set_xlabel("optimizer step")
            axes.legend()

        return draw

    losses = [name for name in curves if name.endswith("loss")]
    scores = [name for name in curves if name.removeprefix("val/") in METRICS]
    figures = [_figure("Loss, nats per token", plot(losses))] if losses else []
    figures += [_figure("Validation scores", plot(scores), percent=True)] if scores else []
    return f"<h2>Learning curves</h2>{_row(''.join(figures))}" if figures else ""


def _lengths(name: str, metric_set: MetricSet, counts: Counts, pairs: Sequence[list[WordPair]]) -> str:
    """The score of short and of long utterances, in groups of about equal size."""
    lengths = np.array([sum(reference != "" for reference, _ in words) for words in pairs])
    longest = np.unique(np.quantile(lengths, np.linspace(0, 1, NUM_LENGTHS + 1)[1:], method="higher"))
    members = [np.searchsorted(longest, lengths) == group for group in range(len(longest))]
    intervals = [bootstrap_intervals(metric_set, counts[group])[name] for group in members]
    bounds = [sorted({lengths[group].min(), lengths[group].max()}) for group in members]

    def draw(axes: Axes) -> None:
        places = range(len(members))
        axes.bar(places, [each.value for each in intervals], width=0.7, alpha=0.6)
        axes.vlines(places, [each.low for each in intervals], [each.high for each in intervals], color=INK)
        axes.set_xticks(places, ["–".join(map(str, bound)) for bound in bounds])
        axes.set_xlabel("words in the reference")

    return (
        f"<section><h2>{NAMES[name]} by length</h2>" + _figure("with 95 % intervals", draw, percent=True) + "</section>"
    )


def _figure(caption: str, draw: Callable[[Axes], None], percent: bool = False) -> str:
    """What `draw` puts on the axes, as an SVG element in the colours of the page."""
    svg = io.StringIO()
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(4.4, 2.6), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_ylim(bottom=0)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        no_metadata = dict.fromkeys(["Date", "Creator", "Format", "Type"])
        figure.savefig(svg, format="svg", transparent=True, metadata=no_metadata)
    drawing = svg.getvalue().replace(INK, "currentColor")
    return f"<figure><figcaption>{escape(caption)}</figcaption>{drawing[drawing.index('<svg') :]}</figure>"


def _errors(pairs: Iterable[list[WordPair]]) -> str:
    counts = Counter(pair for words in pairs for pair in words)
    kinds: Counter[str] = Counter()
    for pair, count in counts.items():
        kinds[kind(pair)] += count
    num_words = max(kinds["hit"] + kinds["substitution"] + kinds["deletion"], 1)
    rows = [(f"{name}s", f"{kinds[name]:,}", _percent(kinds[name] / num_words)) for name in KINDS]
    errors = [(pair, count) for pair, count in counts.most_common() if kind(pair) != "hit"]
    confusions = [(pair[0] or NO_WORD, pair[1] or NO_WORD, f"{count:,}") for pair, count in errors[:NUM_CONFUSIONS]]
    by_kind = "<h2>Errors by kind</h2>" + _table(("kind", "words", "of the reference"), rows)
    by_word = "<h2>Most frequent errors</h2>" + _table(("reference", "hypothesis", "times"), confusions, num_texts=2)
    return f"<section>{by_kind}</section><section>{by_word if confusions else ''}</section>"


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
        + (_player(*audio_of(hypotheses[index].id)) if audio_of else "")
        + (_alignment(pairs[index]) if name == "wer" else _texts(hypotheses[index]))
        + "</article>"
        for index in order
    ]
    legend = f'<p class="quiet">Words: {key}</p>' if name == "wer" else ""
    return f"<section><h2>The {len(order)} worst utterances, by {NAMES[name]}</h2>{legend}{''.join(articles)}</section>"


def _player(samples: np.ndarray, sampling_rate: int) -> str:
    return f'<audio controls preload="metadata" src="{audio_uri(samples, sampling_rate)}"></audio>'


def _alignment(words: Iterable[WordPair]) -> str:
    """Reference words above hypothesis words; on a narrow page the pairs wrap together."""
    columns = (
        f'<span class="pair {kind(pair)}"><span>{escape(pair[0])}</span><span>{escape(pair[1])}</span></span>'
        for pair in words
    )
    sides = '<div class="quiet"><span>reference</span><span>hypothesis</span></div>'
    return f'<div class="sides">{sides}<div class="words" dir="auto">{"".join(columns)}</div></div>'


def _texts(each: Hypothesis) -> str:
    return _definitions({"reference": each.reference, "hypothesis": each.hypothesis})


def _definitions(entries: Mapping[str, str]) -> str:
    rows = (f'<dt>{escape(name)}</dt><dd dir="auto">{escape(value)}</dd>' for name, value in entries.items())
    return f"<dl>{''.join(rows)}</dl>"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], num_texts: int = 1) -> str:
    """Cells of text, of which the first `num_texts` in a row are words and the others numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        words = (f"<{tag}>{escape(cell)}</{tag}>" for cell in cells[:num_texts])
        numbers = (f'<{tag} class="number">{escape(cell)}</{tag}>' for cell in cells[num_texts:])
        return f"<tr>{''.join(words)}{''.join(numbers)}</tr>"

    return f"<table>{line(headings, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
