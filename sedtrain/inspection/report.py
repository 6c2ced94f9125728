"""Renders the sections of an inspection: as tables for the terminal, and as inspect.html."""

from collections.abc import Iterable
from html import escape
from pathlib import Path

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sedtrain.evaluation import html
from sedtrain.inspection.splits import SplitEntries, playable
from sedtrain.inspection.statistics import Histogram
from sedtrain.inspection.summary import Inspection
from sedtrain.inspection.tables import Section, sections
from sedtrain.run_dir import write_whole

BAR = 20  # characters of the longest bar
EIGHTHS = " ▏▎▍▌▋▊▉"


def write_page(path: Path, inspection: Inspection, splits: Iterable[SplitEntries]) -> None:
    """Writes one HTML file without links to anything outside it."""
    by_name = {split.split: split for split in splits}
    sounds = [
        playable(by_name[each.split].parts, by_name[each.split].entries[each.number].reference)
        for each in inspection.strangest
    ]
    title = f"Inspection: {inspection.name}"
    body = "\n".join([f"<h1>{escape(title)}</h1>", *map(on_page, sections(inspection, sounds))])
    write_whole(path, html.page(title, body))


def on_page(section: Section) -> str:
    """Heading or fold, note, list or table, figures."""
    content = f'<p class="quiet">{escape(section.note)}</p>' if section.note else ""
    if not section.rows and not section.histograms:
        content += "<p>None</p>"
    elif not section.headings:
        items = "".join(f'<li dir="auto">{escape(text)}</li>' for [text] in section.texts())
        content += f"<ul>{items}</ul>" if items else ""
    else:
        table = html.table(section.headings, section.texts(), section.num_texts, section.sounds)
        content += f'<div class="wide">{table}</div>'
    figures = [
        html.histogram_figure(title, counts.labels(), counts.counts, axis=title.partition(": ")[2])
        for title, counts in section.histograms.items()
    ]
    content += html.row(*figures) if figures else ""
    if section.folded:
        return f"<details><summary>{escape(section.title)}</summary>{content}</details>"
    return f"<h2>{escape(section.title)}</h2>{content}"


def tables(inspection: Inspection) -> list[RenderableType]:
    """For the terminal, where what to look at comes last: it stays in view."""
    first, *others = (section for section in sections(inspection) if not section.folded)
    return [in_terminal(section) for section in (*others, first)]


def in_terminal(section: Section) -> RenderableType:
    rows = section.texts()
    if not rows:
        return f"{section.title}: none"
    if not section.headings:
        return Group(section.title, *(Padding(Text(f"· {text}"), (0, 1)) for [text] in rows))
    table = Table(title=section.title, title_justify="left", caption=Text(section.note), caption_justify="left")
    for index, heading in enumerate(section.headings):
        is_words = index < section.num_texts
        no_wrap = index == 0 or not is_words
        table.add_column(heading, justify="left" if is_words else "right", no_wrap=no_wrap, overflow="fold")
    is_grouped = not all(row[0] for row in rows)
    for row in rows:
        if is_grouped and row[0]:
            table.add_section()
        table.add_row(*map(Text, row))
    return Group(table, Columns([histogram(*each) for each in section.histograms.items()], padding=(0, 3)))


def histogram(title: str, counts: Histogram) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right")
    grid.add_column(width=BAR)
    grid.add_column(justify="right")
    labels = counts.labels()
    for low, high, count in zip(labels, labels[1:], counts.counts, strict=False):
        eighths = max(round(count / max(counts.counts) * BAR * 8), int(count > 0))  # a bar wherever there is something
        bar = "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()
        grid.add_row(f"{low}–{high}", Text(bar, style="cyan"), f"{count:,}")
    return Group(Text(title, style="italic"), grid)
