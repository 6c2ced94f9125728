"""Lists skipped utterances in a file and counts them by reason; stops the run if too many are faulty."""

import fcntl
import hashlib
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from sedtrain.batch import Skipped
from sedtrain.data.limits import LIMITED
from sedtrain.errors import UserError

logger = logging.getLogger(__name__)

MIN_SEEN = 100
"""Smallest denominator of a fraction of bad utterances; else one bad utterance among the first five stops the run."""
BATCHES_BETWEEN_SUMS = 16
"""Batches between two sums of the ranks' counts; each rank decodes other utterances."""

Key = bytes
"""A digest of an utterance's id, reason and path. It is short because there may be millions."""


@dataclass
class FilterCounts:
    """Numbers of utterances that a filter has seen and has found faulty."""

    num_seen: int = 0
    num_bad: int = 0

    @property
    def fraction(self) -> float:
        return self.num_bad / max(self.num_seen, MIN_SEEN)


class SkippedUtterances:
    """Lists every skipped utterance exactly once, even if several ranks, epochs or resumed runs skip it.

    All ranks share the file. Each rank reads what the others have added before it writes.

    file:             one line of JSON for each utterance
    on_bad_utterance: `error` raises at the first faulty utterance
    max_bad_fraction: raises if a larger share of a split is faulty; utterances beyond the user's own limits do not count
    """

    def __init__(
        self, file: Path, on_bad_utterance: Literal["skip", "error"] = "skip", max_bad_fraction: float = 1.0
    ) -> None:
        self.file, self.on_bad_utterance, self.max_bad_fraction = file, on_bad_utterance, max_bad_fraction
        self.noted: set[Key] = set()
        self.last_noted: Skipped | None = None
        self.counts: Counter[str] = Counter()
        self.num_bytes_read = 0
        self.broken_files: set[str | None] = set()
        self.before_decoding: Mapping[str, FilterCounts] = defaultdict(FilterCounts)
        self.in_decoding: Mapping[str, FilterCounts] = defaultdict(FilterCounts)
        self.num_batches: Counter[str] = Counter()  # decoded so far, by split
        self.of_split: Mapping[str, Counter[str]] = defaultdict(Counter)  # counts by reason, in this process
        self.met: Mapping[str, set[Key]] = defaultdict(set)  # utterances that `of_split` has counted
        self.read()

    def note_planned(self, split: str, num_seen: int, skipped: Sequence[Skipped]) -> None:
        """Notes the utterances, among `num_seen`, that are skipped before decoding.

        All ranks make the same calls, and call `refuse_too_many` after the last. Raises UserError at the first skipped
        utterance if `on_bad_utterance` is `error`.
        """
        self.note(skipped, split)
        if skipped and self.on_bad_utterance == "error":
            raise bad(skipped[0])
        self.before_decoding[split].num_seen += num_seen
        self.before_decoding[split].num_bad += num_faults(skipped)

    def note_decoded(
        self,
        split: str,
        num_seen: int,
        skipped: Sequence[Skipped],
        over_ranks: Callable[[list[int]], list[int]] | None = None,
    ) -> None:
        """Notes the utterances of a batch that could not be decoded. Raises UserError, on all ranks at the same batch.

        over_ranks: sums a list of numbers over all ranks; None for a single rank. All ranks call it at the same batch.
        """
        self.note(skipped, split)
        own = self.in_decoding[split]
        own.num_seen += num_seen
        own.num_bad += num_faults(skipped) if self.on_bad_utterance == "skip" else len(skipped)
        self.num_batches[split] += 1
        if over_ranks is None:
            total = own
        elif self.on_bad_utterance == "error" or self.num_batches[split] % BATCHES_BETWEEN_SUMS == 0:
            total = FilterCounts(*over_ranks([own.num_seen, own.num_bad]))
        else:
            return
        if total.num_bad and self.on_bad_utterance == "error":
            self.read()
            found = skipped[0] if skipped else self.last_noted
            assert found is not None, "the rank that met it has listed it"
            raise bad(found)
        self.refuse_too_many(split, total)

    def note_broken_file(self, name: str, path: str | None, error: str, num_files: int, split: str = "train") -> None:
        """Notes an unreadable file of a split. Raises UserError if one such file, or their number, stops the run."""
        utterance = Skipped(name, "unreadable shard", error, path)
        self.note([utterance], split)
        if self.on_bad_utterance == "error":
            raise bad(utterance)
        self.broken_files.add(path)
        if len(self.broken_files) > self.max_bad_fraction * num_files:
            number = f"{len(self.broken_files):,} of {num_files:,} files cannot be read"
            wrong = f"{number}, which is more (the last: {path}: {error})"
            write = (
                "write data.path of files that are whole, or a higher data.max_bad_fraction to continue with the others"
            )
            raise UserError("data.max_bad_fraction", self.max_bad_fraction, wrong, write)

    def refuse_too_many(self, split: str, decoded: FilterCounts | None = None) -> None:
        """Raises UserError if more than `max_bad_fraction` of a split, as far as it has been seen, is bad."""
        planned, decoded = self.before_decoding[split], decoded or self.in_decoding[split]
        if planned.fraction + (1 - planned.fraction) * decoded.fraction <= self.max_bad_fraction:
            return
        filters = {"could not be used": planned, "could not be decoded": decoded}
        texts = [f"{seen.num_bad:,} of {seen.num_seen:,} {what}" for what, seen in filters.items() if seen.num_bad]
        faults = {reason: count for reason, count in self.totals().items() if reason not in LIMITED}
        in_all = f"(in all splits {in_words(faults)}; {self.file} lists them)"
        wrong = f"utterances of {split}: {', '.join(texts)}, which is more {in_all}"
        usable = "write data.path and data.columns of utterances that can be used"
        write = f"{usable}, or a higher data.max_bad_fraction to continue with the others"
        raise UserError("data.max_bad_fraction", self.max_bad_fraction, wrong, write)

    def note(self, skipped: Sequence[Skipped], split: str = "") -> None:
        """Lists the utterances that no rank has listed yet; logs a warning for the first one with each reason."""
        distinct = {key_of(utterance): utterance for utterance in skipped}
        new = (utterance.reason for key, utterance in distinct.items() if key not in self.met[split])
        self.of_split[split].update(new)
        self.met[split].update(distinct)
        if self.noted.issuperset(distinct):
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.read_more(file)
            file.truncate(self.num_bytes_read)  # drops an unfinished last line
            for key in [key for key in distinct if key not in self.noted]:
                utterance = distinct[key]
                if not self.counts[utterance.reason]:
                    first = " ".join(filter(None, (utterance.id, utterance.detail)))
                    logger.warning("skipping utterances: %s (first: %s)", utterance.reason, first)
                self.count(key, utterance)
                values = {name: getattr(utterance, name) for name in ("id", "path", "reason", "detail")}
                file.write(json.dumps(values).encode() + b"\n")
            file.flush()
            self.num_bytes_read = file.seek(0, os.SEEK_END)

    def totals(self) -> dict[str, int]:
        """Numbers of skipped utterances over all ranks by reason, most frequent first."""
        self.read()
        return dict(self.counts.most_common())

    def read(self) -> None:
        if self.file.is_file():
            with self.file.open("rb") as file:
                self.read_more(file)

    def read_more(self, file: IO[bytes]) -> None:
        """Counts the lines that other ranks, or this run before it was resumed, have added to the list."""
        if file.seek(0, os.SEEK_END) < self.num_bytes_read:  # a run that started anew has replaced the list
            self.noted, self.counts, self.num_bytes_read = set(), Counter(), 0
        file.seek(self.num_bytes_read)
        for text in file:
            if text.endswith(b"\n"):
                self.num_bytes_read += len(text)
                utterance = Skipped(**json.loads(text))
                self.count(key_of(utterance), utterance)

    def count(self, key: Key, utterance: Skipped) -> None:
        self.noted.add(key)
        self.last_noted = utterance
        self.counts[utterance.reason] += 1


def num_faults(skipped: Sequence[Skipped]) -> int:
    return sum(utterance.reason not in LIMITED for utterance in skipped)


def key_of(utterance: Skipped) -> Key:
    identity = utterance.id, utterance.reason, utterance.path
    return hashlib.blake2b(ascii(identity).encode(), digest_size=12).digest()


def in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def bad(utterance: Skipped) -> UserError:
    path = f" ({utterance.path})" if utterance.path else ""
    wrong = f"utterance {utterance.id!r}{path}: {utterance.reason} {utterance.detail}".rstrip()
    return UserError("data.on_bad_utterance", "error", wrong, "write data.on_bad_utterance=skip to continue without it")
