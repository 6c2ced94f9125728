"""Arranges an inspection in sections: problems first, then the counts."""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sedtrain.evaluation import html
from sedtrain.inspection import summary
from sedtrain.inspection.summary import Histogram, Inspection, Sounds, SplitSummary

DRAWN = ("seconds", "characters", "characters per second")
NUM_NAMES = 5  # of speakers, languages, datasets or characters that are shown
RARE_SHARE = 0.01  # of decoded utterances; a smaller share of clipped ones is not reported
WIDEBAND = 16_000  # hertz; nearly every speech encoder was pretrained on such audio

Cell = str | int | float | None


@dataclass(frozen=True)
class Section:
    """A table; without headings, a list.

    rows:       a first cell that repeats the cell above is shown blank
    num_texts:  number of text columns, from the left; the other columns hold numbers
    histograms: by title, such as `train: seconds`
    sounds:     audio of each row, for the page
    folded:     True if the page shows it closed and the terminal leaves it out
    """

    title: str
    headings: Sequence[str] = ()
    rows: Sequence[Sequence[Cell]] = ()
    num_texts: int = 1
    note: str = ""
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    sounds: Sequence[html.Audio | None] = ()
    folded: bool = False

    def texts(self) -> list[list[str]]:
        """The cells as text, without repeated first cells."""
        above = [None, *(row[0] for row in self.rows)]
        rows = zip(above, self.rows, strict=False)
        return [["" if row[0] == first else in_words(row[0]), *map(in_words, row[1:])] for first, row in rows]


def sections(inspection: Inspection, sounds: Sequence[html.Audio | None] = ()) -> Iterator[Section]:
    """All sections in order. sounds: audio of the strangest utterances."""
    splits = inspection.splits
    absent = [f"{split} is not there: {wrong}" for split, wrong in inspection.absent.items()]
    findings = absent + [f"{split.split}: {text}" for split in splits for text in split_findings(split)]
    yield Section("What to look at", rows=[[text] for text in findings or ["nothing out of the ordinary"]])
    yield from sizes(splits)
    yield padding(inspection)
    yield audio(splits)
    yield from texts(splits)
    skipped = [
        (s.split, group.reason, "; ".join(group.examples), group.num_utterances, duration(group.hours))
        for s in splits
        for group in s.skipped
    ]
    yield Section("Skipped", ("split", "reason", "first of them", "utterances", "audio"), skipped, num_texts=3)
    strange = [(s.split, s.id, "; ".join(s.reasons), s.text, f"{s.score:.1f}") for s in inspection.strangest]
    note = "By robust standard deviations from the median of all splits; level and silence of decoded utterances alone."
    headings = ("split", "utterance", "why", "text", "deviations")
    yield Section("Strangest utterances", headings, strange, num_texts=4, note=note, sounds=sounds)


def sizes(splits: Sequence[SplitSummary]) -> Iterator[Section]:
    """Sections on splits, lengths and speakers."""
    rows: list[Sequence[Cell]] = []
    for s in splits:
        numbers = [len(s.groups[by]) or "unknown" for by in ("speaker", "language")]
        name = s.split if s.is_whole else f"{s.split}, its first"
        rows.append((name, s.num_utterances, f"{s.hours:,.2f}", s.num_skipped, *numbers))
    yield Section("Splits", ("split", "utterances", "hours", "skipped", "speakers", "languages"), rows)
    lengths: list[Sequence[Cell]] = [
        (s.split, measure, spread.mean, *(spread.percentiles[each] for each in (5, 50, 95, 100)))
        for s in splits
        for measure, spread in s.spreads.items()
    ]
    headings = ("split", "of an utterance", "mean", "5 %", "median", "95 %", "most")
    first, *others = ({f"{s.split}: {name}": s.histograms[name] for name in DRAWN if s.histograms} for s in splits)
    yield Section("Lengths", headings, lengths, num_texts=2, histograms=first)
    for s, histograms in zip(splits[1:], others, strict=True):
        yield Section(f"Lengths in {s.split}", histograms=histograms, folded=True)
    groups = [
        (by, s.split, largest(s.groups[by]), len(s.groups[by]))
        for by in ("dataset", "language", "speaker")
        for s in splits
        if s.groups[by]
    ]
    yield Section("Who speaks", ("by", "split", "most audio", "number"), groups, num_texts=3)


def padding(inspection: Inspection) -> Section:
    bounds = {name: value for name, value in inspection.settings.items() if value is not None}
    tokens = bounds.pop("data.batch_tokens", None)
    settings = ", ".join(f"{name}={value}" for name, value in bounds.items())
    uncounted = "" if tokens is None else f" (data.batch_tokens={tokens} is not counted)"
    note = (
        f"Batches by {settings}{uncounted}, of audio as it is stored. Padding is a share of the padded audio. For "
        "comparison: a single bucket, and as many batches drawn at random, whose largest has to fit in memory."
    )
    rows = [
        (s.split, b.name, b.num_batches, f"{b.mean_utterances:.1f}", percent(b.padding), f"{b.largest_seconds:.1f} s")
        for s in inspection.splits
        for b in s.batches
    ]
    return Section("Padding", ("split", "batches of", "number", "utterances", "padding", "largest"), rows, 2, note)


def audio(splits: Sequence[SplitSummary]) -> Section:
    rows = []
    for s in splits:
        level, silence = s.sounds.level, s.sounds.silence
        levels = "{1:.0f} ({0:.0f} to {2:.0f})".format(*(level.percentiles[p] for p in (5, 50, 95))) if level else None
        silent = percent(silence.mean) if silence else None
        rows.append((s.split, stored_as(s.sounds), s.sounds.num_decoded, levels, silent, len(s.sounds.clipped)))
    headings = ("split", "stored as", "decoded", "level, dBFS", "silent", "clipped")
    note = (
        "Utterances drawn at random and decoded. Level: median, and 5 % to 95 %. Silent: 20 ms that are 40 dB below the "
        "loudest. Clipped: three samples in a row at full scale."
    )
    histograms = {f"{s.split}: level, dBFS": s.sounds.levels for s in splits[:1] if s.sounds.levels}
    return Section("Audio", headings, rows, 2, note, histograms)


def texts(splits: Sequence[SplitSummary]) -> Iterator[Section]:
    """Sections on texts, rarest characters and most frequent texts."""
    rows = []
    for s in splits:
        total, speakers, shared = max(s.num_utterances, 1), len(s.groups["speaker"]), s.overlap
        of_speakers = f"{shared.num_speakers:,} of {speakers:,}" if shared and speakers else "unknown"
        also = (percent(shared.num_texts / total), of_speakers) if shared else (None, None)
        rows.append(
            (s.split, s.texts.num_distinct, percent(s.texts.num_repeated / total), s.texts.num_characters, *also)
        )
    headings = ("split", "different\ntexts", "repeated", "characters", "texts\nin train", "speakers\nin train")
    yield Section("Texts", headings, rows)
    for s in splits:
        uses = [(named(use.character), f"{use.id}: {one_line(use.text)}", use.times) for use in s.texts.rarest]
        title, folded = f"Rarest characters in {s.split}", s is not splits[0]
        yield Section(title, ("character", "first in", "times"), uses, num_texts=2, folded=folded)
    frequent = [(s.split, one_line(text), times) for s in splits for text, times in s.texts.repeated.items()]
    yield Section("Most frequent texts", ("split", "text", "times"), frequent, num_texts=2, folded=True)


def split_findings(split: SplitSummary) -> Iterator[str]:
    """Yields problems to check before training, with numbers; omits everything normal."""
    overlap, sounds, decoded = split.overlap, split.sounds, f"{split.sounds.num_decoded:,} decoded"
    if not split.num_utterances:
        yield "there is no utterance that can be used"
    if split.skipped:
        reasons = ", ".join(f"{group.num_utterances:,} {group.reason}" for group in split.skipped)
        yield f"{split.num_skipped:,} of {counted(split.num_read, 'utterance')} would be skipped: {reasons}"
    if unseen := split.texts.unseen:
        names = ", ".join(named(use.character) for use in unseen[:NUM_NAMES])
        yield f"characters that nobody sees: {names} (first in {unseen[0].id})"
    if overlap and overlap.num_speakers:
        yield f"{overlap.num_speakers:,} of {counted(len(split.groups['speaker']), 'speaker')} also in train"
    if overlap and overlap.num_texts:
        share = percent(overlap.num_texts / split.num_utterances)
        yield f"{counted(overlap.num_texts, 'utterance')} ({share}) with a text that is also in train"
    if sounds.num_refused:
        yield f"{sounds.num_refused:,} of {sounds.num_decoded:,} drawn at random cannot be decoded, or are refused"
    if len(sounds.sampling_rates) > 1 or len(sounds.channels) > 1:
        yield f"audio is stored in several ways: {stored_as(sounds)}"
    if narrow := [rate for rate in sounds.sampling_rates if rate < WIDEBAND]:
        yield f"audio at {narrow[0]:,} Hz holds no sound above {narrow[0] // 2:,} Hz"
    if len(sounds.clipped) > RARE_SHARE * sounds.num_decoded:
        yield f"{len(sounds.clipped):,} of {decoded} are clipped (first: {sounds.clipped[0]})"
    if sounds.misdeclared:
        yield f"{len(sounds.misdeclared):,} of {decoded} last not as declared (first: {sounds.misdeclared[0]})"


def largest(groups: Sequence[summary.Group]) -> str:
    """The groups with most audio as text."""
    names = [f"{group.name} {duration(group.hours)} ({group.num_utterances:,})" for group in groups[:NUM_NAMES]]
    return ", ".join(names + ["…"] * (len(groups) > NUM_NAMES))


def stored_as(sounds: Sounds) -> str:
    """Stored formats as text, such as `16 kHz, mono, OGG OPUS`; with counts if there are several."""
    rates = {f"{rate / 1000:g} kHz": count for rate, count in sounds.sampling_rates.items()}
    channels = {{1: "mono", 2: "stereo"}.get(of, f"{of} channels"): count for of, count in sounds.channels.items()}
    parts = [
        " or ".join(f"{name} ({count:,})" if len(counts) > 1 else name for name, count in counts.items())
        for counts in (rates, channels, sounds.formats)
    ]
    return ", ".join(filter(None, parts))


def in_words(cell: Cell) -> str:
    """Integers with thousands separators, floats with about three digits, text unchanged."""
    if cell is None or isinstance(cell, str):
        return cell or ""
    if isinstance(cell, int) or abs(cell) >= 100:
        return f"{cell:,.0f}"
    return (f"{cell:.1f}" if abs(cell) >= 10 else f"{cell:.2f}").rstrip("0").rstrip(".")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def duration(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def one_line(text: str, most: int = 60) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= most else f"{plain[: most - 1]}…"


def named(character: str) -> str:
    """The character and its code point; for an invisible one the code point and its name."""
    code = f"U+{ord(character):04X}"
    if character.isprintable() and not character.isspace() and not unicodedata.combining(character):
        return f"{character}  {code}"
    return f"{code} {unicodedata.name(character, 'control character').lower()}"
