"""Summarizes the splits of a corpus, as `inspect.json` holds them."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sedtrain.batch import Skipped
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.inspection import statistics
from sedtrain.inspection.splits import Entry, SplitEntries, read_corpus
from sedtrain.inspection.statistics import Batching, Floats, Group, Histogram, Numbers, Spread
from sedtrain.run_dir import write_whole

NUM_RAREST, NUM_REPEATED, NUM_EXAMPLES, NUM_STRANGE = 12, 5, 3, 10
DECLARED_TOLERANCE = 0.1  # seconds
STRANGE = 3.5  # robust standard deviations; of normal values one in 2,000 is farther off
FEATURES = (  # text with value and median, smallest standard deviation, whether it is that of the logarithm
    ("{:.2f} s long, median {:.2f} s", 0.05, True),
    ("{:.0f} characters, median {:.0f}", 0.05, True),
    ("{:.1f} characters per second, median {:.1f}", 0.05, True),
    ("{:.1f} dBFS, median {:.1f}", 1.0, False),
    ("{:.0f} % silent, median {:.0f} %", 15.0, False),
    ("{:+.2f} s against what is declared", 0.1, False),
)


@dataclass(frozen=True)
class Use:
    """A character, its count, and the first utterance with it."""

    character: str
    times: int
    id: str
    text: str


@dataclass(frozen=True)
class Texts:
    """Distinct texts, utterances that share theirs, the most frequent texts; characters, rarest and invisible ones."""

    num_distinct: int
    num_repeated: int
    repeated: dict[str, int]
    num_characters: int
    rarest: list[Use]
    unseen: list[Use]


@dataclass(frozen=True)
class Overlap:
    """Speakers, and utterances with texts, that also occur in training."""

    num_speakers: int
    num_texts: int


@dataclass(frozen=True)
class Sounds:
    """Decoded utterances: counts by stored format, level in dBFS, share of silence; ids where something is wrong.

    num_refused: those that could not be decoded, or that training refuses
    misdeclared: of another length than their row says
    """

    num_decoded: int
    num_refused: int
    sampling_rates: dict[int, int]
    channels: dict[int, int]
    formats: dict[str, int]
    level: Spread | None
    levels: Histogram | None
    silence: Spread | None
    clipped: list[str]
    misdeclared: list[str]


@dataclass(frozen=True)
class SkippedFor:
    """Utterances that training would skip for one reason; `hours` counts those whose length is known."""

    reason: str
    num_utterances: int
    hours: float
    examples: list[str]


@dataclass(frozen=True)
class SplitSummary:
    """One split: training would use `num_utterances` of `num_read` rows.

    spreads, histograms: of seconds, characters, words, characters per second
    groups:              by dataset, language, speaker
    """

    split: str
    is_whole: bool
    num_read: int
    num_utterances: int
    num_skipped: int
    hours: float
    spreads: dict[str, Spread]
    histograms: dict[str, Histogram]
    groups: dict[str, list[Group]]
    batches: list[Batching]
    texts: Texts
    sounds: Sounds
    skipped: list[SkippedFor]
    overlap: Overlap | None


@dataclass(frozen=True)
class Strange:
    """An outlier with the reasons, such as `38.07 s long, median 1.50 s`, worst first; `score` is that of the worst."""

    split: str
    number: int
    id: str
    text: str
    seconds: float
    score: float
    reasons: list[str]


@dataclass(frozen=True)
class Inspection:
    """All splits of the dataset `name`; `absent` holds the error of each unreadable split."""

    name: str
    settings: dict[str, float | int | None]
    splits: list[SplitSummary]
    absent: dict[str, str]
    strangest: list[Strange]

    def write(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def inspected(data: SpeechTextDataModule, most: int | None) -> tuple[Inspection, list[SplitEntries]]:
    """Inspects all readable splits, and returns their entries too. Raises UserError if there is none.

    most: rows of a streamed split; None: all
    """
    splits, absent = read_corpus(data.corpus, most)
    for split in splits:
        split.decode_some(data.seed)
        data.skipped.note([utterance for utterance, _ in split.skipped], split.split)
    train = next((split for split in splits if split.split == "train"), None)
    settings = {f"data.{name}": getattr(data.bounds, name) for name in ("batch_seconds", "batch_tokens", "num_buckets")}
    summaries = [summarize(split, data, train) for split in splits]
    return Inspection(data.corpus.public_name, settings, summaries, absent, strangest(splits)), splits


def summarize(split: SplitEntries, data: SpeechTextDataModule, train: SplitEntries | None) -> SplitSummary:
    entries, seconds = split.entries, split.seconds
    num_characters = np.array([len(entry.text) for entry in entries], dtype=np.int64)
    num_words = np.array([len(entry.text.split()) for entry in entries], dtype=np.int64)
    measures: dict[str, Numbers] = {"seconds": seconds, "characters": num_characters, "words": num_words}
    measures["characters per second"] = num_characters / np.maximum(seconds, 1e-3)
    names = {by: [getattr(entry, by) for entry in entries] for by in ("dataset", "language", "speaker")}
    shuffle = split.split == "train"
    block = data.block_utterances if shuffle and data.corpus.streaming else None
    bounds = (data.bounds.batch_seconds, data.bounds.num_buckets, data.seed)
    return SplitSummary(
        split=split.split,
        is_whole=split.is_whole,
        num_read=split.num_read,
        num_utterances=len(entries),
        num_skipped=len(split.skipped),
        hours=float(seconds.sum()) / 3600,
        spreads={name: Spread.of(values) for name, values in measures.items() if entries},
        histograms={name: Histogram.of(values) for name, values in measures.items() if entries},
        groups={by: statistics.groups_of(values, seconds) for by, values in names.items()},
        batches=statistics.batchings(seconds, *bounds, shuffle=shuffle, block=block) if entries else [],
        texts=summarize_texts(entries),
        sounds=summarize_sounds(split),
        skipped=group_skipped(split.skipped),
        overlap=None if train is None or train is split else find_overlap(entries, train.entries),
    )


def summarize_texts(entries: Sequence[Entry]) -> Texts:
    texts = [entry.text for entry in entries]
    counts = Counter(texts)
    several = [(text, count) for text, count in counts.most_common() if count > 1]
    uses = [Use(character, n, entries[i].id, texts[i]) for character, (n, i) in statistics.first_uses(texts).items()]
    unseen = [use for use in uses if not use.character.isprintable()]
    num_repeated, repeated = sum(count for _, count in several), dict(several[:NUM_REPEATED])
    return Texts(len(counts), num_repeated, repeated, len(uses), uses[:NUM_RAREST], unseen)


def find_overlap(entries: Sequence[Entry], train: Sequence[Entry]) -> Overlap:
    speakers = {entry.speaker for entry in entries} & {entry.speaker for entry in train} - {None}
    texts = {entry.text for entry in train}
    return Overlap(len(speakers), sum(entry.text in texts for entry in entries))


def summarize_sounds(split: SplitEntries) -> Sounds:
    sounds, named = split.sounds.values(), [(split.entries[index], sound) for index, sound in split.sounds.items()]
    levels = np.array([sound.level for sound in sounds])
    return Sounds(
        num_decoded=split.num_drawn,
        num_refused=split.num_drawn - len(sounds),
        sampling_rates=dict(Counter(sound.sampling_rate for sound in sounds).most_common()),
        channels=dict(Counter(sound.num_channels for sound in sounds).most_common()),
        formats=dict(Counter(sound.format for sound in sounds).most_common()),
        level=Spread.of(levels) if sounds else None,
        levels=Histogram.of(levels) if sounds else None,
        silence=Spread.of(np.array([sound.silence for sound in sounds])) if sounds else None,
        clipped=[entry.id for entry, sound in named if sound.is_clipped],
        misdeclared=[entry.id for entry, sound in named if abs(sound.seconds - entry.seconds) > DECLARED_TOLERANCE],
    )


def group_skipped(skipped: Iterable[tuple[Skipped, float | None]]) -> list[SkippedFor]:
    """Groups by reason, the most frequent first."""
    groups: dict[str, list[tuple[str, float]]] = {}
    for (id, reason, detail, _), seconds in skipped:
        groups.setdefault(reason, []).append((f"{id} ({detail})" if detail else id, seconds or 0.0))
    found = []
    for reason, utterances in sorted(groups.items(), key=lambda group: -len(group[1])):
        examples, seconds_each = zip(*utterances, strict=True)
        found.append(SkippedFor(reason, len(utterances), sum(seconds_each) / 3600, list(examples[:NUM_EXAMPLES])))
    return found


def strangest(splits: Sequence[SplitEntries]) -> list[Strange]:
    """Utterances of all splits with the highest scores; each is scored by its most unusual feature."""
    located = [(split, index) for split in splits for index in range(len(split.entries))]
    if not located:
        return []
    values = np.concatenate(list(map(features, splits)), axis=1)
    scores = [
        statistics.robust_scores(np.log(row) if is_log else row, sigma)
        for row, (_, sigma, is_log) in zip(values, FEATURES, strict=True)
    ]
    sizes = np.abs(np.nan_to_num(scores))
    found = []
    for column in np.argsort(-sizes.max(axis=0), kind="stable")[:NUM_STRANGE].tolist():
        split, index = located[column]
        entry = split.entries[index]
        by_size = np.argsort(-sizes[:, column]).tolist()
        shown = [row for row in by_size if sizes[row, column] >= STRANGE] or by_size[:1]
        reasons = [FEATURES[row][0].format(values[row, column], np.nanmedian(values[row])) for row in shown]
        score = float(sizes[:, column].max())
        found.append(Strange(split.split, index, entry.id, entry.text, entry.seconds, score, reasons))
    return found


def features(split: SplitEntries) -> Floats:
    """(F, N) values in the order of FEATURES; NaN where an utterance was not decoded."""
    values = np.full((len(FEATURES), len(split.entries)), np.nan)
    values[0] = np.maximum(split.seconds, 1e-3)
    values[1] = [max(len(entry.text), 1) for entry in split.entries]
    values[2] = values[1] / values[0]
    for index, sound in split.sounds.items():
        values[3:, index] = sound.level, 100 * sound.silence, sound.seconds - split.entries[index].seconds
    return values
