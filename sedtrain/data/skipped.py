"""Utterances that are left out: by limits or faults, listed in a file and counted by reason; too many stop the run."""

import fcntl
import json
import logging
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import IO, Literal

from sedtrain.batch import Skipped
from sedtrain.data.buckets import Floats
from sedtrain.data.tables import NOT_TEXT
from sedtrain.data.utterances import Reason, UtteranceRows
from sedtrain.errors import UserError

logger = logging.getLogger(__name__)

MIN_SEEN = 100
"""Fractions are of at least so many utterances, so that the first bad one of five stops nothing."""
LIMITED = frozenset({"too short", "too long", "text too short", "text too long"})
"""Reasons that are the user's own limits: they are no faults, and stop no run."""
SCORED = 4
"""A scored utterance may be longer by this factor than one that is trained on: no activations are kept for gradients."""
BATCHES_BETWEEN_SUMS = 16
"""Interval at which ranks that decode different utterances add up their counts."""

Key = tuple[str, str, str | None]
"""Id, reason and path of an utterance."""


@dataclass(frozen=True)
class Limits:
    """The lengths of audio and text that an utterance needs to be used. Raises UserError for limits that none can keep.

    min_characters: 0 allows texts that are empty
    longest: the option that `max_seconds` is from, for messages
    """

    min_seconds: float
    max_seconds: float
    min_characters: int = 1
    max_characters: int = 10_000
    longest: str = "data.max_seconds"

    def __post_init__(self) -> None:
        if self.max_seconds <= self.min_seconds:
            above = f"above min_seconds, {self.min_seconds}"
            write = f"write data.max_seconds=NUMBER {above}"
            raise UserError("data.max_seconds", self.max_seconds, f"this has to be {above}", write)
        if self.max_characters < self.min_characters:
            or_more = f"min_characters, {self.min_characters}, or more"
            write = f"write data.max_characters=NUMBER, {or_more}"
            raise UserError("data.max_characters", self.max_characters, f"this has to be {or_more}", write)

    def scored(self, batch_seconds: float) -> "Limits":
        """Those of a split that is scored in batches alone: only audio too long for the memory is left out."""
        by_length = (SCORED * self.max_seconds, f"{SCORED} * {self.longest}")
        most, option = max(by_length, (batch_seconds, "data.batch_seconds"))
        return Limits(0.0, most, 0, sys.maxsize, option)

    def filter(
        self,
        rows: UtteranceRows,
        indices: Sequence[int],
        seconds: Floats | None = None,
        rewrite: Callable[[str], str] = str,
    ) -> tuple[dict[int, float], dict[int, Skipped]]:
        """The seconds of the rows that are used, by index, and the other rows with the reason.

        seconds: of each row, where they are known already; NaN for a row whose length cannot be found
        rewrite: what is done to texts before they are learnt; it must leave something of a text that is used
        """
        kept: dict[int, float] = {}
        skipped: dict[int, Skipped] = {}
        known = rows.seconds(indices) if seconds is None else seconds
        for index, length, text in zip(indices, known.tolist(), rows.texts(indices), strict=True):
            reason = rows.problem(index, length) or self.refused_length(length)
            if reason and reason[0] in LIMITED:  # what a column declares is no reason before the audio bears it out
                reason = rows.misdeclared(index) or reason
            if reason := reason or self.refused_text(text, rewrite):
                skipped[index] = rows.skipped(index, *reason)
            else:
                kept[index] = length
        return kept, skipped

    def refused_length(self, seconds: float) -> Reason | None:
        if seconds < self.min_seconds:
            return "too short", f"{seconds:.2f} s < data.min_seconds={self.min_seconds}"
        return too_long(seconds, self.max_seconds, self.longest) if seconds > self.max_seconds else None

    def refused_text(self, text: str, rewrite: Callable[[str], str] = str) -> Reason | None:
        number = len(text.strip())
        if text.startswith(NOT_TEXT):
            return "text that is not text", shortened(text.removeprefix(NOT_TEXT))
        if not any(character.isprintable() and character != " " for character in text):
            return ("empty text", shortened(text) if number else "") if self.min_characters else None
        if number < self.min_characters:
            return "text too short", f"{number} characters < data.min_characters={self.min_characters}"
        if number > self.max_characters:
            return "text too long", f"{number} characters > data.max_characters={self.max_characters}"
        is_emptied = self.min_characters and not rewrite(text).strip()
        return ("text empty once normalized", shortened(text)) if is_emptied else None


WHOLE = Limits(0.0, inf, 0, sys.maxsize)
"""Those of a split whose long utterances are cut to windows: all of it is scored."""


def too_long(seconds: float, most: float, option: str) -> Reason:
    return "too long", f"{seconds:.2f} s > {option}={most:g}"


def shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


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
        self.noted: dict[Key, Skipped] = {}
        self.counts: Counter[str] = Counter()
        self.num_bytes_read = 0
        self.broken_files: set[str | None] = set()
        self.before_decoding: Mapping[str, FilterCounts] = defaultdict(FilterCounts)
        self.in_decoding: Mapping[str, FilterCounts] = defaultdict(FilterCounts)
        self.num_batches: Counter[str] = Counter()  # decoded so far of each split
        self.reasons: dict[str, dict[Key, str]] = defaultdict(dict)  # by split, in this process
        self.read()

    def planned(self, split: str, num_seen: int, skipped: Sequence[Skipped]) -> None:
        """Notes the utterances left out of `num_seen` before they are decoded; all ranks call it alike.

        Raises UserError if one faulty utterance, or this many, stop the run.
        """
        self.note(skipped, split)
        if skipped and self.on_bad_utterance == "error":
            raise bad(skipped[0])
        self.before_decoding[split].num_seen += num_seen
        self.before_decoding[split].num_bad += num_faults(skipped)
        self.judge(split, self.in_decoding[split])

    def decoded(
        self,
        split: str,
        num_seen: int,
        skipped: Sequence[Skipped],
        over_ranks: Callable[[list[int]], list[int]] | None = None,
    ) -> None:
        """Notes the utterances of a batch that could not be decoded. Raises as `planned` does, on all ranks at once.

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
            raise bad(skipped[0] if skipped else next(reversed(self.noted.values())))
        self.judge(split, total)

    def broken_file(self, name: str, path: str | None, error: str, num_files: int, split: str = "train") -> None:
        """Notes one of the files of a split, of which nothing can be read. Raises as `planned` does."""
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

    def judge(self, split: str, decoded: FilterCounts) -> None:
        """Raises UserError where more of a split is bad than `max_bad_fraction`, as far as it has been seen."""
        planned = self.before_decoding[split]
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

    def of_split(self, split: str) -> dict[str, int]:
        """Utterances of a split that this process has left out, counted by reason, most frequent first."""
        return dict(Counter(self.reasons[split].values()).most_common())

    def note(self, skipped: Sequence[Skipped], split: str = "") -> None:
        """Lists the utterances that no rank has listed yet; warns of the first one of a reason."""
        self.reasons[split].update({key_of(utterance): utterance.reason for utterance in skipped})
        if not self.new(skipped):
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.read_more(file)
            file.truncate(self.num_bytes_read)  # drops an unfinished last line
            for utterance in (new := self.new(skipped)):
                if not self.counts[utterance.reason]:
                    first = " ".join(filter(None, (utterance.id, utterance.detail)))
                    logger.warning("skipping utterances: %s (first: %s)", utterance.reason, first)
                self.count(utterance)
            file.write(b"".join(map(line, new)))
            file.flush()
            self.num_bytes_read = file.seek(0, os.SEEK_END)

    def new(self, skipped: Sequence[Skipped]) -> list[Skipped]:
        distinct = {key_of(utterance): utterance for utterance in skipped}
        return [utterance for key, utterance in distinct.items() if key not in self.noted]

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
        if file.seek(0, os.SEEK_END) < self.num_bytes_read:  # the list of a run that has started anew
            self.noted, self.counts, self.num_bytes_read = {}, Counter(), 0
        file.seek(self.num_bytes_read)
        finished, end, _ = file.read().rpartition(b"\n")
        self.num_bytes_read += len(finished + end)
        for text in finished.splitlines():
            self.count(Skipped(**json.loads(text)))

    def count(self, utterance: Skipped) -> None:
        self.noted[key_of(utterance)] = utterance
        self.counts[utterance.reason] += 1


def num_faults(skipped: Sequence[Skipped]) -> int:
    return sum(utterance.reason not in LIMITED for utterance in skipped)


def key_of(utterance: Skipped) -> Key:
    return utterance.id, utterance.reason, utterance.path


def line(utterance: Skipped) -> bytes:
    order = ("id", "path", "reason", "detail")
    return json.dumps({name: getattr(utterance, name) for name in order}).encode() + b"\n"


def in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def bad(utterance: Skipped) -> UserError:
    path = f" ({utterance.path})" if utterance.path else ""
    wrong = f"utterance {utterance.id!r}{path}: {utterance.reason} {utterance.detail}".rstrip()
    return UserError("data.on_bad_utterance", "error", wrong, "write data.on_bad_utterance=skip to continue without it")
