"""An inspection in the terminal."""

from collections.abc import Iterable, Sequence

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sedtrain.inspection import words
from sedtrain.inspection.statistics import Histogram
from sedtrain.inspection.summary import Inspection, SplitSummary

BAR = 20  # characters of the longest
EIGHTHS = " ▏▎▍▌▋▊▉"
NUM_CHARACTERS = 5


def tables(inspection: Inspection) -> list[RenderableType]:
    splits = inspection.splits
    shown: list[RenderableType] = [listed(inspection.name, words.SPLIT_HEADINGS, [words.split_rows(splits)])]
    shown.append(listed("lengths", words.LENGTH_HEADINGS, map(words.length_rows, splits), num_texts=2))
    for split in splits[:1]:
        drawn = [
            histogram(f"{split.split}: {name}", split.histograms[name]) for name in words.DRAWN if split.histograms
        ]
        shown.append(Columns(drawn, padding=(1, 3)))
    speakers = [words.group_rows(splits, by) for by in words.GROUPS]
    shown += [
        listed(
            words.batch_title(inspection.settings), words.BATCH_HEADINGS, map(words.batch_rows, splits), num_texts=2
        ),
        listed("who speaks", words.GROUP_HEADINGS, speakers, num_texts=3),
        listed("audio", words.SOUND_HEADINGS, [[words.sound_row(each.split, each.sounds) for each in splits]], 2),
        listed("texts", words.TEXT_HEADINGS, [map(words.text_row, splits)]),
        *(rare_characters(split) for split in splits[:1]),
        listed("skipped", words.SKIPPED_HEADINGS, map(words.skipped_rows, splits), num_texts=3),
        strangest(inspection),
        to_look_at(words.findings(inspection)),
    ]
    return shown


def rare_characters(split: SplitSummary) -> RenderableType:
    rows = words.character_rows(split.texts, NUM_CHARACTERS)
    return listed(f"{split.split}: rarest characters", words.CHARACTER_HEADINGS, [rows], num_texts=2)


def listed(
    title: str, headings: Sequence[str], sections: Iterable[Iterable[words.Row]], num_texts: int = 1
) -> RenderableType:
    """A table of which the first columns hold words and the others numbers; nothing where it has no row."""
    table = Table(title=Text(title), title_justify="left")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < num_texts else "right", overflow="fold")
    for rows in sections:
        for row in rows:
            table.add_row(*map(Text, row))
        table.add_section()
    return table if table.row_count else Text(f"{title}: none")


def histogram(title: str, counts: Histogram) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right")
    grid.add_column(width=BAR)
    grid.add_column(justify="right")
    labels = counts.labels()
    for low, high, count in zip(labels, labels[1:], counts.counts, strict=False):
        grid.add_row(f"{low}–{high}", Text(bar(count / max(counts.counts)), style="cyan"), f"{count:,}")
    return Group(Text(title, style="italic"), grid)


def bar(share: float) -> str:
    """A share of the longest bar, to an eighth of a character; never nothing where there is something."""
    eighths = max(round(share * BAR * 8), int(share > 0))
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def strangest(inspection: Inspection) -> RenderableType:
    rows = [(each.id, "; ".join(each.reasons), words.cut(each.text)) for each in inspection.strangest]
    return listed("the strangest utterances", words.STRANGE_HEADINGS, [rows], num_texts=3)


def to_look_at(findings: Sequence[str]) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    for finding in findings or ["nothing out of the ordinary"]:
        grid.add_row(" ·", Text(finding))
    return Group(Text("what to look at"), grid)
