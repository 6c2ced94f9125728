"""inspect.html: an inspection on one page that needs nothing else, with the strangest utterances to listen to."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import chain
from pathlib import Path

from sedtrain.evaluation.figures import histogram_figure
from sedtrain.evaluation.page import page, player, row, table
from sedtrain.inspection import words
from sedtrain.inspection.reading import SplitColumns
from sedtrain.inspection.sound import sound_of
from sedtrain.inspection.strange import Strange
from sedtrain.inspection.summary import Inspection, SplitSummary
from sedtrain.inspection.texts import NUM_RAREST


def write_page(path: Path, inspection: Inspection, columns: Sequence[SplitColumns]) -> None:
    """Writes one HTML file without links to anything outside it."""
    splits = inspection.splits
    title = f"Inspection: {inspection.name}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        _to_look_at(words.findings(inspection)),
        _table("Splits", words.SPLIT_HEADINGS, words.split_rows(splits)),
        "<h2>Lengths</h2>",
        *map(_lengths, splits),
        _table("Padding", words.BATCH_HEADINGS, chain(*map(words.batch_rows, splits)), 2, _batches(inspection)),
        _table("Who speaks", words.GROUP_HEADINGS, chain(*(words.group_rows(splits, by) for by in words.GROUPS)), 3),
        _sounds(splits),
        _table("Texts", words.TEXT_HEADINGS, map(words.text_row, splits)),
        *map(_characters, splits),
        _table("Skipped", words.SKIPPED_HEADINGS, chain(*map(words.skipped_rows, splits)), 3),
        _strangest(inspection.strangest, {each.split: each for each in columns}),
    ]
    path.write_text(page(title, "\n".join(sections)), encoding="utf-8")


def _to_look_at(findings: Iterable[str]) -> str:
    items = "".join(f'<li dir="auto">{escape(each)}</li>' for each in findings)
    return f"<h2>What to look at</h2><ul>{items or '<li>Nothing out of the ordinary</li>'}</ul>"


def _table(title: str, headings: Sequence[str], rows: Iterable[words.Row], num_texts: int = 1, note: str = "") -> str:
    listed = list(rows)
    told = f'<p class="quiet">{escape(note)}</p>' if note else ""
    content = f'<div class="wide">{table(headings, listed, num_texts)}</div>' if listed else "<p>None</p>"
    return f"<h2>{escape(title)}</h2>{told}{content}"


def _batches(inspection: Inspection) -> str:
    settings = words.batch_title(inspection.settings)
    return (
        f"{settings[0].upper()}{settings[1:]}, of audio as it is stored; tokens are not known before there is a tokenizer. "
        "Padding is the share of the padded audio that is none. Below them one bucket within the same bounds, and as many "
        "batches of utterances drawn at random, whose largest would have to fit in memory."
    )


def _lengths(split: SplitSummary) -> str:
    """Open for the first split, which is the training split if there is one."""
    figures = [
        histogram_figure(name.capitalize(), split.histograms[name].labels(), split.histograms[name].counts, name)
        for name in words.DRAWN
        if split.histograms
    ]
    spreads = (
        f'<div class="wide">{table(words.LENGTH_HEADINGS[1:], [each[1:] for each in words.length_rows(split)])}</div>'
    )
    is_open = " open" if split.split == "train" else ""
    return f"<details{is_open}><summary>{split.split}</summary>{row(spreads, *figures)}</details>"


def _sounds(splits: Sequence[SplitSummary]) -> str:
    rows = [words.sound_row(each.split, each.sounds) for each in splits]
    note = (
        "Of utterances drawn at random and decoded. Level: median, and 5 % to 95 %. Silent: 20 ms that are 40 dB below the "
        "loudest. Clipped: three samples in a row at full scale."
    )
    levels = splits[0].sounds.levels
    figure = histogram_figure(f"Level, {splits[0].split}", levels.labels(), levels.counts, "dBFS") if levels else ""
    return _table("Audio", words.SOUND_HEADINGS, rows, 2, note) + figure


def _characters(split: SplitSummary) -> str:
    rare = table(words.CHARACTER_HEADINGS, words.character_rows(split.texts, NUM_RAREST), num_texts=2)
    frequent = table(words.REPEATED_HEADINGS, words.repeated_rows(split.texts)) if split.texts.repeated else ""
    told = f"{split.split}: rarest characters{', most frequent texts' if frequent else ''}"
    return f"<details><summary>{told}</summary>{row(rare, frequent)}</details>"


def _strangest(found: Sequence[Strange], columns: Mapping[str, SplitColumns]) -> str:
    note = "By robust standard deviations from the median of all splits. Level and silence are known of those decoded alone."
    articles = "".join(_article(each, columns[each.split]) for each in found)
    return f'<section><h2>The {len(found)} strangest utterances</h2><p class="quiet">{note}</p>{articles}</section>'


def _article(each: Strange, columns: SplitColumns) -> str:
    sound = sound_of(columns.parts, columns.references[each.number])
    return (
        f'<article><header><b>{escape(each.id)}</b><span class="quiet">{each.split}, {each.score:.1f} deviations</span>'
        f"</header><p>{escape('; '.join(each.reasons))}</p>"
        f"{player(*sound) if sound else '<p>This cannot be decoded.</p>'}"
        f'<p dir="auto">{escape(each.text)}</p></article>'
    )
