"""Everything that an inspection finds: what `inspect.json` holds, and tables and the page show."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, nan
from pathlib import Path

import numpy as np

from sedtrain.batch import Skipped
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.inspection.statistics import (
    Batching,
    Floats,
    Group,
    Histogram,
    Numbers,
    Overlap,
    Sound,
    SplitColumns,
    Spread,
    Texts,
    batchings,
    groups_of,
    listen,
    overlap,
    read_corpus,
    robust_scores,
    skipped_examples,
    texts_of,
)
from sedtrain.run_dir import write_whole

STRANGE = 3.5  # robust standard deviations; of normal values one in 2,000 is farther off


@dataclass(frozen=True)
class Feature:
    """Something that every utterance has.

    words:       for people
    least_sigma: smaller deviations are none
    is_log:      whether the logarithm is looked at, since it is distributed evenly to both sides
    """

    words: str
    least_sigma: float
    is_log: bool = False


FEATURES = (
    Feature("{:.2f} s long, median {:.2f} s", 0.05, is_log=True),
    Feature("{:.0f} characters, median {:.0f}", 0.05, is_log=True),
    Feature("{:.1f} characters per second, median {:.1f}", 0.05, is_log=True),
    Feature("{:.1f} dBFS, median {:.1f}", 1.0),
    Feature("{:.0f} % silent, median {:.0f} %", 15.0),
    Feature("{:+.2f} s against what is declared", 0.1),
)


@dataclass(frozen=True)
class Strange:
    """An utterance with the reasons, such as `38.07 s long, median 1.50 s`, the worst first, and the score of that."""

    split: str
    number: int
    id: str
    text: str
    seconds: float
    score: float
    reasons: list[str]


def features_of(columns: SplitColumns, sounds: Mapping[int, Sound]) -> Floats:
    """(F, N) in the order of FEATURES; NaN for what was not decoded, whose numbers `sounds` lacks."""
    seconds, characters = columns.seconds, np.maximum(columns.num_characters, 1)
    values = np.full((len(FEATURES), len(columns)), nan)
    values[0], values[1] = np.log(np.maximum(seconds, 1e-3)), np.log(characters)
    values[2] = values[1] - values[0]
    for number, sound in sounds.items():
        values[3:, number] = sound.level, 100 * sound.silence, sound.seconds - seconds[number]
    return values


def strangest(splits: Sequence[SplitColumns], sounds: Sequence[Mapping[int, Sound]], most: int) -> list[Strange]:
    """The utterances of all splits with the highest scores, of which one is that of its strangest feature."""
    places = [(columns, number) for columns in splits for number in range(len(columns))]
    if not places:
        return []
    values = np.concatenate([features_of(*each) for each in zip(splits, sounds, strict=True)], axis=1)
    scores = np.array([robust_scores(row, feature.least_sigma) for row, feature in zip(values, FEATURES, strict=True)])
    sizes = np.abs(np.nan_to_num(scores))
    found = []
    for place in np.argsort(-sizes.max(axis=0), kind="stable")[:most].tolist():
        columns, number = places[place]
        by_size = np.argsort(-sizes[:, place]).tolist()
        told = [row for row in by_size if sizes[row, place] >= STRANGE] or by_size[:1]
        reasons = [reason(FEATURES[row], values[row, place], float(np.nanmedian(values[row]))) for row in told]
        score = float(sizes[by_size[0], place])
        lengths = columns.lengths[number]
        found.append(
            Strange(columns.split, number, columns.ids[number], columns.texts[number], lengths, score, reasons)
        )
    return found


def reason(feature: Feature, value: float, median: float) -> str:
    return feature.words.format(*(map(exp, (value, median)) if feature.is_log else (value, median)))


NUM_DECODED = 200  # utterances of a split


NUM_STRANGE = 10


DECLARED_TOLERANCE = 0.1  # seconds


@dataclass(frozen=True)
class Left:
    """What would be left out for one reason; hours: of those whose length is known."""

    reason: str
    num_utterances: int
    hours: float
    examples: list[str]


@dataclass(frozen=True)
class Sounds:
    """Of utterances drawn at random, some of them refused: counts by what headers say, levels in dBFS, shares of silence.

    clipped, misdeclared: ids of those with samples in a row at full scale, and of another length than declared
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
class SplitSummary:
    """One split.

    num_read, num_utterances: rows, and those that would be used as far as is known without decoding
    spreads, histograms:      of seconds, characters, words, characters per second
    groups:                   by dataset, language, speaker
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
    skipped: list[Left]
    overlap: Overlap | None

    @property
    def num_skipped(self) -> int:
        return sum(each.num_utterances for each in self.skipped)


@dataclass(frozen=True)
class Inspection:
    """All splits together.

    name:     of the data, for people
    settings: options that the batches follow from
    absent:   splits that cannot be read, with the reason
    """

    name: str
    settings: dict[str, float | int | None]
    splits: list[SplitSummary]
    absent: dict[str, str]
    strangest: list[Strange]

    def write(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def inspected(data: SpeechTextDataModule, most: int | None) -> tuple[Inspection, list[SplitColumns]]:
    """What is in the data, and its columns. Raises UserError where none of its splits can be read.

    most: of a stream, how many utterances of a split are read; None: all
    """
    columns, absent = read_corpus(data.corpus, most)
    heard = [decoded(each, data.seed) for each in columns]
    for each, sounds in zip(columns, heard, strict=True):
        each.refuse({number: sound for number, sound in sounds.items() if isinstance(sound, Skipped)})
        data.skipped.note(each.skipped)
    train = next((each for each in columns if each.split == "train"), None)
    splits = [summary(each, sounds, data, train) for each, sounds in zip(columns, heard, strict=True)]
    audible = [{number: each for number, each in of.items() if isinstance(each, Sound)} for of in heard]
    options = ("batch_seconds", "batch_tokens", "num_buckets")
    settings = {f"data.{option}": getattr(data, option) for option in options}
    return Inspection(
        data.corpus.public_name, settings, splits, absent, strangest(columns, audible, NUM_STRANGE)
    ), columns


def decoded(columns: SplitColumns, seed: int) -> dict[int, Sound | Skipped]:
    """A few utterances by number, drawn at random."""
    number = min(NUM_DECODED, len(columns))
    drawn = sorted(np.random.default_rng(seed).choice(len(columns), number, replace=False).tolist())
    heard = listen(columns.parts, [columns.references[number] for number in drawn])
    return dict(zip(drawn, heard, strict=True))


def summary(
    columns: SplitColumns, heard: Mapping[int, Sound | Skipped], data: SpeechTextDataModule, train: SplitColumns | None
) -> SplitSummary:
    seconds, characters = columns.seconds, columns.num_characters
    measures: dict[str, Numbers] = {
        "seconds": seconds,
        "characters": characters,
        "words": columns.num_words,
        "characters per second": characters / np.maximum(seconds, 1e-3),
    }
    names: dict[str, Sequence[str | None]] = {
        "dataset": [each or None for each in columns.datasets],
        "language": columns.languages,
        "speaker": columns.speakers,
    }
    is_train = columns.split == "train"
    block = data.block_utterances if is_train and data.corpus.streaming else None
    bounds = (data.batch_seconds, data.num_buckets, data.seed)
    return SplitSummary(
        columns.split,
        columns.is_whole,
        columns.num_read,
        len(columns),
        float(seconds.sum()) / 3600,
        {name: Spread.of(values) for name, values in measures.items() if len(values)},
        {name: Histogram.of(values) for name, values in measures.items() if len(values)},
        {name: groups_of(values, seconds) for name, values in names.items()},
        batchings(seconds, *bounds, shuffle=is_train, block=block) if len(seconds) else [],
        texts_of(columns),
        sounds_of(columns, heard),
        left_out(columns),
        overlap(columns, train) if train is not None and not is_train else None,
    )


def sounds_of(columns: SplitColumns, heard: Mapping[int, Sound | Skipped]) -> Sounds:
    sounds = {number: each for number, each in heard.items() if isinstance(each, Sound)}
    levels = np.array([each.level for each in sounds.values()])
    silences = np.array([each.silence for each in sounds.values()])
    off = [
        number for number, each in sounds.items() if abs(each.seconds - columns.lengths[number]) > DECLARED_TOLERANCE
    ]
    return Sounds(
        len(heard),
        len(heard) - len(sounds),
        dict(Counter(each.sampling_rate for each in sounds.values()).most_common()),
        dict(Counter(each.num_channels for each in sounds.values()).most_common()),
        dict(Counter(each.format for each in sounds.values()).most_common()),
        Spread.of(levels) if sounds else None,
        Histogram.of(levels) if sounds else None,
        Spread.of(silences) if sounds else None,
        [columns.ids[number] for number, each in sounds.items() if each.is_clipped],
        [columns.ids[number] for number in off],
    )


def left_out(columns: SplitColumns) -> list[Left]:
    """By reason, the most frequent first; of what only decoding tells, those that were decoded."""
    return [
        Left(
            reason,
            count,
            columns.skipped_seconds.get(reason, 0.0) / 3600,
            list(skipped_examples(columns.skipped, reason)),
        )
        for reason, count in Counter(each.reason for each in columns.skipped).most_common()
    ]
