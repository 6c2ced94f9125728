"""Reads the utterances of each split, used or skipped, and decodes some to hear how they sound. S samples."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from math import isnan
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sedtrain.batch import Skipped
from sedtrain.data.audio import UNREADABLE, opened
from sedtrain.data.corpus import Corpus
from sedtrain.data.dataset import Reference
from sedtrain.data.durations import durations
from sedtrain.data.parts import Parts
from sedtrain.data.paths import local_path
from sedtrain.data.utterances import UtteranceRows, name_or_none
from sedtrain.errors import UserError

Samples = NDArray[np.float32]  # (S,) in -1..1

SPLITS = ("train", "validation", "test")
NUM_DECODED = 200  # utterances of a split, drawn at random
FULL_SCALE, CLIPPED_RUN = 0.999, 3  # so many samples in a row at full scale are clipped
QUIETEST = -100.0  # dBFS of digital silence
WINDOW_SECONDS, SILENCE = 0.02, 40.0  # a window so many decibels below the loudest one is silent
PLAYED_RATE, PLAYED_SECONDS = 48_000, 60  # at most


class Sound(NamedTuple):
    """Describes a decoded utterance: root mean square level in dBFS, and the share of its windows that are silent."""

    sampling_rate: int
    num_channels: int
    format: str
    seconds: float
    level: float
    is_clipped: bool
    silence: float


class Entry(NamedTuple):
    """A usable utterance; `sound` is known of those that were decoded."""

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
    """Usable utterances of one split, `num_drawn` of which were decoded, and skipped ones with their seconds if known."""

    split: str
    parts: Parts
    entries: list[Entry] = field(default_factory=list)
    skipped: list[tuple[Skipped, float | None]] = field(default_factory=list)
    num_drawn: int = 0
    num_read: int = 0
    is_whole: bool = True  # whether all rows of the split were read

    def add(self, corpus: Corpus, part: int, rows: UtteranceRows, indices: range) -> None:
        """Filters rows of a part as for training."""
        known = None if corpus.streaming else durations(rows)
        seconds = None if known is None else known[: len(indices)]
        kept, skipped = corpus.limits_of(self.split).filter(rows, indices, seconds, corpus.rewriting(self.split))
        used = list(kept)
        self.entries += map(
            Entry,
            [(part, index) for index in used],
            map(rows.id_of, used, rows.cells("id", used)),
            kept.values(),
            map(str.strip, rows.texts(used)),
            map(name_or_none, rows.cells("speaker", used)),
            (name_or_none(cell) or rows.source.language for cell in rows.cells("language", used)),
            repeat(self.parts.parts[part].source.label or None),
        )
        lengths = (None if isnan(length) else length for length in rows.seconds(list(skipped)).tolist())
        self.skipped += zip(skipped.values(), lengths, strict=True)
        self.num_read += len(indices)
        self.is_whole = self.is_whole and len(indices) == len(rows)

    def decode_some(self, seed: int) -> None:
        """Decodes utterances drawn at random; those that training would refuse count as skipped."""
        self.num_drawn = min(NUM_DECODED, len(self.entries))
        drawn = sorted(np.random.default_rng(seed).choice(len(self.entries), self.num_drawn, replace=False).tolist())
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            is_scored = self.split != "train"
            found = threads.map(lambda index: hear(self.parts, self.entries[index].reference, is_scored), drawn)
            for index, sound in zip(drawn, found, strict=True):
                if isinstance(sound, Sound):
                    self.entries[index] = self.entries[index]._replace(sound=sound)
                else:
                    self.skipped.append((sound, self.entries[index].seconds))


def read_corpus(corpus: Corpus, most: int | None) -> tuple[list[SplitEntries], dict[str, str]]:
    """Readable splits, and the error of each unreadable one.

    most: rows of a streamed split; None: all
    Raises UserError where no split can be read.
    """
    # Single files hold whatever split is asked for, unless splits are slices of them.
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
    """Raises UserError where the split is missing or unusable."""
    found = SplitEntries(split, corpus.parts(split))
    for part, described in enumerate(found.parts.parts):
        room = most - found.num_read if corpus.streaming and most is not None else None
        if room == 0:
            found.is_whole = False
            break
        rows = corpus.open(found.parts, part)
        if rows is None:
            found.skipped.append((Skipped(described.name, "unreadable shard"), None))
        else:
            found.add(corpus, part, rows, range(len(rows))[:room])
    return found


def hear(parts: Parts, reference: Reference, may_be_silent: bool) -> Sound | Skipped:
    """Measures one utterance as it is stored; Skipped, with the reason that training gives, where decoding fails."""
    part, index = reference
    rows = parts[part]
    try:
        with opened(rows.row(index)["audio"], rows.folder) as file:
            rate, channels, format = int(file.samplerate), int(file.channels), f"{file.format} {file.subtype}"
        samples = rows.utterance(index, rate, may_be_silent).audio.numpy()
    except UNREADABLE as error:
        return rows.skipped(index, getattr(error, "reason", "undecodable audio"), str(error))
    seconds, silent = len(samples) / rate, silence(samples, rate)
    return Sound(rate, channels, format, seconds, level(samples), is_clipped(samples), silent)


def playable(parts: Parts, entry: Entry) -> tuple[Samples, int] | None:
    """Samples and sampling rate of an utterance, cut off where it is long; None where it cannot be decoded."""
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
    """Share of windows that are silent; 1 for digital silence."""
    size = max(1, round(WINDOW_SECONDS * sampling_rate))
    windows = samples[: max(1, len(samples) // size) * size].reshape(-1, min(size, len(samples)))
    power = np.square(windows, dtype=np.float64).mean(axis=1)
    return float(np.mean(power <= power.max() * 10 ** (-SILENCE / 10)))
