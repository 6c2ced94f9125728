"""Summarizes the splits of a corpus for `inspect.json`."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from math import ceil, floor, isnan, log10
from pathlib import Path

import numpy as np

from sedtrain.batch import Skipped
from sedtrain.data.buckets import Bounds, Floats, Integers
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.data.sampler import DurationBatches
from sedtrain.inspection.splits import Entry, SplitEntries, Strange, read_corpus, strangest
from sedtrain.run_dir import write_whole

Numbers = Floats | Integers

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
NUM_BINS = 14
TAIL = 99  # percentile; values beyond it share the last bin of a histogram
NUM_RAREST, NUM_REPEATED, NUM_EXAMPLES = 12, 5, 3
DECLARED_TOLERANCE = 0.1  # seconds


class Spread:
    """Mean of some values, and their percentiles by number."""

    def __init__(self, values: Numbers) -> None:
        numbers: list[float] = np.percentile(values, PERCENTILES).tolist()
        self.mean, self.percentiles = float(np.mean(values)), dict(zip(PERCENTILES, numbers, strict=True))


class Histogram:
    """Counts between round edges; edges are integers if the values are.

    The last bin includes its upper edge. It is wider than the others if it holds far outliers.
    """

    def __init__(self, values: Numbers) -> None:
        least, most = float(values.min()), float(values.max())
        tail = float(np.percentile(values, TAIL))
        step = round_step((tail - least) / NUM_BINS)
        if np.issubdtype(values.dtype, np.integer):
            step = max(step, 1.0)
        first = floor(least / step)
        last = max(ceil(tail / step), first + 1)
        self.edges = [round(number * step, 9) for number in range(first, last + 1)]
        if most > self.edges[-1]:
            self.edges.append(max(most, round((last + 1) * step, 9)))
        self.counts: list[int] = np.histogram(values, self.edges)[0].tolist()

    def labels(self) -> list[str]:
        """Edges as text, with the decimals that a bin's width needs."""
        step = self.edges[1] - self.edges[0]
        return [f"{edge:,.{max(0, ceil(-log10(step) - 1e-9))}f}" for edge in self.edges]


def round_step(least: float) -> float:
    """Smallest of 1, 2, 5 times a power of ten that is at least `least`."""
    if least <= 0:
        return 1.0
    power = 10.0 ** floor(log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


class Batching:
    """Batches of utterances; `padding` is a share of the padded audio, `largest_seconds` includes padding."""

    def __init__(self, name: str, seconds: Floats, batches: Sequence[Sequence[int]]) -> None:
        padded = np.array([len(batch) * seconds[batch].max() for batch in batches])
        self.name, self.num_batches, self.mean_utterances = name, len(batches), len(seconds) / len(batches)
        self.padding, self.largest_seconds = 1 - float(seconds.sum() / padded.sum()), float(padded.max())


def batchings(seconds: Floats, bounds: Bounds, seed: int, *, shuffle: bool, block: int | None) -> list[Batching]:
    """One epoch batched as in training, then in a single bucket, then into as many random batches.

    block: number of utterances of a stream that are batched together; None: all
    """

    def planned(number: int) -> Batching:
        batches: list[list[int]] = []
        for start in range(0, len(seconds), size):
            some = seconds[start : start + size]
            plan = DurationBatches(some, Bounds(bounds.batch_seconds, num_buckets=number), shuffle=shuffle, seed=seed)
            batches += [[start + index for index in batch] for batch in plan]
        return Batching(f"{number} bucket{'s' * (number > 1)}", seconds, batches)

    size = block or len(seconds)
    found = [planned(number) for number in dict.fromkeys([bounds.num_buckets, 1])]
    drawn = np.array_split(np.random.default_rng(seed).permutation(len(seconds)), found[0].num_batches)
    return [*found, Batching("as many at random", seconds, [batch.tolist() for batch in drawn])]


@dataclass(frozen=True)
class Group:
    """Utterances of one speaker, language or dataset."""

    name: str
    num_utterances: int
    hours: float


def groups_of(names: Sequence[str | None], seconds: Floats) -> list[Group]:
    """Groups utterances by name, most audio first; leaves out utterances without a name."""
    lengths: dict[str | None, list[float]] = {}
    for name, length in zip(names, seconds.tolist(), strict=True):
        lengths.setdefault(name, []).append(length)
    groups = [Group(name, len(each), sum(each) / 3600) for name, each in lengths.items() if name is not None]
    return sorted(groups, key=lambda group: (-group.hours, group.name))


@dataclass(frozen=True)
class Use:
    """A character, its count, and the first utterance with it."""

    character: str
    times: int
    id: str
    text: str


class Texts:
    """Counts of distinct and repeated texts, and of characters; lists frequent texts, rare and invisible characters."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        texts = Counter(entry.text for entry in entries)
        shared = {text: count for text, count in texts.most_common() if count > 1}
        times = Counter(chain.from_iterable(texts.elements()))
        first = {character: entry for entry in reversed(entries) for character in set(entry.text)}
        rarest = sorted(times, key=lambda character: (times[character], character))
        uses = [Use(character, times[character], first[character].id, first[character].text) for character in rarest]
        self.num_distinct, self.num_repeated = len(texts), sum(shared.values())
        self.repeated = dict(list(shared.items())[:NUM_REPEATED])
        self.num_characters, self.rarest = len(uses), uses[:NUM_RAREST]
        self.unseen = [use for use in uses if not use.character.isprintable()]


class Overlap:
    """Numbers of speakers, and of utterances by their texts, that also occur in training."""

    def __init__(self, entries: Sequence[Entry], train: Sequence[Entry]) -> None:
        self.num_speakers = len({entry.speaker for entry in entries} & {entry.speaker for entry in train} - {None})
        texts = {entry.text for entry in train}
        self.num_texts = sum(entry.text in texts for entry in entries)


class Sounds:
    """Measures of the decoded utterances: counts by stored format, level in dBFS, share of silence.

    num_refused: number of drawn utterances that could not be decoded or that training refuses
    clipped:     ids of clipped utterances
    misdeclared: ids of utterances of another length than declared
    """

    def __init__(self, split: SplitEntries) -> None:
        heard = [(entry, entry.sound) for entry in split.entries if entry.sound]
        sounds = [sound for _, sound in heard]
        levels, silences = (np.array([getattr(sound, name) for sound in sounds]) for name in ("level", "silence"))
        self.num_decoded, self.num_refused = split.num_drawn, split.num_drawn - len(heard)
        self.sampling_rates = dict(Counter(sound.sampling_rate for sound in sounds).most_common())
        self.channels = dict(Counter(sound.num_channels for sound in sounds).most_common())
        self.formats = dict(Counter(sound.format for sound in sounds).most_common())
        self.level = Spread(levels) if heard else None
        self.levels = Histogram(levels) if heard else None
        self.silence = Spread(silences) if heard else None
        self.clipped = [entry.id for entry, sound in heard if sound.is_clipped]
        wrong = [entry for entry, sound in heard if abs(sound.seconds - entry.seconds) > DECLARED_TOLERANCE]
        self.misdeclared = [entry.id for entry in wrong]


@dataclass(frozen=True)
class SkippedFor:
    """Utterances that training would skip for one reason. `hours` leaves out utterances of unknown length."""

    reason: str
    num_utterances: int
    hours: float
    examples: list[str]


def group_skipped(skipped: Iterable[tuple[Skipped, float]]) -> list[SkippedFor]:
    """Groups skipped utterances by reason, most frequent first."""
    groups: dict[str, list[tuple[str, float]]] = {}
    for (id, reason, detail, _), seconds in skipped:
        groups.setdefault(reason, []).append((f"{id} ({detail})" if detail else id, 0.0 if isnan(seconds) else seconds))
    return [
        SkippedFor(reason, len(found), sum(each for _, each in found) / 3600, [id for id, _ in found[:NUM_EXAMPLES]])
        for reason, found in sorted(groups.items(), key=lambda group: -len(group[1]))
    ]


class SplitSummary:
    """Summary of one split; training would use `num_utterances` of its `num_read` rows.

    spreads, histograms: of seconds, characters, words, characters per second
    groups:              by dataset, language, speaker
    """

    def __init__(self, split: SplitEntries, data: SpeechTextDataModule, train: SplitEntries | None) -> None:
        entries, is_train = split.entries, split.split == "train"
        seconds = np.array([entry.seconds for entry in entries], dtype=np.float64)
        num_characters = np.array([len(entry.text) for entry in entries], dtype=np.int64)
        num_words = np.array([len(entry.text.split()) for entry in entries], dtype=np.int64)
        measures: dict[str, Numbers] = {"seconds": seconds, "characters": num_characters, "words": num_words}
        measures["characters per second"] = num_characters / np.maximum(seconds, 1e-3)
        names = {by: [getattr(entry, by) for entry in entries] for by in ("dataset", "language", "speaker")}
        block = data.corpus.block_rows if is_train else None
        batches = batchings(seconds, data.bounds, data.seed, shuffle=is_train, block=block) if entries else []
        self.split, self.is_whole, self.num_read = split.split, split.is_whole, split.num_read
        self.num_utterances, self.num_skipped = len(entries), len(split.skipped)
        self.hours = float(seconds.sum()) / 3600
        self.spreads = {name: Spread(values) for name, values in measures.items() if entries}
        self.histograms = {name: Histogram(values) for name, values in measures.items() if entries}
        self.groups = {by: groups_of(values, seconds) for by, values in names.items()}
        self.batches, self.texts, self.sounds = batches, Texts(entries), Sounds(split)
        self.skipped = group_skipped(split.skipped)
        self.overlap = None if train is None or train is split else Overlap(entries, train.entries)


@dataclass(frozen=True)
class Inspection:
    """All splits of the dataset `name`; `absent` holds the error of each unreadable split."""

    name: str
    settings: dict[str, float | int | None]
    splits: list[SplitSummary]
    absent: dict[str, str]
    strangest: list[Strange]

    def write(self, path: Path) -> None:
        write_whole(path, json.dumps(self, default=vars, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def inspected(data: SpeechTextDataModule, most: int | None) -> tuple[Inspection, list[SplitEntries]]:
    """Inspects all readable splits; also returns their entries. Raises UserError if no split is readable.

    most: rows to read of a streamed split; None: all
    """
    splits, absent = read_corpus(data.corpus, most)
    for split in splits:
        split.decode_some(data.seed)
        data.skipped.note([utterance for utterance, _ in split.skipped], split.split)
    train = next((split for split in splits if split.split == "train"), None)
    settings = {f"data.{name}": getattr(data.bounds, name) for name in ("batch_seconds", "batch_tokens", "num_buckets")}
    summaries = [SplitSummary(split, data, train) for split in splits]
    return Inspection(data.corpus.public_name, settings, summaries, absent, strangest(splits)), splits
