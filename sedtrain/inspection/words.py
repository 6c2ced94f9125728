"""How an inspection is put into words, alike in the terminal and on the page."""

import unicodedata
from collections.abc import Mapping, Sequence

from sedtrain.inspection.statistics import Batching, Group, Spread
from sedtrain.inspection.summary import Inspection, Sounds, SplitSummary
from sedtrain.inspection.texts import Overlap, Texts

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
