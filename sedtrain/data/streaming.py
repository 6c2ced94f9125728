"""Corpora that are not read whole before training: shards in a random order, cut into blocks, each shuffled and batched.

The state of a stream is a place in that order and the steps made since; going on there reads one block anew.
"""

import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import ceil, floor
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from sedtrain.data.buckets import Bucket
from sedtrain.data.corpus import Corpus, Reference
from sedtrain.data.dataset import SplitDataset
from sedtrain.data.sampler import BatchesWithEpoch, DurationBatches, Position, other_kind, random_keys
from sedtrain.errors import UserError

STEPS_BEHIND = 256  # more than the batches that workers prefetch
NUM_AHEAD = 4  # remote files are fetched while the block before them is trained on


class Place(NamedTuple):
    """Where a block begins: how many visits of parts come before it in the epoch, and how many rows of its first."""

    visit: int
    row: int


class Block(NamedTuple):
    """Utterances that are shuffled and batched together; they may come from several parts, and a part be cut."""

    references: list[Reference]
    seconds: list[float]
    tokens: list[int] | None
    end: Place


class Stream:
    """The blocks of an epoch.

    A part of weight 2 is visited twice in an epoch; of one of weight 0.5 half is read, and in the next epoch the other.

    num_rows: of a block, those that are left out included; None: the epoch is one block
    """

    def __init__(
        self, dataset: SplitDataset, corpus: Corpus, num_rows: int | None, seed: int, *, counts_tokens: bool
    ) -> None:
        self.dataset, self.corpus, self.num_rows = dataset, corpus, num_rows
        self.seed, self.counts_tokens = seed, counts_tokens
        self.weights = corpus.weights()
        self.known = dict(zip(dataset.references, dataset.seconds, strict=True))
        self.block = lru_cache(maxsize=2)(self.read_block)

    def order(self, epoch: int) -> list[tuple[int, int]]:
        """Every visit of an epoch as (part, how many visits of it came before), shuffled."""
        visits = [(part, visit) for part, weight in enumerate(self.weights) for visit in range(ceil(weight))]
        keys = random_keys((self.seed, epoch, 2), len(visits))
        return [visits[i] for i in np.argsort(keys, kind="stable")]

    def digest(self) -> str:
        """Eight hexadecimal digits that differ where files, their order or their weights do; folders may be renamed."""
        names = [part.name for part in self.dataset.parts.parts]
        return f"{zlib.crc32(repr((names, self.weights, self.num_rows)).encode()):08x}"

    def read_block(self, epoch: int, start: Place) -> Block:
        """The block that begins at `start`; behind the last visit an empty one."""
        order = self.order(epoch)
        references: list[Reference] = []
        seconds: list[float] = []
        tokens: list[int] = []
        place, room = start, self.num_rows
        while place.visit < len(order) and (room is None or room > 0):
            part, _ = order[place.visit]
            visited = self.rows_visited(*order[place.visit], epoch)
            here = visited[place.row : None if room is None else place.row + room]
            kept = self.sift(part, here)
            references += [(part, index) for index in kept]
            seconds += kept.values()
            if self.counts_tokens:
                tokens += self.dataset.num_tokens(part, list(kept))
            room = None if room is None else room - len(here)
            is_read = place.row + len(here) >= len(visited)
            place = Place(place.visit + 1, 0) if is_read else Place(place.visit, place.row + len(here))
        for part, _ in order[place.visit : place.visit + NUM_AHEAD]:
            self.dataset.parts.fetch_ahead(part)
        return Block(references, seconds, tokens if self.counts_tokens else None, place)

    def rows_visited(self, part: int, visit: int, epoch: int) -> list[int]:
        """Rows of a part, each once: all visits of all epochs together go through them round and round."""
        opened = self.corpus.opened(self.dataset.parts, part)
        num_rows = 0 if opened is None else len(opened)
        seen, due = (floor(count * self.weights[part] * num_rows) for count in (epoch, epoch + 1))
        first = seen + visit * num_rows
        rows = np.arange(first, min(first + num_rows, due)) % num_rows
        if self.weights[part] % 1:
            rows = np.argsort(random_keys((self.seed, part), num_rows), kind="stable")[rows]
        return rows.tolist()

    def sift(self, part: int, indices: list[int]) -> dict[int, float]:
        if not indices:
            return {}
        if self.known:
            return {index: self.known[part, index] for index in indices if (part, index) in self.known}
        kept, skipped = self.corpus.limits.sift(self.dataset.parts[part], indices, rewrite=self.corpus.rewrite)
        self.corpus.skipped.planned("train", len(indices), skipped)
        return kept

    def remove_copies_between(self, epoch: int, first: int, last: int) -> None:
        """Parts whose visits, the last of them among these, are all over need no copy any more."""
        if first == last:
            return
        order = self.order(epoch)
        needed = {part for part, _ in order[last:]}
        for part in {part for part, _ in order[first:last]} - needed:
            self.dataset.parts.remove_copy(part)


class BegunBlock(NamedTuple):
    """A block that batches are drawn from, and the steps of the epoch before it."""

    steps_before: int
    start: Place
    batches: DurationBatches


class StreamedBatches(Sampler[tuple[int, list[Reference]]]):
    """One rank's batches of a stream, each with its epoch; what `DurationBatches` promises holds within every block.

    Nobody knows how many there are, so that it has no length.
    """

    def __init__(
        self,
        stream: Stream,
        batch_seconds: float,
        batch_tokens: int | None,
        num_buckets: int,
        seed: int,
        rank: int,
        num_ranks: int,
        buckets: Sequence[Bucket] | None = None,
    ) -> None:
        self.stream, self.seed, self.rank, self.num_ranks = stream, seed, rank, num_ranks
        self.batch_seconds, self.batch_tokens, self.num_buckets = batch_seconds, batch_tokens, num_buckets
        self.buckets = buckets
        self.epoch = 0
        self.begin()

    def begin(self) -> None:
        self.steps_before, self.start = 0, Place(0, 0)
        self.in_block: Position | None = None
        self.begun: list[BegunBlock] = []
        self.passed: deque[tuple[int, Place]] = deque()
        self.num_removed = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of every epoch; the one that was resumed goes on where it stopped."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.begin()

    def state_dict(self, consumed_steps: int) -> Position:
        """The position after so many steps of this epoch, those before a resumption included."""
        assert self.begun, "batches are drawn before they are consumed"
        while len(self.begun) > 1 and self.begun[1].steps_before <= consumed_steps:
            self.begun.pop(0)
        steps_before, start, batches = self.begun[0]
        position = batches.position(consumed_steps - steps_before)
        position["block"], position["steps_before"] = (start.visit, start.row), steps_before
        position["corpus"] = self.stream.digest()
        return position

    def load_state_dict(self, state: Position) -> None:
        """Continues from a position, with any number of ranks.

        Raises UserError in the middle of an epoch that reads other files, or those in another order.
        """
        self.epoch = state["epoch"]
        self.begin()
        if "block" not in state and state["segments"]:
            raise other_kind("a corpus that is not streamed")
        if "block" in state:
            written, here = (state["seed"], state["corpus"]), (self.seed, self.stream.digest())
            if written != here and (state["steps_before"] or state["segments"]):
                raise UserError(
                    "the checkpoint is from the middle of an epoch over other files: its seed and their digest are "
                    f"{written[0]} and {written[1]}, here they are {here[0]} and {here[1]}",
                    "the seed and the data.* of the run that wrote it, or a checkpoint from the end of an epoch",
                )
            self.steps_before, self.start = state["steps_before"], Place(*state["block"])
            self.in_block = state

    def batches_of(self, block: Block, start: Place) -> DurationBatches:
        batches = DurationBatches(
            self.stream.dataset.longest * np.array(block.seconds),
            self.batch_seconds,
            shuffle=True,
            seed=self.seed,
            rank=self.rank,
            num_ranks=self.num_ranks,
            tokens=block.tokens,
            batch_tokens=self.batch_tokens,
            num_buckets=self.num_buckets,
            buckets=self.buckets,
            block=start,
        )
        batches.set_epoch(self.epoch)
        return batches

    def remove_copies(self, steps: int, start: Place) -> None:
        """Of what was read so long ago that no worker of any rank can still be at it."""
        self.passed.append((steps, start))
        while len(self.passed) > 1 and self.passed[1][0] <= steps - STEPS_BEHIND:
            self.passed.popleft()
        last = self.passed[0][1].visit
        self.stream.remove_copies_between(self.epoch, self.num_removed, last)
        self.num_removed = last

    def __iter__(self) -> Iterator[tuple[int, list[Reference]]]:
        """Raises UserError at the end of an epoch without an utterance, and where a resumed block is another."""
        steps, start, resumed = self.steps_before, self.start, self.in_block
        self.begun = []
        self.passed.clear()
        self.num_removed = 0
        while True:
            block = self.stream.block(self.epoch, start)
            batches = self.batches_of(block, start)
            if resumed is not None:
                batches.load_state_dict(resumed)
                resumed = None
            self.begun.append(BegunBlock(steps, start, batches))
            self.remove_copies(steps, start)
            yield from BatchesWithEpoch(batches, block.references)
            if block.end == start:
                break
            steps, start = steps + len(batches), block.end
        if not steps:
            raise UserError(
                f"epoch {self.epoch} of the training corpus has no utterance that can be used",
                "data.path and data.columns of some, or a higher data.mix.NAME.weight",
            )
