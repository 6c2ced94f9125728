"""Reads the used and skipped utterances of each split, decodes some of them, and finds outliers.

S samples, N utterances.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import nan
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sedtrain.batch import Skipped
from sedtrain.data.audio import opened
from sedtrain.data.buckets import Floats
from sedtrain.data.corpus import Corpus
from sedtrain.data.dataset import Reference, kept_rows
from sedtrain.data.durations import durations
from sedtrain.data.headers import RefusedAudio
from sedtrain.data.parts import Parts
from sedtrain.data.paths import local_path
from sedtrain.data.utterances import UtteranceRows
from sedtrain.errors import UserError

Samples = NDArray[np.float32]  # (S,) in -1..1

SPLITS = ("train", "validation", "test")
NUM_DECODED = 200  # utterances of a split, drawn at random
FULL_SCALE, CLIPPED_RUN = 0.999, 3  # audio is clipped if CLIPPED_RUN samples in a row are at full scale
QUIETEST = -100.0  # dBFS of digital silence
WINDOW_SECONDS, SILENCE = 0.02, 40.0  # a window is silent if it is SILENCE decibels below the loudest one
PLAYED_RATE, PLAYED_SECONDS = 48_000, 60  # limits of the audio on the page
NUM_STRANGE = 10
NORMAL_MAD, NORMAL_MEAN_DEVIATION = 1.4826, 1.2533  # sigma of a normal distribution, in units of these deviations
STRANGE = 3.5  # robust standard deviations; one normal value in 2,000 is farther off
FEATURES = (  # text with value and median, smallest standard deviation, True if deviations are of the logarithm
    ("{:.2f} s long, median {:.2f} s", 0.05, True),
    ("{:.0f} characters, median {:.0f}", 0.05, True),
    ("{:.1f} characters per second, median {:.1f}", 0.05, True),
    ("{:.1f} dBFS, median {:.1f}", 1.0, False),
    ("{:.0f} % silent, median {:.0f} %", 15.0, False),
    ("{:+.2f} s against what is declared", 0.1, False),
)


class Sound(NamedTuple):
    """Describes a decoded utterance. level: root mean square in dBFS; silence: share of its windows that are silent"""

    sampling_rate: int
    num_channels: int
    format: str
    seconds: float
    level: float
    is_clipped: bool
    silence: float


class Entry(NamedTuple):
    """A usable utterance; `sound` is None unless it was decoded."""

    reference: Reference
    id: str
    seconds: float
    text: str
    speaker: str | None
    language: str | None
    dataset: str | None  # in a mix
    sound: Sound | None = None


@dataclass
class SplitEntries:
    """Usable and skipped utterances of one split.

    skipped:   utterances with their seconds, NaN if unknown
    num_drawn: usable utterances that were drawn to be decoded
    num_read:  rows that were read
    is_whole:  True if all rows of the split were read
    """

    split: str
    parts: Parts
    entries: list[Entry] = field(default_factory=list)
    skipped: list[tuple[Skipped, float]] = field(default_factory=list)
    num_drawn: int = 0
    num_read: int = 0
    is_whole: bool = True

    def add(self, corpus: Corpus, part: int, rows: UtteranceRows, indices: range) -> None:
        """Adds rows of a part, filtered as for training."""
        seconds = rows.seconds(indices) if corpus.streaming else durations(rows)[: len(indices)]
        some = kept_rows(part, indices, seconds)
        roles = (rows.cells(role, indices) for role in ("id", "text", "speaker", "language"))
        reasons = corpus.reasons(self.split, rows, some)
        for index, length, reason, id, text, speaker, language in zip(
            indices, seconds.tolist(), reasons, *roles, strict=True
        ):
            if reason:
                self.skipped.append((rows.skipped(index, *reason), length))
                continue
            facts = (text or "").strip(), speaker, language or rows.source.language, rows.source.label or None
            self.entries.append(Entry((part, index), rows.id_of(index, id), length, *facts))
        self.num_read += len(indices)
        self.is_whole = self.is_whole and len(indices) == len(rows)

    def decode_some(self, seed: int) -> None:
        """Decodes utterances drawn at random; counts an utterance as skipped if training would refuse it."""
        self.num_drawn = min(NUM_DECODED, len(self.entries))
        drawn = sorted(np.random.default_rng(seed).choice(len(self.entries), self.num_drawn, replace=False).tolist())
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            references = (self.entries[index].reference for index in drawn)
            found = threads.map(lambda reference: hear(self.parts, reference, self.split != "train"), references)
            for index, sound in zip(drawn, found, strict=True):
                if isinstance(sound, Sound):
                    self.entries[index] = self.entries[index]._replace(sound=sound)
                else:
                    self.skipped.append((sound, self.entries[index].seconds))


def read_corpus(corpus: Corpus, most: int | None) -> tuple[list[SplitEntries], dict[str, str]]:
    """Readable splits, and the error of each unreadable one.

    most: rows to read of a streamed split; None: all
    Raises UserError if no split can be read.
    """
    # A single file stands for every split, unless the splits are slices of it. So it is read once.
    are_files = all(local_path(source.path).is_file() for source in corpus.sources)
    are_sliced = any("[" in str(name) for source in corpus.sources for name in source.splits.values())
    splits, errors = [], {}
    for split in SPLITS[:1] if are_files and not are_sliced else SPLITS:
        try:
            splits.append(read_split(corpus, split, most))
        except UserError as error:
            errors[split] = error
    if not splits:
        raise UserError.all_of(errors.values())
    return splits, {split: error.wrong for split, error in errors.items()}


def read_split(corpus: Corpus, split: str, most: int | None) -> SplitEntries:
    """The utterances of a split. Raises UserError if it is missing or unusable."""
    found = SplitEntries(split, corpus.parts(split))
    for part, described in enumerate(found.parts.parts):
        room = most - found.num_read if corpus.streaming and most is not None else None
        if room == 0:
            found.is_whole = False
            break
        if (rows := corpus.open(split, part)) is None:
            found.skipped.append((Skipped(described.name, "unreadable shard"), nan))
        else:
            found.add(corpus, part, rows, range(len(rows))[:room])
    return found


def hear(parts: Parts, reference: Reference, may_be_silent: bool) -> Sound | Skipped:
    """Measures one utterance at its stored rate; returns Skipped, with training's reason, if decoding fails."""
    part, index = reference
    rows = parts[part]
    try:
        with opened(rows.row(index)["audio"], rows.folder) as file:
            rate, channels, format = int(file.samplerate), int(file.channels), f"{file.format} {file.subtype}"
        samples = rows.utterance(index, rate, may_be_silent).audio.numpy()
    except RefusedAudio as error:
        return rows.skipped(index, error.reason, str(error))
    seconds, silent = len(samples) / rate, silence(samples, rate)
    return Sound(rate, channels, format, seconds, level(samples), is_clipped(samples), silent)


def playable(parts: Parts, entry: Entry) -> tuple[Samples, int] | None:
    """The first PLAYED_SECONDS of an utterance and their sampling rate; None if it cannot be decoded."""
    sound = entry.sound or hear(parts, entry.reference, may_be_silent=True)
    if isinstance(sound, Skipped):
        return None
    part, index = entry.reference
    rate = min(sound.sampling_rate, PLAYED_RATE)
    return parts[part].utterance(index, rate, may_be_silent=True).audio.numpy()[: PLAYED_SECONDS * rate], rate


def level(samples: Samples) -> float:
    """Root mean square in dBFS, at least QUIETEST."""
    power = float(np.mean(np.square(samples, dtype=np.float64)))
    return max(10 * float(np.log10(power)), QUIETEST) if power else QUIETEST


def is_clipped(samples: Samples) -> bool:
    at_limit = np.abs(samples) >= FULL_SCALE
    return bool(np.convolve(at_limit, np.ones(CLIPPED_RUN), "valid").max(initial=0) >= CLIPPED_RUN)


def silence(samples: Samples, sampling_rate: int) -> float:
    """Share of silent windows; 1 for digital silence."""
    size = max(1, round(WINDOW_SECONDS * sampling_rate))
    windows = samples[: max(1, len(samples) // size) * size].reshape(-1, min(size, len(samples)))
    power = np.square(windows, dtype=np.float64).mean(axis=1)
    return float(np.mean(power <= power.max() * 10 ** (-SILENCE / 10)))


# --- outliers: utterances with an unusual length, text, level or silence


@dataclass(frozen=True)
class Strange:
    """An outlier with its reasons, worst first, such as `38.07 s long, median 1.50 s`. `score`: of the first reason"""

    split: str
    number: int
    id: str
    text: str
    seconds: float
    score: float
    reasons: list[str]


def strangest(splits: Sequence[SplitEntries]) -> list[Strange]:
    """The NUM_STRANGE utterances of all splits with the highest scores. The most unusual feature gives the score."""
    located = [(split.split, number, entry) for split in splits for number, entry in enumerate(split.entries)]
    if not located:
        return []
    values = np.array([features(entry) for *_, entry in located]).T
    scores = [
        robust_scores(np.log(row) if is_log else row, sigma)
        for row, (_, sigma, is_log) in zip(values, FEATURES, strict=True)
    ]
    sizes = np.abs(np.nan_to_num(scores))
    found = []
    for column in np.argsort(-sizes.max(axis=0), kind="stable")[:NUM_STRANGE].tolist():
        split, number, entry = located[column]
        by_size = np.argsort(-sizes[:, column]).tolist()
        shown = [row for row in by_size if sizes[row, column] >= STRANGE] or by_size[:1]
        reasons = [FEATURES[row][0].format(values[row, column], np.nanmedian(values[row])) for row in shown]
        worst = float(sizes[:, column].max())
        found.append(Strange(split, number, entry.id, entry.text, entry.seconds, worst, reasons))
    return found


def features(entry: Entry) -> list[float]:
    """Values in the order of FEATURES; features of sound are NaN for an utterance that was not decoded."""
    seconds, characters, sound = max(entry.seconds, 1e-3), max(len(entry.text), 1), entry.sound
    heard = (sound.level, 100 * sound.silence, sound.seconds - entry.seconds) if sound else [np.nan] * 3
    return [seconds, characters, characters / seconds, *heard]


def robust_scores(values: Floats, least_sigma: float) -> Floats:
    """(N,) deviations from the median, in robust sigmas of at least `least_sigma`; NaN stays NaN.

    The sigma comes from the median deviation; if that is 0 because half of the values are equal, from the mean deviation
    (Iglewicz and Hoaglin, 1993).
    """
    if np.isnan(values).all():
        return values
    distance = values - np.nanmedian(values)
    sigma = NORMAL_MAD * np.nanmedian(np.abs(distance)) or NORMAL_MEAN_DEVIATION * np.nanmean(np.abs(distance))
    return distance / max(float(sigma), least_sigma)
