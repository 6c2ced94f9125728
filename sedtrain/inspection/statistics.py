"""Numbers about utterances, from their lengths and texts alone. N utterances."""

import os
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, repeat
from math import ceil, floor, log10

import numpy as np
from numpy.typing import NDArray

from sedtrain.batch import Skipped
from sedtrain.data.audio import UNREADABLE, opened
from sedtrain.data.buckets import Bounds
from sedtrain.data.corpus import Corpus
from sedtrain.data.dataset import Parts, Reference
from sedtrain.data.durations import durations
from sedtrain.data.paths import local_path
from sedtrain.data.sampler import DurationBatches
from sedtrain.data.utterances import UtteranceRows
from sedtrain.errors import UserError

Floats = NDArray[np.float64]


Numbers = NDArray[np.float64] | NDArray[np.int64]


PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)


NUM_BINS = 14


TAIL = 99  # the percentile behind which a histogram has one bin alone, however far it reaches


NORMAL_MAD, NORMAL_MEAN_DEVIATION = 1.4826, 1.2533  # times these, deviations of a normal distribution are its sigma


@dataclass(frozen=True)
class Spread:
    """How values are distributed: their mean, and percentiles by number."""

    mean: float
    percentiles: dict[int, float]

    @classmethod
    def of(cls, values: Numbers) -> "Spread":
        numbers = np.percentile(values, PERCENTILES).tolist()
        return cls(float(np.mean(values)), dict(zip(PERCENTILES, numbers, strict=True)))


@dataclass(frozen=True)
class Histogram:
    """Counts between edges; the last bin holds its upper edge too, and may be wider, for the few values far off."""

    edges: list[float]
    counts: list[int]

    @classmethod
    def of(cls, values: Numbers) -> "Histogram":
        """Edges at round numbers, whole ones for whole values."""
        least, most = float(values.min()), float(values.max())
        tail = float(np.percentile(values, TAIL))
        step = round_step((tail - least) / NUM_BINS)
        if np.issubdtype(values.dtype, np.integer):
            step = max(step, 1.0)
        first = floor(least / step)
        last = max(ceil(tail / step), first + 1)
        edges = [round(number * step, 9) for number in range(first, last + 1)]
        if most > edges[-1]:
            edges.append(max(most, round((last + 1) * step, 9)))
        return cls(edges, np.histogram(values, edges)[0].tolist())

    def labels(self) -> list[str]:
        """The lower edge of each bin and the upper one of the last."""
        step = self.edges[1] - self.edges[0]
        return [f"{edge:,.{max(0, ceil(-log10(step) - 1e-9))}f}" for edge in self.edges]


def round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `least`."""
    if least <= 0:
        return 1.0
    power = 10.0 ** floor(log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


@dataclass(frozen=True)
class Batching:
    """What batches of utterances cost.

    padding:         share of the padded audio that is none
    largest_seconds: padded audio of the largest batch, which has to fit in memory
    """

    name: str
    num_batches: int
    mean_utterances: float
    padding: float
    largest_seconds: float

    @classmethod
    def of(cls, name: str, seconds: Floats, batches: Iterable[Sequence[int]]) -> "Batching":
        sizes, longest = zip(*((len(batch), float(seconds[batch].max())) for batch in batches), strict=True)
        padded = np.multiply(sizes, longest)
        padding = 1 - float(seconds.sum() / padded.sum())
        return cls(name, len(sizes), len(seconds) / len(sizes), padding, float(padded.max()))


def batchings(
    seconds: Floats, batch_seconds: float, num_buckets: int, seed: int, *, shuffle: bool, block: int | None
) -> list[Batching]:
    """The batches of an epoch as training cuts them, beside those of one bucket, and as many drawn at random.

    block: of a stream, how many utterances are batched together; None: all
    """

    def planned(number: int) -> Batching:
        batches: list[list[int]] = []
        for start in range(0, len(seconds), block or len(seconds)):
            here = seconds[start : start + (block or len(seconds))]
            plan = DurationBatches(here, Bounds(batch_seconds, num_buckets=number), shuffle=shuffle, seed=seed)
            batches += [[start + index for index in batch] for batch in plan]
        return Batching.of(f"{number} bucket{'s' * (number > 1)}", seconds, batches)

    chosen = planned(num_buckets)
    drawn = np.array_split(np.random.default_rng(seed).permutation(len(seconds)), chosen.num_batches)
    single = [] if num_buckets == 1 else [planned(1)]
    return [chosen, *single, Batching.of("as many at random", seconds, [batch.tolist() for batch in drawn])]


@dataclass(frozen=True)
class Group:
    """The utterances of one speaker, language or dataset."""

    name: str
    num_utterances: int
    hours: float


def groups_of(names: Sequence[str | None], seconds: Floats) -> list[Group]:
    """Those with most audio first; utterances of no name are in none."""
    counts = Counter(names)
    totals: dict[str | None, float] = dict.fromkeys(counts, 0.0)
    for name, length in zip(names, seconds.tolist(), strict=True):
        totals[name] += length
    groups = [Group(name, counts[name], totals[name] / 3600) for name in counts if name is not None]
    return sorted(groups, key=lambda group: (-group.hours, group.name))


def first_uses(texts: Sequence[str]) -> dict[str, tuple[int, int]]:
    """For every character, how often it is there and the number of the first text that has it; the rarest first."""
    counts: Counter[str] = Counter()
    first: dict[str, int] = {}
    for number, text in enumerate(texts):
        counts.update(text)
        for character in set(text) - first.keys():
            first[character] = number
    rarest = sorted(counts, key=lambda character: (counts[character], character))
    return {character: (counts[character], first[character]) for character in rarest}


def num_repeated(values: Sequence[Hashable]) -> int:
    """How many are there more than once, each time counted."""
    return sum(count for count in Counter(values).values() if count > 1)


def robust_scores(values: Floats, least_sigma: float) -> Floats:
    """(N,) how many standard deviations each is from the median, where the deviation is judged by the median one.

    NaN where a value is NaN. Where more than half are alike the mean deviation stands in (Iglewicz and Hoaglin, 1993).
    least_sigma: a smaller deviation counts as this one
    """
    if np.isnan(values).all():
        return values
    distance = values - np.nanmedian(values)
    sigma = NORMAL_MAD * np.nanmedian(np.abs(distance)) or NORMAL_MEAN_DEVIATION * np.nanmean(np.abs(distance))
    return distance / max(float(sigma), least_sigma)


FULL_SCALE = 0.999


CLIPPED_RUN = 3  # samples in a row at full scale


QUIETEST = -100.0  # dBFS of no sound at all


WINDOW_SECONDS = 0.02


PLAYED_RATE, PLAYED_SECONDS = 48_000, 60


SILENCE = 40.0  # decibels below the loudest window


@dataclass(frozen=True)
class Sound:
    """One utterance, decoded.

    level:   of the whole, as root mean square, dBFS
    silence: share of windows of 20 ms that are silent
    seconds: what was decoded
    """

    sampling_rate: int
    num_channels: int
    format: str
    seconds: float
    level: float
    is_clipped: bool
    silence: float


def listen(parts: Parts, references: Sequence[Reference]) -> list[Sound | Skipped]:
    """Decodes utterances, several at a time; what cannot be decoded is told as in training."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(lambda reference: hear(parts, reference), references))


def hear(parts: Parts, reference: Reference) -> Sound | Skipped:
    part, index = reference
    rows = parts[part]
    try:
        with opened(rows.rows[index][rows.columns.audio], rows.folder) as file:
            sampling_rate, num_channels, format = file.samplerate, file.channels, f"{file.format} {file.subtype}"
        samples = rows.utterance(index, sampling_rate).audio.numpy()
    except UNREADABLE as error:
        return rows.skipped(index, getattr(error, "reason", "undecodable audio"), str(error))
    return Sound(
        sampling_rate,
        num_channels,
        format,
        len(samples) / sampling_rate,
        level(samples),
        is_clipped(samples),
        silence(samples, sampling_rate),
    )


def sound_of(parts: Parts, reference: Reference) -> tuple[NDArray[np.float32], int] | None:
    """What can be played of an utterance, its beginning if it is long: (S,) samples and their rate; None: nothing."""
    part, index = reference
    rows = parts[part]
    try:
        with opened(rows.rows[index][rows.columns.audio], rows.folder) as file:
            sampling_rate = min(file.samplerate, PLAYED_RATE)
        samples = rows.utterance(index, sampling_rate).audio.numpy()
    except UNREADABLE:
        return None
    return samples[: PLAYED_SECONDS * sampling_rate], sampling_rate


def level(samples: NDArray[np.float32]) -> float:
    """dBFS of (S,) samples, no less than QUIETEST."""
    power = float(np.mean(np.square(samples, dtype=np.float64)))
    return max(10 * float(np.log10(power)), QUIETEST) if power else QUIETEST


def is_clipped(samples: NDArray[np.float32]) -> bool:
    """Whether several samples in a row are at full scale."""
    at_limit = np.abs(samples) >= FULL_SCALE
    return bool(np.convolve(at_limit, np.ones(CLIPPED_RUN), "valid").max(initial=0) >= CLIPPED_RUN)


def silence(samples: NDArray[np.float32], sampling_rate: int) -> float:
    """Share of the windows that are much quieter than the loudest; 1 where nothing sounds."""
    size = max(1, round(WINDOW_SECONDS * sampling_rate))
    windows = samples[: max(1, len(samples) // size) * size].reshape(-1, min(size, len(samples)))
    power = np.square(windows, dtype=np.float64).mean(axis=1)
    return float(np.mean(power <= power.max() * 10 ** (-SILENCE / 10)))


SPLITS = ("train", "validation", "test")


@dataclass
class SplitColumns:
    """The utterances that would be used, a list for each column, and those left out.

    datasets: which dataset of a mix each is from, "" where there is one
    num_read, is_whole: rows, and whether they are all of the split
    skipped_seconds: of those left out whose length is known, in all, by reason
    """

    split: str
    parts: Parts
    references: list[Reference] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    speakers: list[str | None] = field(default_factory=list)
    languages: list[str | None] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    skipped_seconds: dict[str, float] = field(default_factory=dict)
    num_read: int = 0
    is_whole: bool = True

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def seconds(self) -> Floats:
        return np.array(self.lengths, dtype=np.float64)

    @property
    def num_characters(self) -> NDArray[np.int64]:
        return np.array([len(text.strip()) for text in self.texts], dtype=np.int64)

    @property
    def num_words(self) -> NDArray[np.int64]:
        return np.array([len(text.split()) for text in self.texts], dtype=np.int64)

    def add(self, corpus: Corpus, part: int, rows: UtteranceRows, indices: range) -> None:
        """Some rows of a part, filtered as they are for training."""
        known = None if corpus.streaming else durations(rows)
        kept, skipped = corpus.limits.filter(rows, indices, known, corpus.rewriting(self.split))
        self.num_read += len(indices)
        ids = list(rows.index_of)
        here = list(kept)
        self.references += [(part, index) for index in here]
        self.ids += [ids[index] for index in here]
        self.lengths += kept.values()
        self.texts += rows.texts(here)
        self.speakers += map(name_of, rows.cells(rows.columns.speaker, here))
        of_row, of_all = rows.cells(rows.columns.language, here), name_of(rows.language)
        self.languages += [of_all if rows.columns.language is None else name_of(cell) for cell in of_row]
        self.datasets += repeat(self.parts.parts[part].source.label, len(here))
        lengths = rows.seconds([rows.index_of[each.id] for each in skipped])
        for each, seconds in zip(skipped, lengths, strict=True):
            self.leave_out(each, seconds)

    def leave_out(self, each: Skipped, seconds: float | None) -> None:
        self.skipped.append(each)
        self.skipped_seconds[each.reason] = self.skipped_seconds.get(each.reason, 0.0) + (seconds or 0.0)

    def refuse(self, skipped: Mapping[int, Skipped]) -> None:
        """Those that would be used, by number, but cannot be decoded."""
        for number, each in skipped.items():
            self.leave_out(each, self.lengths[number])


def name_of(cell: object) -> str | None:
    """A speaker or a language as text; an empty cell is none."""
    return None if cell is None or cell != cell or not str(cell).strip() else str(cell)


def splits_of(corpus: Corpus) -> tuple[str, ...]:
    """The splits to look at: of single files, which hold whatever split is asked for, one."""
    are_files = all(local_path(source.path).is_file() for source in corpus.sources)
    are_cut = any("[" in str(name) for source in corpus.sources for name in source.splits.values())
    return SPLITS[:1] if are_files and not are_cut else SPLITS


def read_split(corpus: Corpus, split: str, most: int | None) -> SplitColumns:
    """most: of a stream, how many rows are read; None: all. Raises UserError where the split is missing or unusable."""
    parts = corpus.parts(split)
    columns = SplitColumns(split, parts)
    room = most if corpus.streaming else None
    for part in range(len(parts)):
        if room == 0:
            columns.is_whole = False
            break
        rows = corpus.open(parts, part)
        if rows is None:
            shard = parts.parts[part].shard
            columns.skipped.append(Skipped(shard.name if shard else split, "unreadable shard"))
            continue
        number = len(rows) if room is None else min(room, len(rows))
        columns.is_whole = columns.is_whole and number == len(rows)
        columns.add(corpus, part, rows, range(number))
        room = None if room is None else room - number
    return columns


def read_corpus(corpus: Corpus, most: int | None) -> tuple[list[SplitColumns], dict[str, str]]:
    """The splits there are, and of each other what is wrong. Raises UserError where there is none that can be read."""
    splits, errors = [], {}
    for split in splits_of(corpus):
        try:
            columns = read_split(corpus, split, most)
        except UserError as error:
            errors[split] = error
            continue
        splits.append(columns)
    if not splits:
        raise UserError.all_of(errors.values())
    return splits, {split: error.wrong for split, error in errors.items()}


def skipped_examples(skipped: list[Skipped], reason: str, number: int = 3) -> Iterator[str]:
    """The first that were left out for a reason, each with what is said of it."""
    of_reason = (each for each in skipped if each.reason == reason)
    return (f"{each.id}{f' ({each.detail})' if each.detail else ''}" for each in islice(of_reason, number))


NUM_RAREST, NUM_REPEATED = 12, 5


@dataclass(frozen=True)
class Use:
    """A character, how often it is there, and the first utterance with it."""

    character: str
    times: int
    id: str
    text: str


@dataclass(frozen=True)
class Texts:
    """Texts and their characters.

    num_repeated: utterances whose text another one has too
    repeated:     the most frequent texts
    unseen:       characters without ink, but for spaces
    """

    num_distinct: int
    num_repeated: int
    repeated: dict[str, int]
    num_characters: int
    rarest: list[Use]
    unseen: list[Use]


@dataclass(frozen=True)
class Overlap:
    """What a split shares with the training split: speakers, and utterances whose text is there too."""

    num_speakers: int
    num_texts: int


def texts_of(columns: SplitColumns) -> Texts:
    texts = [text.strip() for text in columns.texts]
    counts, uses = Counter(texts), first_uses(texts)
    listed = [Use(character, times, columns.ids[first], texts[first]) for character, (times, first) in uses.items()]
    return Texts(
        len(counts),
        num_repeated(texts),
        {text: count for text, count in counts.most_common(NUM_REPEATED) if count > 1},
        len(uses),
        listed[:NUM_RAREST],
        [use for use in listed if not use.character.isprintable()],
    )


def overlap(columns: SplitColumns, train: SplitColumns) -> Overlap:
    speakers = {each for each in columns.speakers if each} & {each for each in train.speakers if each}
    texts = {text.strip() for text in train.texts}
    return Overlap(len(speakers), sum(text.strip() in texts for text in columns.texts))
