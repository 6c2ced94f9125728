"""Shows an inspection as tables in the terminal and as inspect.html."""

from collections.abc import Iterable
from pathlib import Path

from rich.bar import Bar
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from sedtrain.evaluation import html
from sedtrain.inspection.sections import Section, sections
from sedtrain.inspection.splits import SplitEntries, playable
from sedtrain.inspection.summary import Histogram, Inspection

BAR = 20  # characters of the longest bar


def write_page(path: Path, inspection: Inspection, splits: Iterable[SplitEntries]) -> None:
    """Writes one self-contained HTML file."""
    by_name = {split.split: split for split in splits}
    strangest = [(by_name[strange.split], strange.number) for strange in inspection.strangest]
    sounds = [playable(split.parts, split.entries[number]) for split, number in strangest]
    html.write_page(path, f"Inspection: {inspection.name}", map(on_page, sections(inspection, sounds)))


def on_page(section: Section) -> str:
    """Renders one section as HTML."""
    content = html.quiet(section.note) if section.note else ""
    if section.headings and section.rows:
        table = html.table(section.headings, section.texts(), section.num_texts, section.sounds)
        content += html.wide(table)
    elif section.rows:
        content += html.bullets(text for [text] in section.texts())
    elif not section.histograms:
        content += "<p>None</p>"
    figures = [
        html.histogram_figure(title, counts.labels(), counts.counts, axis=title.partition(": ")[2])
        for title, counts in section.histograms.items()
    ]
    content += html.row(*figures) if figures else ""
    return (html.folded if section.folded else html.headed)(section.title, content)


def tables(inspection: Inspection) -> list[RenderableType]:
    """Tables for the terminal. The problems come last, because the end stays in view."""
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
    grid = Table.grid(Column(justify="right"), Column(width=BAR), Column(justify="right"), padding=(0, 1))
    labels, most = counts.labels(), max(counts.counts)
    for low, high, count in zip(labels, labels[1:], counts.counts, strict=False):
        seen = max(count, most / BAR / 8) if count else 0  # at least an eighth of a character if there is a value
        grid.add_row(f"{low}–{high}", Bar(most, 0, seen, width=BAR, color="cyan"), f"{count:,}")
    return Group(Text(title, style="italic"), grid)
