"""Reads the splits of a corpus: the utterances that training would use, and those it would skip."""

from dataclasses import dataclass, field
from itertools import repeat
from typing import NamedTuple

import numpy as np

from sedtrain.batch import Skipped
from sedtrain.data.corpus import Corpus
from sedtrain.data.dataset import Parts, Reference
from sedtrain.data.durations import durations
from sedtrain.data.paths import local_path
from sedtrain.data.utterances import UtteranceRows
from sedtrain.errors import UserError
from sedtrain.inspection.statistics import Floats

SPLITS = ("train", "validation", "test")


class Entry(NamedTuple):
    """An utterance as its row describes it, before it is decoded."""

    reference: Reference
    id: str
    seconds: float
    text: str
    speaker: str | None
    language: str | None
    dataset: str | None  # in a mix


@dataclass
class SplitEntries:
    """Usable utterances of one split, and skipped ones with their seconds, None where unknown."""

    split: str
    parts: Parts
    entries: list[Entry] = field(default_factory=list)
    skipped: list[tuple[Skipped, float | None]] = field(default_factory=list)
    num_read: int = 0
    is_whole: bool = True  # whether all rows of the split were read

    @property
    def seconds(self) -> Floats:
        return np.array([entry.seconds for entry in self.entries], dtype=np.float64)

    def add(self, corpus: Corpus, part: int, rows: UtteranceRows, indices: range) -> None:
        """Filters rows of a part as for training."""
        known = None if corpus.streaming else durations(rows)
        kept, skipped = corpus.limits.filter(rows, indices, known, corpus.rewriting(self.split))
        used, ids, columns = list(kept), list(rows.index_of), rows.columns
        self.entries += map(
            Entry,
            [(part, index) for index in used],
            [ids[index] for index in used],
            kept.values(),
            rows.texts(used),
            map(name_or_none, rows.cells(columns.speaker, used)),
            map(name_or_none, rows.cells(columns.language, used) if columns.language else repeat(rows.language)),
            repeat(self.parts.parts[part].source.label or None),
        )
        self.skipped += zip(skipped, rows.seconds([rows.index_of[each.id] for each in skipped]), strict=True)
        self.num_read += len(indices)
        self.is_whole = self.is_whole and len(indices) == len(rows)


def name_or_none(cell: object) -> str | None:
    """A cell of speakers or languages as text; None for an empty one."""
    return None if cell is None or cell != cell or not str(cell).strip() else str(cell)


def read_corpus(corpus: Corpus, most: int | None) -> tuple[list[SplitEntries], dict[str, str]]:
    """All splits that can be read, and of each other split what is wrong.

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
