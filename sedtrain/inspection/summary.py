"""Everything that an inspection finds, as `inspect.json` holds it."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sedtrain.batch import Skipped
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.inspection import statistics
from sedtrain.inspection.sound import Sound, listen
from sedtrain.inspection.splits import SplitEntries, read_corpus
from sedtrain.inspection.statistics import Batching, Floats, Group, Histogram, Numbers, Spread
from sedtrain.run_dir import write_whole

NUM_DECODED = 200  # utterances of a split, drawn at random
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
    """Distinct texts, utterances that share theirs with another, the most frequent texts; characters, unseen but spaces."""

    num_distinct: int
    num_repeated: int
    repeated: dict[str, int]
    num_characters: int
    rarest: list[Use]
    unseen: list[Use]

    @classmethod
    def of(cls, split: SplitEntries) -> "Texts":
        texts = [entry.text.strip() for entry in split.entries]
        counts = Counter(texts)
        several = {text: count for text, count in counts.most_common() if count > 1}
        frequent = dict(list(several.items())[:NUM_REPEATED])
        first_uses = statistics.first_uses(texts).items()
        uses = [Use(character, times, split.entries[i].id, texts[i]) for character, (times, i) in first_uses]
        unseen = [use for use in uses if not use.character.isprintable()]
        return cls(len(counts), sum(several.values()), frequent, len(uses), uses[:NUM_RAREST], unseen)


@dataclass(frozen=True)
class Overlap:
    """Speakers that are also in the training split, and utterances whose text is."""

    num_speakers: int
    num_texts: int

    @classmethod
    def of(cls, split: SplitEntries, train: SplitEntries) -> "Overlap":
        speakers, train_speakers = ({entry.speaker for entry in each.entries} - {None} for each in (split, train))
        train_texts = {entry.text.strip() for entry in train.entries}
        return cls(len(speakers & train_speakers), sum(entry.text.strip() in train_texts for entry in split.entries))


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

    @classmethod
    def of(cls, split: SplitEntries, sounds: Mapping[int, Sound], num_decoded: int) -> "Sounds":
        """sounds: by index of their entry"""
        levels = np.array([sound.level for sound in sounds.values()])
        named = [(split.entries[index], sound) for index, sound in sounds.items()]
        return cls(
            num_decoded,
            num_decoded - len(sounds),
            dict(Counter(sound.sampling_rate for sound in sounds.values()).most_common()),
            dict(Counter(sound.num_channels for sound in sounds.values()).most_common()),
            dict(Counter(sound.format for sound in sounds.values()).most_common()),
            Spread.of(levels) if sounds else None,
            Histogram.of(levels) if sounds else None,
            Spread.of(np.array([sound.silence for sound in sounds.values()])) if sounds else None,
            [entry.id for entry, sound in named if sound.is_clipped],
            [entry.id for entry, sound in named if abs(sound.seconds - entry.seconds) > DECLARED_TOLERANCE],
        )


@dataclass(frozen=True)
class SkippedFor:
    """Utterances that training would skip for one reason; `hours` counts those whose length is known."""

    reason: str
    num_utterances: int
    hours: float
    examples: list[str]

    @classmethod
    def each(cls, split: SplitEntries) -> "list[SkippedFor]":
        """By reason, the most frequent first."""
        found = []
        for reason, count in Counter(utterance.reason for utterance, _ in split.skipped).most_common():
            skipped = [(utterance, seconds) for utterance, seconds in split.skipped if utterance.reason == reason]
            hours = sum(seconds or 0.0 for _, seconds in skipped) / 3600
            examples = [f"{id} ({detail})" if detail else id for (id, _, detail, _), _ in skipped[:NUM_EXAMPLES]]
            found.append(cls(reason, count, hours, examples))
        return found


@dataclass(frozen=True)
class SplitSummary:
    """One split: `num_read` rows, of which training would use `num_utterances`.

    spreads, histograms: of seconds, characters, words, characters per second
    groups:              by dataset, language, speaker
    """

    split: str
    is_whole: bool
    num_read: int
    num_utterances: int
    hours: float
    spreads: dict[str, Spread]
    histograms: dict[str, Histogram]
    groups: dict[str, list[Group]]
    batches: list[Batching]
    texts: Texts
    sounds: Sounds
    skipped: list[SkippedFor]
    overlap: Overlap | None

    @classmethod
    def of(
        cls, split: SplitEntries, sounds: Sounds, data: SpeechTextDataModule, train: SplitEntries | None
    ) -> "SplitSummary":
        entries, seconds = split.entries, split.seconds
        num_characters = np.array([len(entry.text.strip()) for entry in entries], dtype=np.int64)
        measures: dict[str, Numbers] = {
            "seconds": seconds,
            "characters": num_characters,
            "words": np.array([len(entry.text.split()) for entry in entries], dtype=np.int64),
            "characters per second": num_characters / np.maximum(seconds, 1e-3),
        }
        names = {by: [getattr(entry, by) for entry in entries] for by in ("dataset", "language", "speaker")}
        shuffle = split.split == "train"
        block = data.block_utterances if shuffle and data.corpus.streaming else None
        bounds = (data.bounds.batch_seconds, data.bounds.num_buckets, data.seed)
        return cls(
            split.split,
            split.is_whole,
            split.num_read,
            len(entries),
            float(seconds.sum()) / 3600,
            {name: Spread.of(values) for name, values in measures.items() if entries},
            {name: Histogram.of(values) for name, values in measures.items() if entries},
            {by: statistics.groups_of(values, seconds) for by, values in names.items()},
            statistics.batchings(seconds, *bounds, shuffle=shuffle, block=block) if entries else [],
            Texts.of(split),
            sounds,
            SkippedFor.each(split),
            None if train is None or train is split else Overlap.of(split, train),
        )

    @property
    def num_skipped(self) -> int:
        return sum(reason.num_utterances for reason in self.skipped)


@dataclass(frozen=True)
class Strange:
    """An outlier: its reasons, such as `38.07 s long, median 1.50 s`, the worst first, with the score of the worst."""

    split: str
    number: int
    id: str
    text: str
    seconds: float
    score: float
    reasons: list[str]


@dataclass(frozen=True)
class Inspection:
    """All splits of a dataset with that public name; `absent` gives a reason for each split that cannot be read."""

    name: str
    settings: dict[str, float | int | None]
    splits: list[SplitSummary]
    absent: dict[str, str]
    strangest: list[Strange]

    def write(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def inspected(data: SpeechTextDataModule, most: int | None) -> tuple[Inspection, list[SplitEntries]]:
    """The inspection, and the entries it is made from. Raises UserError where no split can be read.

    most: rows of a streamed split; None: all
    """
    splits, absent = read_corpus(data.corpus, most)
    train = next((split for split in splits if split.split == "train"), None)
    summaries, sounds = [], []
    for split in splits:
        decoded = decode_some(split, data.seed)
        audible = {index: sound for index, sound in decoded.items() if isinstance(sound, Sound)}
        refused = [(each, split.entries[index].seconds) for index, each in decoded.items() if isinstance(each, Skipped)]
        split.skipped += refused
        data.skipped.note([utterance for utterance, _ in split.skipped])
        summaries.append(SplitSummary.of(split, Sounds.of(split, audible, len(decoded)), data, train))
        sounds.append(audible)
    options = ("batch_seconds", "batch_tokens", "num_buckets")
    settings = {f"data.{option}": getattr(data.bounds, option) for option in options}
    return Inspection(data.corpus.public_name, settings, summaries, absent, strangest(splits, sounds)), splits


def decode_some(split: SplitEntries, seed: int) -> dict[int, Sound | Skipped]:
    """Utterances drawn at random, by index of their entry."""
    number = min(NUM_DECODED, len(split.entries))
    drawn = sorted(np.random.default_rng(seed).choice(len(split.entries), number, replace=False).tolist())
    return dict(zip(drawn, listen(split.parts, [split.entries[index].reference for index in drawn]), strict=True))


def strangest(splits: Sequence[SplitEntries], sounds: Sequence[Mapping[int, Sound]]) -> list[Strange]:
    """Utterances of all splits with the highest scores; the score of an utterance is its highest of any feature."""
    located = [(split, index) for split in splits for index in range(len(split.entries))]
    if not located:
        return []
    values = np.concatenate([features(*each) for each in zip(splits, sounds, strict=True)], axis=1)
    sizes = np.empty_like(values)
    for row, (_, least_sigma, is_log) in enumerate(FEATURES):
        scores = statistics.robust_scores(np.log(values[row]) if is_log else values[row], least_sigma)
        sizes[row] = np.abs(np.nan_to_num(scores))
    found = []
    for column in np.argsort(-sizes.max(axis=0), kind="stable")[:NUM_STRANGE].tolist():
        split, index = located[column]
        _, id, seconds, text, *_ = split.entries[index]
        by_size = np.argsort(-sizes[:, column]).tolist()
        shown = [row for row in by_size if sizes[row, column] >= STRANGE] or by_size[:1]
        reasons = [FEATURES[row][0].format(values[row, column], np.nanmedian(values[row])) for row in shown]
        found.append(Strange(split.split, index, id, text, seconds, float(sizes[by_size[0], column]), reasons))
    return found


def features(split: SplitEntries, sounds: Mapping[int, Sound]) -> Floats:
    """(F, N) in the order of FEATURES; NaN where an utterance is not in `sounds`."""
    values = np.full((len(FEATURES), len(split.entries)), np.nan)
    values[0] = np.maximum(split.seconds, 1e-3)
    values[1] = [max(len(entry.text.strip()), 1) for entry in split.entries]
    values[2] = values[1] / values[0]
    for index, sound in sounds.items():
        values[3:, index] = sound.level, 100 * sound.silence, sound.seconds - split.entries[index].seconds
    return values
