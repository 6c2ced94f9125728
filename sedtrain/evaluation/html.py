"""Pieces of the HTML reports: page, tables, figures, players. All text is escaped."""

import base64
import csv
import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import cycle, repeat
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import soundfile
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sedtrain.evaluation.statistics import Interval
from sedtrain.run_dir import write_whole

Audio = tuple[np.ndarray, int]  # (S,) samples in -1..1, sampling rate in hertz
Curve = tuple[list[int], list[float]]  # optimizer steps, values

INK = "#010203"  # placeholder for the page's text colour, which follows the reader's theme
INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
# Okabe and Ito's blue, vermilion and green: every reader can tell them apart, on black and on white.
LINES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", ":"))
MAX_TOKENS, MAX_COLUMNS = 30, 150  # labels beside an attention picture, and its resolution
MAX_EDGES = 9  # labels below a histogram; more would overlap
LOOK: dict[Any, Any] = {
    **dict.fromkeys(INKED, INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "sedtrain",
}
STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def read_curves(metrics_csv: Path) -> dict[str, Curve]:
    """Columns of metrics.csv by name, without blank cells."""
    curves: dict[str, Curve] = {}
    with metrics_csv.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            for name in row.keys() - {"step", "epoch", None}:
                if row[name]:
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(int(row["step"]))
                    values.append(float(row[name]))
    return dict(sorted(curves.items()))


def curves_figure(caption: str, curves: Mapping[str, Curve], percent: bool = False) -> str:
    """Values against optimizer steps; a dot marks each validation, as these are few."""

    def draw(axes: Axes) -> None:
        for (name, curve), (colour, line) in zip(curves.items(), cycle(LINES)):
            axes.plot(*curve, line, color=colour, label=name, marker="." if name.startswith("val/") else "")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.set_xlabel("optimizer step")
        axes.legend()

    return figure(caption, draw, percent)


def bars_figure(caption: str, labels: Sequence[str], intervals: Sequence[Interval], axis: str) -> str:
    """Fractions as bars in percent, each with its interval; `axis` names the labels."""

    def draw(axes: Axes) -> None:
        positions = range(len(labels))
        axes.bar(positions, [each.value for each in intervals], width=0.7, alpha=0.85, color=LINES[0][0])
        axes.vlines(positions, [each.low for each in intervals], [each.high for each in intervals], color=INK)
        axes.set_xticks(positions, labels)
        axes.set_xlabel(axis)
        axes.grid(visible=False, axis="x")

    return figure(caption, draw, percent=True)


def histogram_figure(caption: str, edges: Sequence[str], counts: Sequence[int], axis: str) -> str:
    """Counts as bars, with the edges between them; `axis` names the edges."""

    def draw(axes: Axes) -> None:
        centres = [bin + 0.5 for bin in range(len(counts))]
        axes.bar(centres, counts, width=0.96, alpha=0.85, color=LINES[0][0])
        last, every = len(edges) - 1, -(-len(edges) // MAX_EDGES)
        labelled = [*range(0, last - every + 1, every), last]
        axes.set_xticks(labelled, [edges[edge] for edge in labelled])
        axes.set_xlabel(axis)
        axes.set_ylabel("utterances")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid(visible=False, axis="x")

    return figure(caption, draw, percent=False)


def attention_figure(
    caption: str,
    tokens: Sequence[str],
    seconds: float,
    attention: np.ndarray | None,
    spans: Sequence[tuple[float, float]] | None,
) -> str:
    """A row for each token: shades show where the decoder attends to the audio, a bar shows where CTC hears the token.

    attention: (U, T) weights; the highest of each token is the darkest
    """

    def draw(axes: Axes) -> None:
        positions, every = range(len(tokens)), -(-len(tokens) // MAX_TOKENS)
        ends = (0.0, seconds, len(tokens) - 0.5, -0.5)
        if attention is not None:
            shades = LinearSegmentedColormap.from_list("", [f"{LINES[0][0]}00", LINES[0][0]])
            parts = np.array_split(attention, min(attention.shape[1], MAX_COLUMNS), axis=1)
            columns = np.stack([part.mean(1) for part in parts], 1)
            columns /= columns.max(1, keepdims=True)
            axes.imshow(columns, shades, aspect="auto", vmin=0, extent=ends, interpolation="none")
        if spans is not None:
            axes.hlines(positions, *zip(*spans, strict=True), color=LINES[1][0], linewidth=2)
        axes.set_yticks(positions[::every], tokens[::every], parse_math=False)
        axes.set_xlim(ends[:2])
        axes.set_ylim(ends[2:])
        axes.set_xlabel("seconds")
        axes.grid(visible=False)

    with warnings.catch_warnings(action="ignore", category=UserWarning):  # matplotlib lacks glyphs that the browser has
        return figure(caption, draw, percent=False, height=0.7 + 0.17 * min(max(len(tokens), 5), MAX_TOKENS))


def figure(caption: str, draw: Callable[[Axes], None], percent: bool, height: float = 2.6) -> str:
    svg = io.StringIO()
    with matplotlib.rc_context(LOOK):
        drawn = Figure(figsize=(4.4, height), layout="constrained")
        axes = drawn.add_subplot()
        draw(axes)
        if not axes.yaxis_inverted():
            axes.set_ylim(bottom=0)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        no_metadata = dict.fromkeys(["Date", "Creator", "Format", "Type"])
        drawn.savefig(svg, format="svg", transparent=True, metadata=no_metadata)
    _, tag, drawing = svg.getvalue().replace(INK, "currentColor").partition("<svg")
    return f"<figure><figcaption>{escape(caption)}</figcaption>{tag}{drawing}</figure>"


def write_page(path: Path, title: str, sections: Iterable[str]) -> None:
    """Writes one self-contained HTML file."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{STYLE}</style>"
    )
    body = "\n".join([f"<h1>{escape(title)}</h1>", *sections])
    write_whole(path, f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n')


def headed(heading: str, *contents: str) -> str:
    return f"<h2>{escape(heading)}</h2>{''.join(contents)}"


def quiet(text: str) -> str:
    return f'<p class="quiet">{escape(text)}</p>'


def bullets(texts: Iterable[str]) -> str:
    items = "".join(f'<li dir="auto">{escape(text)}</li>' for text in texts)
    return f"<ul>{items}</ul>"


def wide(content: str) -> str:
    """Content that scrolls sideways on a narrow page."""
    return f'<div class="wide">{content}</div>'


def folded(summary: str, content: str) -> str:
    """Content that shows when its summary is clicked."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def article(id: str, score: str, *contents: str) -> str:
    """An utterance."""
    header = f'<header><b>{escape(id)}</b><span class="quiet">{escape(score)}</span></header>'
    return f"<article>{header}{''.join(contents)}</article>"


def row(*sections: str) -> str:
    """Sections side by side where the page is wide enough."""
    return '<div class="row">' + "".join(f"<section>{section}</section>" for section in sections) + "</div>"


def definitions(entries: Mapping[str, str]) -> str:
    rows = (f'<dt>{escape(name)}</dt><dd dir="auto">{escape(value)}</dd>' for name, value in entries.items())
    return f"<dl>{''.join(rows)}</dl>"


def table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], num_texts: int = 1, sounds: Sequence[Audio | None] = ()
) -> str:
    """A table of text cells: the first `num_texts` of a row are words, the others numbers.

    sounds: audio of each row, played in a column of its own; None if it cannot be played
    """

    def line(cells: Sequence[str], tag: str, last: str = "") -> str:
        words = (f'<{tag} dir="auto">{escape(cell)}</{tag}>' for cell in cells[:num_texts])
        numbers = (f'<{tag} class="number">{escape(cell)}</{tag}>' for cell in cells[num_texts:])
        return f"<tr>{''.join(words)}{''.join(numbers)}{last}</tr>"

    heads = line(headings, "th", "<th>listen</th>" if sounds else "")
    players = [f"<td>{player(*sound) if sound else 'cannot be decoded'}</td>" for sound in sounds] or repeat("")
    return f"<table>{heads}{''.join(line(row, 'td', last) for row, last in zip(rows, players, strict=False))}</table>"


def player(samples: np.ndarray, sampling_rate: int) -> str:
    """A player of (S,) samples, which the page holds as FLAC: browsers and phones play it at every sampling rate."""
    file = io.BytesIO()
    soundfile.write(file, samples, sampling_rate, format="FLAC", subtype="PCM_16")
    content = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<audio controls preload="metadata" src="data:audio/flac;base64,{content}"></audio>'
