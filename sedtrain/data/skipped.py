"""Utterances that are left out, listed in a file and counted by reason; too many faults stop the run."""

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
"""Fractions are of at least so many utterances, so that the first bad one of five stops nothing."""
BATCHES_BETWEEN_SUMS = 16
"""Interval at which ranks that decode different utterances add up their counts."""

Key = bytes
"""A digest of id, reason and path of an utterance, of which there may be millions."""


@dataclass
class FilterCounts:
    """Utterances that a filter has seen, and the faulty ones among them."""

    num_seen: int = 0
    num_bad: int = 0

    @property
    def fraction(self) -> float:
        return self.num_bad / max(self.num_seen, MIN_SEEN)


class SkippedUtterances:
    """Lists each utterance that is left out once, whichever rank meets it, how often, and however often the run resumes.

    The file is the list of all ranks; what others have added to it is read before anything is written.

    file:             a line of JSON for each utterance
    on_bad_utterance: `error` raises at the first one instead
    max_bad_fraction: a larger share of a split raises; the user's own limits do not count
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
        self.num_batches: Counter[str] = Counter()  # decoded so far of each split
        self.of_split: Mapping[str, Counter[str]] = defaultdict(Counter)  # by reason, in this process
        self.met: Mapping[str, set[Key]] = defaultdict(set)  # those counted in `of_split`
        self.read()

    def note_planned(self, split: str, num_seen: int, skipped: Sequence[Skipped]) -> None:
        """Notes utterances left out of `num_seen` before they are decoded; all ranks call it alike, then `refuse_too_many` once.

        Raises UserError if one faulty utterance stops the run.
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
        """Notes the utterances of a batch that could not be decoded. Raises UserError on all ranks at once.

        over_ranks: numbers of this rank -> their sums over all, where there are several; all call it at the same batch
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
        """Notes a file of a split that cannot be read. Raises UserError if it, or so many, stop the run."""
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
        """Raises UserError where more of a split is bad than `max_bad_fraction`, as far as it has been seen."""
        planned, decoded = self.before_decoding[split], decoded or self.in_decoding[split]
        if planned.fraction + (1 - planned.fraction) * decoded.fraction <= self.max_bad_fraction:
            return
        filters = {"could not be used": planned, "could not be decoded": decoded}
        texts = [f"{each.num_bad:,} of {each.num_seen:,} {what}" for what, each in filters.items() if each.num_bad]
        faults = {reason: count for reason, count in self.totals().items() if reason not in LIMITED}
        in_all = f"(in all splits {in_words(faults)}; {self.file} lists them)"
        wrong = f"utterances of {split}: {', '.join(texts)}, which is more {in_all}"
        usable = "write data.path and data.columns of utterances that can be used"
        write = f"{usable}, or a higher data.max_bad_fraction to continue with the others"
        raise UserError("data.max_bad_fraction", self.max_bad_fraction, wrong, write)

    def note(self, skipped: Sequence[Skipped], split: str = "") -> None:
        """Lists the utterances that no rank has listed yet; warns of the first one of a reason."""
        distinct = {key_of(utterance): utterance for utterance in skipped}
        self.of_split[split].update(each.reason for key, each in distinct.items() if key not in self.met[split])
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
        """Utterances left out over all ranks, counted by reason, most frequent first."""
        self.read()
        return dict(self.counts.most_common())

    def read(self) -> None:
        if self.file.is_file():
            with self.file.open("rb") as file:
                self.read_more(file)

    def read_more(self, file: IO[bytes]) -> None:
        """Counts the utterances that other ranks, or this run before it was resumed, have added to the list."""
        if file.seek(0, os.SEEK_END) < self.num_bytes_read:  # the list of a run that has started from the beginning
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
