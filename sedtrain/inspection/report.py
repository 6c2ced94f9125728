"""How an inspection is put into words, alike in the terminal and on the page."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import chain
from pathlib import Path

from rich.columns import Columns
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from sedtrain.evaluation.html import histogram_figure, page, player, row, table
from sedtrain.inspection.statistics import (
    NUM_RAREST,
    Batching,
    Group,
    Histogram,
    Overlap,
    SplitColumns,
    Spread,
    Texts,
    sound_of,
)
from sedtrain.inspection.summary import Inspection, Sounds, SplitSummary, Strange

SHOWN = (5, 50, 95)  # percentiles


RARE_SHARE = 0.01  # of decoded utterances; fewer that clip are no finding


WIDEBAND = 16_000  # hertz: what nearly every speech encoder was pretrained at


NUM_GROUPS = 5


GROUPS = ("dataset", "language", "speaker")


DRAWN = ("seconds", "characters", "characters per second")


SPLIT_HEADINGS = ("split", "utterances", "hours", "skipped", "speakers", "languages")


LENGTH_HEADINGS = ("split", "of an utterance", "mean", "5 %", "median", "95 %", "most")


BATCH_HEADINGS = ("split", "batches of", "number", "utterances", "padding", "largest")


SOUND_HEADINGS = ("split", "stored as", "decoded", "level, dBFS", "silent", "clipped")


TEXT_HEADINGS = ("split", "different texts", "repeated", "characters", "texts in train", "speakers in train")


SKIPPED_HEADINGS = ("split", "reason", "first of them", "utterances", "audio")


GROUP_HEADINGS = ("by", "split", "most audio", "number")


STRANGE_HEADINGS = ("utterance", "why", "text")


CHARACTER_HEADINGS = ("character", "first in", "times")


REPEATED_HEADINGS = ("text", "times")


Row = tuple[str, ...]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def number(value: float) -> str:
    """With three digits or so, and without zeros at the end."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return (f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}").rstrip("0").rstrip(".")


def duration(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def split_rows(splits: Sequence[SplitSummary]) -> list[Row]:
    return [
        (
            each.split if each.is_whole else f"{each.split}, its first",
            f"{each.num_utterances:,}",
            f"{each.hours:,.2f}",
            f"{each.num_skipped:,}",
            *(f"{len(each.groups[name]):,}" if each.groups[name] else "unknown" for name in ("speaker", "language")),
        )
        for each in splits
    ]


def length_rows(split: SplitSummary) -> list[Row]:
    return [
        (split.split if name == "seconds" else "", name, *map(number, (spread.mean, *values_of(spread))))
        for name, spread in split.spreads.items()
    ]


def values_of(spread: Spread) -> list[float]:
    return [spread.percentiles[each] for each in (*SHOWN, 100)]


def batch_title(settings: Mapping[str, float | int | None]) -> str:
    bounds = {name: value for name, value in settings.items() if value is not None}
    tokens = bounds.pop("data.batch_tokens", None)
    told = ", ".join(f"{name}={value}" for name, value in bounds.items())
    return f"batches by {told}" + ("" if tokens is None else f" (data.batch_tokens={tokens} is not counted)")


def batch_row(split: str, batching: Batching) -> Row:
    return (
        split,
        batching.name,
        f"{batching.num_batches:,}",
        f"{batching.mean_utterances:.1f}",
        percent(batching.padding),
        f"{batching.largest_seconds:.1f} s",
    )


def batch_rows(split: SplitSummary) -> list[Row]:
    return [batch_row("" if place else split.split, each) for place, each in enumerate(split.batches)]


def sound_row(split: str, sounds: Sounds) -> Row:
    level, silence = sounds.level, sounds.silence
    low, middle, high = (level.percentiles[each] for each in SHOWN) if level else (0, 0, 0)
    return (
        split,
        stored_as(sounds),
        f"{sounds.num_decoded:,}",
        f"{middle:.0f} ({low:.0f} to {high:.0f})" if level else "",
        percent(silence.mean) if silence else "",
        f"{len(sounds.clipped):,}",
    )


def stored_as(sounds: Sounds) -> str:
    """Such as `16,000 Hz; mono; FLAC PCM_16`; of several, each with how many."""
    rates = {f"{rate:,} Hz": count for rate, count in sounds.sampling_rates.items()}
    channels = {{1: "mono", 2: "stereo"}.get(of, f"{of} channels"): count for of, count in sounds.channels.items()}
    return "; ".join(", ".join(with_counts(facts)) for facts in (rates, channels, sounds.formats) if facts)


def with_counts(facts: Mapping[str, int]) -> list[str]:
    return [f"{name} ({count:,})" if len(facts) > 1 else name for name, count in facts.items()]


def text_row(split: SplitSummary) -> Row:
    texts, overlap = split.texts, split.overlap
    return (
        split.split,
        f"{texts.num_distinct:,}",
        percent(texts.num_repeated / max(split.num_utterances, 1)),
        f"{texts.num_characters:,}",
        percent(overlap.num_texts / max(split.num_utterances, 1)) if overlap else "",
        speakers_shared(split),
    )


def speakers_shared(split: SplitSummary) -> str:
    if split.overlap is None:
        return ""
    number = len(split.groups["speaker"])
    return f"{split.overlap.num_speakers:,} of {number:,}" if number else "unknown"


def skipped_rows(split: SplitSummary) -> list[Row]:
    return [
        (split.split, each.reason, "; ".join(each.examples), f"{each.num_utterances:,}", duration(each.hours))
        for each in split.skipped
    ]


def group_rows(splits: Sequence[SplitSummary], by: str) -> list[Row]:
    """by: dataset, language or speaker; no row of splits without any."""
    named = [split for split in splits if split.groups[by]]
    return [
        ("" if place else by, split.split, largest(split.groups[by]), f"{len(split.groups[by]):,}")
        for place, split in enumerate(named)
    ]


def largest(groups: Sequence[Group]) -> str:
    named = [f"{each.name} {duration(each.hours)} ({each.num_utterances:,})" for each in groups[:NUM_GROUPS]]
    return ", ".join(named + ["…"] * (len(groups) > NUM_GROUPS))


def character_rows(texts: Texts, most: int) -> list[Row]:
    return [
        (named_character(use.character), f"{use.id}: {cut(use.text)}", f"{use.times:,}") for use in texts.rarest[:most]
    ]


def repeated_rows(texts: Texts) -> list[Row]:
    return [(cut(text), f"{times:,}") for text, times in texts.repeated.items()]


def cut(text: str, most: int = 60) -> str:
    """On one line."""
    plain = " ".join(text.split())
    return plain if len(plain) <= most else f"{plain[: most - 1]}…"


def named_character(character: str) -> str:
    """The character with its number; what cannot be seen by its name."""
    is_seen = character.isprintable() and not character.isspace() and not unicodedata.combining(character)
    code = f"U+{ord(character):04X}"
    return f"{character}  {code}" if is_seen else f"{code} {unicodedata.name(character, 'control character').lower()}"


def findings(inspection: Inspection) -> list[str]:
    """What to look at before training, each with its figures; nothing that is as it should be."""
    told = [f"{split} is not there: {wrong}" for split, wrong in inspection.absent.items()]
    for split in inspection.splits:
        told += [f"{split.split}: {each}" for each in split_findings(split)]
    return told


def split_findings(split: SplitSummary) -> list[str]:
    told = [] if split.num_utterances else ["there is no utterance that can be used"]
    if split.skipped:
        reasons = ", ".join(f"{each.num_utterances:,} {each.reason}" for each in split.skipped)
        told.append(f"{split.num_skipped:,} of {counted(split.num_read, 'utterance')} would be skipped: {reasons}")
    if split.texts.unseen:
        named = ", ".join(named_character(use.character) for use in split.texts.unseen[:NUM_GROUPS])
        told.append(f"characters that nobody sees: {named} (first in {split.texts.unseen[0].id})")
    return told + overlap_findings(split, split.overlap) + sound_findings(split.sounds)


def overlap_findings(split: SplitSummary, overlap: Overlap | None) -> list[str]:
    told = []
    if overlap and overlap.num_speakers:
        told.append(f"{overlap.num_speakers:,} of {counted(len(split.groups['speaker']), 'speaker')} also in train")
    if overlap and overlap.num_texts:
        share = percent(overlap.num_texts / split.num_utterances)
        told.append(f"{counted(overlap.num_texts, 'utterance')} ({share}) with a text that is also in train")
    return told


def sound_findings(sounds: Sounds) -> list[str]:
    told = []
    if sounds.num_refused:
        told.append(
            f"{sounds.num_refused:,} of {sounds.num_decoded:,} drawn at random cannot be decoded, or are refused"
        )
    if len(sounds.sampling_rates) > 1 or len(sounds.channels) > 1:
        told.append(f"audio is stored in several ways: {stored_as(sounds)}")
    if narrow := [rate for rate in sounds.sampling_rates if rate < WIDEBAND]:
        told.append(f"audio at {narrow[0]:,} Hz holds no sound above {narrow[0] // 2:,} Hz")
    if len(sounds.clipped) > RARE_SHARE * sounds.num_decoded:
        told.append(
            f"{len(sounds.clipped):,} of {sounds.num_decoded:,} decoded are clipped (first: {sounds.clipped[0]})"
        )
    if sounds.misdeclared:
        off = len(sounds.misdeclared)
        told.append(f"{off:,} of {sounds.num_decoded:,} decoded last not as declared (first: {sounds.misdeclared[0]})")
    return told


def write_page(path: Path, inspection: Inspection, columns: Sequence[SplitColumns]) -> None:
    """Writes one HTML file without links to anything outside it."""
    splits = inspection.splits
    title = f"Inspection: {inspection.name}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        _to_look_at(findings(inspection)),
        _table("Splits", SPLIT_HEADINGS, split_rows(splits)),
        "<h2>Lengths</h2>",
        *map(_lengths, splits),
        _table("Padding", BATCH_HEADINGS, chain(*map(batch_rows, splits)), 2, _batches(inspection)),
        _table("Who speaks", GROUP_HEADINGS, chain(*(group_rows(splits, by) for by in GROUPS)), 3),
        _sounds(splits),
        _table("Texts", TEXT_HEADINGS, map(text_row, splits)),
        *map(_characters, splits),
        _table("Skipped", SKIPPED_HEADINGS, chain(*map(skipped_rows, splits)), 3),
        _strangest(inspection.strangest, {each.split: each for each in columns}),
    ]
    path.write_text(page(title, "\n".join(sections)), encoding="utf-8")


def _to_look_at(findings: Iterable[str]) -> str:
    items = "".join(f'<li dir="auto">{escape(each)}</li>' for each in findings)
    return f"<h2>What to look at</h2><ul>{items or '<li>Nothing out of the ordinary</li>'}</ul>"


def _table(title: str, headings: Sequence[str], rows: Iterable[Row], num_texts: int = 1, note: str = "") -> str:
    listed = list(rows)
    told = f'<p class="quiet">{escape(note)}</p>' if note else ""
    content = f'<div class="wide">{table(headings, listed, num_texts)}</div>' if listed else "<p>None</p>"
    return f"<h2>{escape(title)}</h2>{told}{content}"


def _batches(inspection: Inspection) -> str:
    settings = batch_title(inspection.settings)
    return (
        f"{settings[0].upper()}{settings[1:]}, of audio as it is stored; tokens are not known before there is a tokenizer. "
        "Padding is the share of the padded audio that is none. Below them one bucket within the same bounds, and as many "
        "batches of utterances drawn at random, whose largest would have to fit in memory."
    )


def _lengths(split: SplitSummary) -> str:
    """Open for the first split, which is the training split if there is one."""
    figures = [
        histogram_figure(name.capitalize(), split.histograms[name].labels(), split.histograms[name].counts, name)
        for name in DRAWN
        if split.histograms
    ]
    spreads = f'<div class="wide">{table(LENGTH_HEADINGS[1:], [each[1:] for each in length_rows(split)])}</div>'
    is_open = " open" if split.split == "train" else ""
    return f"<details{is_open}><summary>{split.split}</summary>{row(spreads, *figures)}</details>"


def _sounds(splits: Sequence[SplitSummary]) -> str:
    rows = [sound_row(each.split, each.sounds) for each in splits]
    note = (
        "Of utterances drawn at random and decoded. Level: median, and 5 % to 95 %. Silent: 20 ms that are 40 dB below the "
        "loudest. Clipped: three samples in a row at full scale."
    )
    levels = splits[0].sounds.levels
    figure = histogram_figure(f"Level, {splits[0].split}", levels.labels(), levels.counts, "dBFS") if levels else ""
    return _table("Audio", SOUND_HEADINGS, rows, 2, note) + figure


def _characters(split: SplitSummary) -> str:
    rare = table(CHARACTER_HEADINGS, character_rows(split.texts, NUM_RAREST), num_texts=2)
    frequent = table(REPEATED_HEADINGS, repeated_rows(split.texts)) if split.texts.repeated else ""
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


BAR = 20  # characters of the longest


EIGHTHS = " ▏▎▍▌▋▊▉"


NUM_CHARACTERS = 5


def tables(inspection: Inspection) -> list[RenderableType]:
    splits = inspection.splits
    shown: list[RenderableType] = [listed(inspection.name, SPLIT_HEADINGS, [split_rows(splits)])]
    shown.append(listed("lengths", LENGTH_HEADINGS, map(length_rows, splits), num_texts=2))
    for split in splits[:1]:
        drawn = [histogram(f"{split.split}: {name}", split.histograms[name]) for name in DRAWN if split.histograms]
        shown.append(Columns(drawn, padding=(1, 3)))
    speakers = [group_rows(splits, by) for by in GROUPS]
    shown += [
        listed(batch_title(inspection.settings), BATCH_HEADINGS, map(batch_rows, splits), num_texts=2),
        listed("who speaks", GROUP_HEADINGS, speakers, num_texts=3),
        listed("audio", SOUND_HEADINGS, [[sound_row(each.split, each.sounds) for each in splits]], 2),
        listed("texts", TEXT_HEADINGS, [map(text_row, splits)]),
        *(rare_characters(split) for split in splits[:1]),
        listed("skipped", SKIPPED_HEADINGS, map(skipped_rows, splits), num_texts=3),
        strangest(inspection),
        to_look_at(findings(inspection)),
    ]
    return shown


def rare_characters(split: SplitSummary) -> RenderableType:
    rows = character_rows(split.texts, NUM_CHARACTERS)
    return listed(f"{split.split}: rarest characters", CHARACTER_HEADINGS, [rows], num_texts=2)


def listed(
    title: str, headings: Sequence[str], sections: Iterable[Iterable[Row]], num_texts: int = 1
) -> RenderableType:
    """A table of which the first columns hold words and the others numbers; nothing where it has no row."""
    table = Table(title=Text(title), title_justify="left")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < num_texts else "right", overflow="fold")
    for rows in sections:
        for cells in rows:
            table.add_row(*map(Text, cells))
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
    return Lines(Text(title, style="italic"), grid)


def bar(share: float) -> str:
    """A share of the longest bar, to an eighth of a character; never nothing where there is something."""
    eighths = max(round(share * BAR * 8), int(share > 0))
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def strangest(inspection: Inspection) -> RenderableType:
    rows = [(each.id, "; ".join(each.reasons), cut(each.text)) for each in inspection.strangest]
    return listed("the strangest utterances", STRANGE_HEADINGS, [rows], num_texts=3)


def to_look_at(findings: Sequence[str]) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    for finding in findings or ["nothing out of the ordinary"]:
        grid.add_row(" ·", Text(finding))
    return Lines(Text("what to look at"), grid)
