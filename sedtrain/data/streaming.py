"""Streams a corpus: its shards in a random order, divided into blocks, each of them shuffled and batched.

The state of a stream is the start of a block and the steps made since; to resume there reads that one block again.
"""

import zlib
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from math import ceil, floor
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from sedtrain.data.buckets import Bounds, Floats, Integers
from sedtrain.data.corpus import Corpus
from sedtrain.data.dataset import Kept, Reference, SplitDataset
from sedtrain.data.sampler import (
    BatchesWithEpoch,
    Position,
    other_reading,
    random_keys,
    refuse_other,
)
from sedtrain.errors import UserError

STEPS_BEHIND = 256  # for which copies of shards stay: more than the batches that workers prefetch
NUM_AHEAD = 4  # remote shards that are fetched while the block before them is trained on


class BlockStart(NamedTuple):
    """Start of a block: visits of parts before it in the epoch, and rows before it in the visit that it begins in."""

    visit: int
    row: int


class Block(NamedTuple):
    """Utterances that are shuffled and batched together, of several parts or of one; `end` is where the next one starts."""

    kept: Kept
    tokens: list[int] | None
    end: BlockStart


class Stream:
    """The blocks of an epoch.

    A part of weight 2 is visited twice in an epoch. Of a part of weight 0.5 one half is read, in the next epoch the other.

    num_rows: rows of a block, counting those that are left out; None: the epoch is one block
    """

    def __init__(
        self, dataset: SplitDataset, corpus: Corpus, num_rows: int | None, seed: int, *, counts_tokens: bool
    ) -> None:
        self.dataset, self.corpus, self.num_rows = dataset, corpus, num_rows
        self.seed, self.counts_tokens = seed, counts_tokens
        self.weights = corpus.weights()
        self.block = lru_cache(maxsize=2)(self.read_block)

    def order(self, epoch: int) -> list[tuple[int, int]]:
        """The visits of an epoch, shuffled: (part, number of earlier visits to it in this epoch)."""
        visits = [(part, visit) for part, weight in enumerate(self.weights) for visit in range(ceil(weight))]
        keys = random_keys((self.seed, epoch, 2), len(visits))
        return [visits[i] for i in np.argsort(keys, kind="stable")]

    def digest(self) -> str:
        """Eight hexadecimal digits that differ where files, their order or their weights do, but not by their folder."""
        names = [part.name for part in self.dataset.parts.parts]
        return f"{zlib.crc32(repr((names, self.weights, self.num_rows)).encode()):08x}"

    def read_block(self, epoch: int, start: BlockStart) -> Block:
        """The block that begins at `start`; after the last visit, an empty one."""
        order = self.order(epoch)
        parts: list[tuple[int, Integers, Floats]] = []
        tokens: list[int] = []
        end, room = start, self.num_rows
        while end.visit < len(order) and (room is None or room > 0):
            part, _ = order[end.visit]
            visited = self.rows_visited(*order[end.visit], epoch)
            rows = visited[end.row : None if room is None else end.row + room]
            kept, seconds = self.filter(part, rows)
            parts.append((part, kept, seconds))
            if self.counts_tokens:
                tokens += self.dataset.num_tokens(part, kept.tolist())
            room = None if room is None else room - len(rows)
            last = end.row + len(rows)
            end = BlockStart(end.visit + 1, 0) if last >= len(visited) else BlockStart(end.visit, last)
        for part, _ in order[end.visit : end.visit + NUM_AHEAD]:
            self.dataset.parts.parts[part].fetch_ahead()
        return Block(Kept.of(parts), tokens if self.counts_tokens else None, end)

    def rows_visited(self, part: int, visit: int, epoch: int) -> Integers:
        """The rows that a visit reads, each once: the visits of all epochs go round and round through the part."""
        opened = self.corpus.open(self.dataset.parts, part)
        num_rows = 0 if opened is None else len(opened)
        seen, due = (floor(count * self.weights[part] * num_rows) for count in (epoch, epoch + 1))
        first = seen + visit * num_rows
        rows = np.arange(first, min(first + num_rows, due)) % num_rows
        if self.weights[part] % 1:
            rows = np.argsort(random_keys((self.seed, part), num_rows), kind="stable")[rows]
        return rows

    def filter(self, part: int, visited: Integers) -> tuple[Integers, Floats]:
        """The rows that are used, and their seconds."""
        if not len(visited):
            return visited, np.empty(0)
        if len(self.dataset):
            return self.dataset.kept.among(part, visited)
        rows = self.dataset.parts[part]
        used = self.corpus.usable("train", rows, visited.tolist())
        is_learnable = self.corpus.learnable(rows, list(used), used.values())
        self.corpus.skipped.judge("train")
        return np.array([*used], np.int64)[is_learnable], np.array([*used.values()])[is_learnable]

    def remove_copies_between(self, epoch: int, first: int, last: int) -> None:
        """Removes the copies of parts that have a visit from `first` to before `last`, and none later in the epoch."""
        if first == last:
            return
        order = self.order(epoch)
        needed = {part for part, _ in order[last:]}
        for part in {part for part, _ in order[first:last]} - needed:
            self.dataset.parts.remove_copy(part)


class BegunBlock(NamedTuple):
    """A block that batches are drawn from, and the steps of the epoch before it."""

    steps_before: int
    start: BlockStart
    batches: BatchesWithEpoch


class StreamedBatches(Sampler[tuple[int, list[Reference]] | UserError]):
    """One rank's batches of a stream, each with its epoch; `DurationBatches` cuts each block into them.

    How many there are is not known before the stream is read, so it has no length.
    """

    def __init__(self, stream: Stream, bounds: Bounds, seed: int, rank: int, num_ranks: int) -> None:
        self.stream, self.bounds, self.seed, self.rank, self.num_ranks = stream, bounds, seed, rank, num_ranks
        self.begin(0)

    def begin(self, epoch: int, resumed: Position | None = None) -> None:
        self.epoch, self.resumed = epoch, resumed
        self.begun: list[BegunBlock] = []
        self.passed: deque[tuple[int, BlockStart]] = deque()
        self.num_removed = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of every epoch; a resumed epoch continues where it stopped."""
        if epoch != self.epoch:
            self.begin(epoch)

    def state_dict(self, consumed_steps: int) -> Position:
        """The position after `consumed_steps` of this epoch, those before it was resumed included."""
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

        Raises UserError for a position in the middle of an epoch of other files, or of the same in another order.
        """
        is_streamed = "block" in state
        if not is_streamed and state["segments"]:
            raise other_reading("a corpus that is not streamed", self.stream.num_rows is not None)
        if is_streamed and (state["steps_before"] or state["segments"]):
            refuse_other("files", (state["seed"], state["corpus"]), (self.seed, self.stream.digest()))
        self.begin(state["epoch"], state if is_streamed else None)

    def batches_of(self, block: Block, start: BlockStart) -> BatchesWithEpoch:
        batches = BatchesWithEpoch(
            block.kept.references,
            self.stream.dataset.longest * block.kept.seconds,
            self.bounds,
            shuffle=True,
            seed=self.seed,
            rank=self.rank,
            num_ranks=self.num_ranks,
            tokens=block.tokens,
            block=start,
        )
        batches.set_epoch(self.epoch)
        return batches

    def remove_copies(self, steps: int, start: BlockStart) -> None:
        """Removes the copies of parts that were read so long ago that no worker of any rank can still read them."""
        self.passed.append((steps, start))
        while len(self.passed) > 1 and self.passed[1][0] <= steps - STEPS_BEHIND:
            self.passed.popleft()
        last = self.passed[0][1].visit
        self.stream.remove_copies_between(self.epoch, self.num_removed, last)
        self.num_removed = last

    def __iter__(self) -> Iterator[tuple[int, list[Reference]] | UserError]:
        """The batches; a UserError that ends them comes as the last item.

        A DataLoader that is interrupted while it starts its workers would close the pipes of their queues twice.
        """
        try:
            yield from self.draw()
        except UserError as error:
            yield error

    def draw(self) -> Iterator[tuple[int, list[Reference]]]:
        """Raises UserError at the end of an epoch without an utterance, and for a resumed block that has changed."""
        steps, start, resumed = 0, BlockStart(0, 0), self.resumed
        if resumed is not None:
            steps, start = resumed["steps_before"], BlockStart(*resumed["block"])
        self.begin(self.epoch, resumed)
        while True:
            block = self.stream.block(self.epoch, start)
            batches = self.batches_of(block, start)
            if resumed is not None:
                batches.load_state_dict(resumed)
                resumed = None
            self.begun.append(BegunBlock(steps, start, batches))
            self.remove_copies(steps, start)
            yield from batches
            if block.end == start:
                break
            steps, start = steps + len(batches), block.end
        if not steps:
            wrong = f"epoch {self.epoch} of the training corpus has no utterance that can be used"
            write = "write data.path and data.columns of some, or a higher data.mix.NAME.weight"
            raise UserError("data.path", self.stream.corpus.path, wrong, write)
