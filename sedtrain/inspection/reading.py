"""The utterances of a split as columns, without audio: those that would be used, and those that would be left out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, repeat

import numpy as np
from numpy.typing import NDArray

from sedtrain.batch import Skipped, UserError
from sedtrain.data.corpus import Corpus
from sedtrain.data.durations import durations
from sedtrain.data.parts import Parts, Reference
from sedtrain.data.rows import UtteranceRows
from sedtrain.data.sources import local_path
from sedtrain.inspection.statistics import Floats

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
        """Some rows of a part, sifted as they are for training."""
        known = None if corpus.streaming else durations(rows)
        kept, skipped = corpus.limits.sift(rows, indices, known, corpus.rewriting(self.split))
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
        rows = corpus.opened(parts, part)
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
        wrong, instead = (dict.fromkeys(each) for each in zip(*(error.args for error in errors.values()), strict=True))
        raise UserError("\n".join(wrong), "; ".join(instead)) from next(iter(errors.values()))
    return splits, {split: error.what_is_wrong for split, error in errors.items()}


def skipped_examples(skipped: list[Skipped], reason: str, number: int = 3) -> Iterator[str]:
    """The first that were left out for a reason, each with what is said of it."""
    of_reason = (each for each in skipped if each.reason == reason)
    return (f"{each.id}{f' ({each.detail})' if each.detail else ''}" for each in islice(of_reason, number))
