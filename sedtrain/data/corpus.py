"""Finds the usable utterances of one dataset or of several, and how often an epoch visits each dataset."""

import atexit
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np

from sedtrain.data.buckets import Floats
from sedtrain.data.dataset import Kept, chunks, joined, kept_rows
from sedtrain.data.durations import durations
from sedtrain.data.limits import LIMITED, WHOLE, Limits
from sedtrain.data.parts import Part, Parts, parts_of
from sedtrain.data.paths import public_name
from sedtrain.data.skipped import SkippedUtterances, in_words
from sedtrain.data.source import Source
from sedtrain.data.tables import BrokenFile
from sedtrain.data.utterances import Reason, UtteranceRows
from sedtrain.errors import UNSET, Attempts, UserError
from sedtrain.launch import is_first_of_machine
from sedtrain.text.tags import Tags, WholePrompt

Pair = tuple[str | None, str]
"""Language and task of a text."""


def temperature_weights(sizes: Sequence[int], temperature: float) -> list[float]:
    """Visits of each dataset in an epoch; each dataset's share is proportional to size ** (1 / temperature).

    The length of an epoch stays the sum of the sizes. The shares are those of arXiv 1907.05019.
    """
    powers = [size ** (1 / temperature) for size in sizes]
    return [sum(sizes) * power / (sum(powers) * size) for size, power in zip(sizes, powers, strict=True)]


class Corpus:
    """The splits train, validation and test of one dataset or of several; a split is opened on first use.

    temperature: see `temperature_weights`
    block_rows:  rows of a block if the training split is streamed shard by shard; None: all splits are read whole
    batch_seconds: scored utterances may be this long, or a multiple of what `limits` allow in training if that is longer
    copies:      the folder for fetched and converted files, removed when the process ends
    rewrite:     normalizes training texts before they are learnt
    refused:     text and seconds -> the reason why the model cannot learn the utterance; set once there is a model
    """

    def __init__(
        self,
        sources: Sequence[Source],
        limits: Limits,
        skipped: SkippedUtterances,
        temperature: float,
        block_rows: int | None,
        copies: Path,
        batch_seconds: float = 0.0,
    ) -> None:
        self.sources, self.limits, self.skipped = list(sources), limits, skipped
        self.scored_limits = limits.scored(batch_seconds)
        self.temperature, self.block_rows, self.copies = temperature, block_rows, copies
        self.rewrite: Callable[[str], str] = str
        self.refused: Callable[[str, float], Reason | None] = lambda text, seconds: None
        if is_first_of_machine():  # this rank outlives the others of its machine
            atexit.register(shutil.rmtree, copies, ignore_errors=True)
        self.kept_parts = cache(self.find_parts)
        self.found: dict[str, Kept] = {}

    @property
    def path(self) -> str:
        """The paths of the datasets, for messages."""
        return " + ".join(dict.fromkeys(source.path for source in self.sources))

    @property
    def public_name(self) -> str:
        """The names of the datasets without the folders of this machine, for readers elsewhere."""
        return " + ".join(dict.fromkeys(public_name(source.path) for source in self.sources))

    def described(self, split: str) -> str:
        """Names of the datasets that have the split, each with its own name for the split."""
        found = [source for source in self.sources if source.splits[split]]
        names = [(public_name(source.path), source.name, source.splits[split]) for source in found]
        return " + ".join(dict.fromkeys(", ".join(filter(None, name)) for name in names))

    @property
    def streaming(self) -> bool:
        return self.block_rows is not None

    def is_streamed(self, split: str) -> bool:
        return self.streaming and split == "train"

    def parts(self, split: str) -> Parts:
        """The parts of all datasets, found once and kept; see `find_parts`."""
        return self.kept_parts(split)

    def find_parts(self, split: str) -> Parts:
        """The parts of all datasets; a part is one file if the dataset is streamed or on a server.

        A stream keeps the parts of two blocks open. Raises UserError if no dataset has the split.
        """
        found: list[Part] = []
        for source in self.sources:
            by_file = self.streaming or "://" in source.path
            found += parts_of(source, split, self.copies / split if by_file else None)
        if not found:
            wrong, write = f"no dataset of it has a {split} split", f"write data.mix.NAME.{split}_split=SPLIT of one"
            raise UserError("data.mix", UNSET, wrong, write)
        return Parts(found, 2 * self.block_rows if self.block_rows and self.is_streamed(split) else None)

    def texts(self, split: str) -> Iterator[str]:
        """The target texts, part by part. A stream reads only the column of texts, if the file format allows it."""
        if not self.is_streamed(split):
            for _, rows in self.open_all(split):
                for chunk in rows.chunks():
                    yield from rows.texts(chunk)
            return
        for number, part in enumerate(self.parts(split).parts):
            with self.noting(split, number):
                yield from part.texts("text")

    @contextmanager
    def noting(self, split: str, number: int) -> Iterator[None]:
        """Notes the part as skipped if reading it raises BrokenFile."""
        try:
            yield
        except BrokenFile as error:
            part = self.parts(split).parts[number]
            self.skipped.note_broken_file(part.name, part.path, str(error), len(self.parts(split)), split)

    def open(self, split: str, number: int) -> UtteranceRows | None:
        """The rows of one part; notes an unreadable part and returns None."""
        with self.noting(split, number):
            return self.parts(split)[number]
        return None

    def open_all(self, split: str) -> Iterator[tuple[int, UtteranceRows]]:
        """Yields number and rows of each readable part; notes the others."""
        for number in range(len(self.parts(split))):
            if (rows := self.open(split, number)) is not None:
                yield number, rows

    def refuse_unusable(self, splits: Iterable[str]) -> None:
        """Raises one UserError that lists all faults of these splits. Of a stream, only the first shard is checked."""
        attempt = Attempts()
        for split in dict.fromkeys(splits):
            attempt(self.refuse_unreadable if self.is_streamed(split) else self.kept, split)
        attempt.report()

    def refuse_unreadable(self, split: str) -> None:
        if next(self.open_all(split), None) is None:
            wrong = f"none of the {len(self.parts(split))} shards of {split!r} can be read"
            raise UserError("data.path", self.path, wrong, "write data.path of files that are whole")

    def kept(self, split: str) -> Kept:
        if split not in self.found:
            self.found[split] = self.find_kept(split)
        return self.found[split]

    def find_kept(self, split: str) -> Kept:
        """The utterances of a split that are used. A scored split uses every utterance that it can.

        Raises UserError if no utterance is left, or if all texts of a scored split are empty.
        """
        kept = joined(self.filtered(split))
        if not len(kept):
            raise self.none_left(split)
        may_be_empty = split == "train" or self.limits.min_characters == 0  # training keeps no empty text unless asked
        if not may_be_empty and not any(map(str.strip, self.texts(split))):
            column, name = self.sources[0].columns.text, self.sources[0].splits[split]
            wrong = f"all {len(kept)} texts of {name!r} are empty: only insertions would be scored"
            write = "write data.columns of the texts, or data.min_characters=0 where nobody speaks in any of this audio"
            raise UserError("data.columns", column, wrong, write)
        self.skipped.refuse_too_many(split)
        return kept

    def filtered(self, split: str) -> Iterator[Kept]:
        """Yields the used rows of all parts, some thousand at a time."""
        for part, rows in self.open_all(split):
            lengths = durations(rows)
            for chunk in rows.chunks():
                yield self.usable(split, part, rows, chunk, lengths[chunk.start : chunk.stop])

    def usable(
        self, split: str, part: int, rows: UtteranceRows, indices: Sequence[int], seconds: Floats | None = None
    ) -> Kept:
        """The rows that are used; notes the others. seconds: length of each row, if already known"""
        some = kept_rows(part, indices, rows.seconds(indices) if seconds is None else seconds)
        return self.noted(split, rows, some, self.reasons(split, rows, some), len(some))

    def noted(
        self, split: str, rows: UtteranceRows, some: Kept, reasons: Sequence[Reason | None], num_seen: int
    ) -> Kept:
        """The rows that have no reason to be skipped; notes the others."""
        pairs = zip(some.row.tolist(), reasons, strict=True)
        self.skipped.note_planned(split, num_seen, [rows.skipped(index, *reason) for index, reason in pairs if reason])
        return some[[reason is None for reason in reasons]]

    def reasons(self, split: str, rows: UtteranceRows, some: Kept) -> list[Reason | None]:
        """The reason to skip each row, None if it is used. A length in `some` is NaN if it could not be found."""
        indices = some.row.tolist()
        cells = zip(indices, some.seconds.tolist(), rows.texts(indices), strict=True)
        return [self.reason(split, rows, *row) for row in cells]

    def reason(self, split: str, rows: UtteranceRows, index: int, seconds: float, text: str) -> Reason | None:
        limits, is_learnt = self.limits_of(split), split == "train"
        reason = rows.problem(index, seconds) or limits.refused_length(seconds)
        if reason and reason[0] in LIMITED:  # a declared length counts only if the audio confirms it
            reason = rows.misdeclared(index) or reason
        reason = reason or limits.refused_text(text, self.rewrite if is_learnt else str)
        return reason or (self.refused(text, seconds) if is_learnt else None)

    def leave_out(self, refused: Callable[[str, float], Reason | None]) -> None:
        """Skips the training utterances for which `refused(text, seconds)` gives a reason; in a stream, as they are read.

        Raises UserError as `kept` does.
        """
        kept = None if self.streaming else self.kept("train")
        self.refused = refused
        if kept is None:
            return
        self.found["train"] = joined([self.learnable(part, some) for part, some in chunks(kept)])
        self.skipped.refuse_too_many("train")
        if not len(self.found["train"]):
            raise self.none_left("train")

    def learnable(self, part: int, some: Kept) -> Kept:
        """The training rows that can be learnt; notes the others. All have been counted as seen before."""
        rows = self.parts("train")[part]
        reasons = list(map(self.refused, rows.texts(some.row.tolist()), some.seconds.tolist()))
        return self.noted("train", rows, some, reasons, num_seen=0)

    def none_left(self, split: str) -> UserError:
        reasons = self.skipped.of_split[split]
        name = self.sources[0].splits[split]
        wrong = f"none of the {reasons.total()} utterances of {name!r} can be used ({in_words(reasons)})"
        write = "write data.min_seconds, data.max_seconds and data.columns that fit this dataset"
        return UserError("data.path", self.path, wrong, write)

    def limits_of(self, split: str) -> Limits:
        return {"train": self.limits, "validation": self.scored_limits}.get(split, WHOLE)

    def weights(self) -> list[float]:
        """Visits of each part in an epoch."""
        parts = self.parts("train").parts
        if self.streaming:
            return [part.source.weight for part in parts]
        sizes: Counter[str] = Counter()
        for part, size in zip(*np.unique(self.kept("train").part, return_counts=True), strict=True):
            sizes[parts[part].source.label] += int(size)
        factors = dict(zip(sizes, temperature_weights(list(sizes.values()), self.temperature), strict=True))
        return [part.source.weight * factors.get(part.source.label, 1.0) for part in parts]

    def has_length(self) -> bool:
        """True if every epoch has the same utterances, so that its steps can be counted beforehand."""
        return not self.streaming and self.temperature == 1 and all(source.weight == 1 for source in self.sources)

    def max_training_seconds(self) -> float:
        """Length of the longest training utterance; for a stream, the longest that `limits` allow."""
        return self.limits.max_seconds if self.streaming else float(self.kept("train").seconds.max())

    def training_audio(self) -> str:
        """The amount of training audio as text."""
        if self.streaming:
            return f"streamed, {len(self.parts('train')):,} files"
        seconds = self.kept("train").seconds
        return f"{seconds.sum() / 3600:.2f} hours, {len(seconds):,} utterances"


def learnt_pairs(corpus: Corpus) -> set[tuple[str, str]]:
    """Languages and tasks of the training texts. Raises UserError if the language of a text is unknown."""
    pairs = pairs_of(corpus, "train")
    if unknown := [task for language, task in pairs if language is None]:
        wrong = f"nothing says the language of the texts to {unknown[0]}"
        write = "write data.language=LANGUAGE, data.mix.NAME.language=LANGUAGE or data.columns.language=COLUMN"
        raise UserError("data.tags", True, wrong, write)
    return {(language, task) for language, task in pairs if language is not None}


def refuse_unlearnt(corpus: Corpus, splits: Iterable[str], tags: Tags | WholePrompt) -> None:
    """Raises UserError if a split asks for a language or a task that the model never learnt to write."""
    for split in dict.fromkeys(splits):
        for pair in pairs_of(corpus, split):
            tags.of(*pair)


def pairs_of(corpus: Corpus, split: str) -> set[Pair]:
    """Languages and tasks of the texts that are used; for a stream, of all texts."""
    found: set[Pair] = set()
    parts = corpus.parts(split)
    if corpus.is_streamed(split):
        for part in parts.parts:  # reads only the column of languages; training reports unreadable parts
            with suppress(BrokenFile):
                texts = part.texts("language") if part.source.columns.language else [""]
                found |= {(text or part.source.language, part.source.task) for text in texts}
        return found
    for number, some in chunks(corpus.kept(split)):
        languages, source = parts[number].cells("language", some.row.tolist()), parts[number].source
        found |= {(language or source.language, source.task) for language in languages}
    return found
