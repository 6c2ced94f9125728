"""Utterances that are left out: counted by reason, listed in a file, told of once per reason; too many stop the run."""

import fcntl
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from sedtrain.batch import Skipped
from sedtrain.errors import UserError

logger = logging.getLogger(__name__)

ENOUGH = 100
"""Fractions are of so many utterances at least, so that the first bad one of five stops nothing."""
CHOSEN = frozenset({"too short", "too long", "text too short", "text too long"})
"""What the user's own limits leave out is no fault, and stops nothing however much it is."""
TOGETHER = 16
"""Batches after which ranks that decode different utterances count together."""


@dataclass
class Sieve:
    """How many utterances were looked at in one way, and how many of them were bad."""

    num_seen: int = 0
    num_bad: int = 0

    @property
    def fraction(self) -> float:
        return self.num_bad / max(self.num_seen, ENOUGH)


@dataclass
class Sieves:
    """Utterances of a split are looked at before they are decoded, and those that are left, when they are.

    num_batches: decoded so far
    """

    planned: Sieve = field(default_factory=Sieve)
    decoded: Sieve = field(default_factory=Sieve)
    num_batches: int = 0

    def fraction(self, decoded: Sieve) -> float:
        """Of bad ones among all, as far as is known."""
        return self.planned.fraction + (1 - self.planned.fraction) * decoded.fraction


class SkippedUtterances:
    """Notes each utterance once, whichever of the ranks meets it, how often, and in how many parts the run is done.

    The list of all ranks and parts is the file, which is read on before anything is written to it.

    file: a line of JSON for each
    on_bad_utterance: `error` raises at the first instead
    max_bad_fraction: more of a split raises; what is CHOSEN does not count
    """

    def __init__(
        self, file: Path, on_bad_utterance: Literal["skip", "error"] = "skip", max_bad_fraction: float = 1.0
    ) -> None:
        self.file, self.on_bad_utterance, self.max_bad_fraction = file, on_bad_utterance, max_bad_fraction
        self.noted: dict[tuple[str, str, str | None], Skipped] = {}
        self.counts: Counter[str] = Counter()
        self.num_bytes_read = 0
        self.broken_files: set[str] = set()
        self.sieves: Mapping[str, Sieves] = defaultdict(Sieves)
        self.read()

    def planned(self, split: str, num_seen: int, skipped: Sequence[Skipped]) -> None:
        """Notes what was left out of so many utterances before they are decoded, by all ranks alike.

        Raises UserError where bad utterances, or so many, are to stop the run.
        """
        self.note(skipped)
        if skipped and self.on_bad_utterance == "error":
            raise bad(skipped[0])
        sieves = self.sieves[split]
        sieves.planned.num_seen += num_seen
        sieves.planned.num_bad += num_faults(skipped)
        self.judge(split, sieves.decoded)

    def decoded(
        self,
        split: str,
        num_seen: int,
        skipped: Sequence[Skipped],
        over_ranks: Callable[[list[int]], list[int]] | None = None,
    ) -> None:
        """Notes what of a batch could not be decoded. Raises as `planned` does, where there are several ranks on all at once.

        over_ranks: numbers of this rank -> their sums over all, which all ranks call with their next batch
        """
        self.note(skipped)
        sieves = self.sieves[split]
        own = sieves.decoded
        own.num_seen += num_seen
        own.num_bad += num_faults(skipped) if self.on_bad_utterance == "skip" else len(skipped)
        sieves.num_batches += 1
        if over_ranks is None:
            total = own
        elif self.on_bad_utterance == "error" or sieves.num_batches % TOGETHER == 0:
            total = Sieve(*over_ranks([own.num_seen, own.num_bad]))
        else:
            return
        if total.num_bad and self.on_bad_utterance == "error":
            self.read()
            raise bad(skipped[0] if skipped else next(reversed(self.noted.values())))
        self.judge(split, total)

    def broken_file(self, name: str, place: str, error: str, num_files: int) -> None:
        """Notes one of the files of a split, of which nothing can be read. Raises as `planned` does."""
        utterance = Skipped(name, "unreadable shard", error, place)
        self.note([utterance])
        if self.on_bad_utterance == "error":
            raise bad(utterance)
        self.broken_files.add(place)
        if len(self.broken_files) > self.max_bad_fraction * num_files:
            raise UserError(
                f"{len(self.broken_files):,} of {num_files:,} files cannot be read, which is more than "
                f"data.max_bad_fraction={self.max_bad_fraction:g} (the last: {place}: {error})",
                "data.path of files that are whole, or a higher data.max_bad_fraction to go on with the others",
            )

    def judge(self, split: str, decoded: Sieve) -> None:
        sieves = self.sieves[split]
        if sieves.fraction(decoded) <= self.max_bad_fraction:
            return
        looked_at = {"could not be used": sieves.planned, "could not be decoded": decoded}
        told = [f"{each.num_bad:,} of {each.num_seen:,} {what}" for what, each in looked_at.items() if each.num_bad]
        faults = {reason: count for reason, count in self.totals().items() if reason not in CHOSEN}
        raise UserError(
            f"utterances of {split}: {', '.join(told)}, which is more than data.max_bad_fraction={self.max_bad_fraction:g} "
            f"(in all splits {in_words(faults)}; {self.file} names them)",
            "data.path and data.columns of utterances that can be used, "
            "or a higher data.max_bad_fraction to go on with the others",
        )

    def note(self, skipped: Sequence[Skipped]) -> None:
        """Lists those that no rank has listed yet; the first of a reason is told."""
        if not self.new(skipped):
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.read_on(file)
            file.truncate(self.num_bytes_read)  # without a last line that was cut
            for utterance in (new := self.new(skipped)):
                if not self.counts[utterance.reason]:
                    first = " ".join(filter(None, (utterance.id, utterance.detail)))
                    logger.warning("skipping utterances: %s (first: %s)", utterance.reason, first)
                self.count(utterance)
            file.write(b"".join(map(line, new)))
            file.flush()
            self.num_bytes_read = file.seek(0, os.SEEK_END)

    def new(self, skipped: Sequence[Skipped]) -> list[Skipped]:
        return [
            utterance for key, utterance in {key_of(each): each for each in skipped}.items() if key not in self.noted
        ]

    def totals(self) -> dict[str, int]:
        """How many were left out, over all ranks, by reason, most frequent first."""
        self.read()
        return dict(self.counts.most_common())

    def read(self) -> None:
        if self.file.is_file():
            with self.file.open("rb") as file:
                self.read_on(file)

    def read_on(self, file: IO[bytes]) -> None:
        """Counts what other ranks, or earlier parts of the run, have listed."""
        if file.seek(0, os.SEEK_END) < self.num_bytes_read:  # the list of a run that was begun anew
            self.noted, self.counts, self.num_bytes_read = {}, Counter(), 0
        file.seek(self.num_bytes_read)
        whole, end, _ = file.read().rpartition(b"\n")
        self.num_bytes_read += len(whole + end)
        for each in whole.splitlines():
            self.count(Skipped(**json.loads(each)))

    def count(self, utterance: Skipped) -> None:
        self.noted[key_of(utterance)] = utterance
        self.counts[utterance.reason] += 1


def num_faults(skipped: Sequence[Skipped]) -> int:
    return sum(utterance.reason not in CHOSEN for utterance in skipped)


def key_of(utterance: Skipped) -> tuple[str, str, str | None]:
    return utterance.id, utterance.reason, utterance.path


def line(utterance: Skipped) -> bytes:
    order = ("id", "path", "reason", "detail")
    return json.dumps({name: getattr(utterance, name) for name in order}).encode() + b"\n"


def in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def bad(utterance: Skipped) -> UserError:
    where = f" ({utterance.path})" if utterance.path else ""
    return UserError(
        f"utterance {utterance.id!r}{where}: {utterance.reason} {utterance.detail}".rstrip(),
        "data.on_bad_utterance=skip to go on without it",
    )
