"""Curves and bars as SVG elements that take on the colours of the page they stand in."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sedtrain.evaluation.intervals import Interval

Curve = tuple[list[int], list[float]]  # optimizer steps, values

INK = "#010203"  # stands for the page's text colour, which follows the reader's theme
INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
# Blue, vermilion and green of Okabe and Ito: no reader mixes them up, and all stand out from black as from white.
LINES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", ":"))
MAX_EDGES = 9  # named below a histogram: more would run into each other
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


def read_curves(metrics_csv: Path) -> dict[str, Curve]:
    """Every column of what Lightning's CSVLogger wrote, without the cells that it left blank."""
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
    """Values against optimizer steps; those of a validation, which are few, with a dot each."""

    def draw(axes: Axes) -> None:
        for (name, curve), (colour, line) in zip(curves.items(), cycle(LINES)):
            axes.plot(*curve, line, color=colour, label=name, marker="." if name.startswith("val/") else "")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.set_xlabel("optimizer step")
        axes.legend()

    return _figure(caption, draw, percent)


def bars_figure(caption: str, labels: Sequence[str], intervals: Sequence[Interval], axis: str) -> str:
    """Fractions as bars in percent, each with its interval; `axis` says what the labels are."""

    def draw(axes: Axes) -> None:
        places = range(len(labels))
        axes.bar(places, [each.value for each in intervals], width=0.7, alpha=0.85, color=LINES[0][0])
        axes.vlines(places, [each.low for each in intervals], [each.high for each in intervals], color=INK)
        axes.set_xticks(places, labels)
        axes.set_xlabel(axis)
        axes.grid(visible=False, axis="x")

    return _figure(caption, draw, percent=True)


def histogram_figure(caption: str, edges: Sequence[str], counts: Sequence[int], axis: str) -> str:
    """Counts as bars without gaps, the edges between them named; `axis` says what was counted by."""

    def draw(axes: Axes) -> None:
        places = [place + 0.5 for place in range(len(counts))]
        axes.bar(places, counts, width=0.96, alpha=0.85, color=LINES[0][0])
        last, every = len(edges) - 1, -(-len(edges) // MAX_EDGES)
        named = [*range(0, last - every + 1, every), last]
        axes.set_xticks(named, [edges[place] for place in named])
        axes.set_xlabel(axis)
        axes.set_ylabel("utterances")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid(visible=False, axis="x")

    return _figure(caption, draw, percent=False)


def _figure(caption: str, draw: Callable[[Axes], None], percent: bool) -> str:
    svg = io.StringIO()
    with matplotlib.rc_context(LOOK):
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
