"""Streams a corpus: its shards in a random order, divided into blocks, each of them shuffled and batched.

The state of a stream is the start of a block and the steps made since; to resume there reads that one block again.
"""

import sys
import zlib
from collections import deque
from collections.abc import Iterator
from functools import lru_cache, partial
from math import ceil, floor
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from sedtrain.data.buckets import Bounds, Integers
from sedtrain.data.corpus import Corpus
from sedtrain.data.dataset import BatchesWithEpoch, Kept, Reference, SplitDataset, among, joined
from sedtrain.data.sampler import Position, other_reading, random_keys, refuse_other
from sedtrain.errors import UserError

STEPS_BEHIND = 256  # for which blocks and copies of shards stay: more than the batches that workers prefetch
NUM_AHEAD = 4  # remote shards that are fetched while the block before them is trained on


class BlockStart(NamedTuple):
    """Start of a block: visits of parts before it in the epoch, and rows before it in the visit that it begins in."""

    visit: int
    row: int


class BegunBlock(NamedTuple):
    """A block that batches are drawn from, and the steps of the epoch before it."""

    steps_before: int
    start: BlockStart
    batches: BatchesWithEpoch


class StreamedBatches(Sampler[tuple[int, list[Reference]] | UserError]):
    """One rank's batches of a corpus that is read in blocks, each with its epoch; `DurationBatches` cuts a block into them.

    A block has as many rows as the corpus says, counting those that are left out; else the epoch is one block. A part of
    weight 2 is visited twice in an epoch. Of a part of weight 0.5 one half is read, in the next epoch the other. How many
    batches there are is not known before the blocks are read, so it has no length.

    begun: the blocks of the last STEPS_BEHIND steps; what is consumed is of one of them
    """

    def __init__(
        self, dataset: SplitDataset, corpus: Corpus, bounds: Bounds, seed: int, rank: int = 0, num_ranks: int = 1
    ) -> None:
        self.dataset, self.corpus, self.seed = dataset, corpus, seed
        self.cut = partial(BatchesWithEpoch, dataset, bounds=bounds, seed=seed, rank=rank, num_ranks=num_ranks)
        self.weights = corpus.weights()
        self.block = lru_cache(maxsize=2)(self.read_block)
        self.start_epoch(0)

    # --- blocks

    def order(self, epoch: int) -> list[tuple[int, int]]:
        """The visits of an epoch, shuffled: (part, number of earlier visits to it in this epoch)."""
        visits = [(part, visit) for part, weight in enumerate(self.weights) for visit in range(ceil(weight))]
        keys = random_keys((self.seed, epoch, 2), len(visits))
        return [visits[i] for i in np.argsort(keys, kind="stable")]

    def digest(self) -> str:
        """Eight hexadecimal digits that differ where files, their order or their weights do, but not by their folder."""
        names = [part.name for part in self.dataset.parts.parts]
        return f"{zlib.crc32(repr((names, self.weights, self.corpus.block_rows)).encode()):08x}"

    def read_block(self, epoch: int, start: BlockStart) -> tuple[Kept, BlockStart]:
        """The utterances, of one part or several, of the block that begins at `start`, and where the next one starts.

        After the last visit blocks are empty.
        """
        order = self.order(epoch)
        found = []
        end, room = start, self.corpus.block_rows or sys.maxsize
        while end.visit < len(order) and room > 0:
            part, visit = order[end.visit]
            visited = self.rows_visited(part, visit, epoch)
            rows = visited[end.row : end.row + room]
            found.append(self.usable(part, rows))
            room, last = room - len(rows), end.row + len(rows)
            end = BlockStart(end.visit + 1, 0) if last >= len(visited) else BlockStart(end.visit, last)
        for part, _ in order[end.visit : end.visit + NUM_AHEAD]:
            self.dataset.parts.parts[part].fetch_ahead()
        return joined(found), end

    def rows_visited(self, part: int, visit: int, epoch: int) -> Integers:
        """The rows that a visit reads, each once: the visits of all epochs go round and round through the part."""
        num_rows = 0
        with self.corpus.noting("train", part):
            num_rows = len(self.dataset.parts[part])
        seen, due = (floor(count * self.weights[part] * num_rows) for count in (epoch, epoch + 1))
        first = seen + visit * num_rows
        rows = np.arange(first, min(first + num_rows, due)) % num_rows
        if self.weights[part] % 1:
            rows = np.argsort(random_keys((self.seed, part), num_rows), kind="stable")[rows]
        return rows

    def usable(self, part: int, rows: Integers) -> Kept:
        """Those of these rows that are used."""
        if not len(rows):
            return joined([])
        if len(self.dataset):
            return among(self.dataset.kept, part, rows)
        used = self.corpus.usable("train", part, self.dataset.parts[part], rows.tolist())
        self.corpus.skipped.refuse_too_many("train")
        return used

    def remove_copies_between(self, first: int, last: int) -> None:
        """Removes the copies of parts that have a visit from `first` to before `last`, and none later in the epoch."""
        if first == last:
            return
        order = self.order(self.epoch)
        needed = {part for part, _ in order[last:]}
        for part in {part for part, _ in order[first:last]} - needed:
            self.dataset.parts.remove_copy(part)

    # --- batches

    def start_epoch(self, epoch: int, resumed: Position | None = None) -> None:
        self.epoch, self.resumed = epoch, resumed
        self.begun: deque[BegunBlock] = deque()

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of every epoch; a resumed epoch continues where it stopped."""
        if epoch != self.epoch:
            self.start_epoch(epoch)

    def state_dict(self, consumed_steps: int) -> Position:
        """The position after `consumed_steps` of this epoch, those before it was resumed included."""
        assert self.begun, "batches are drawn before they are consumed"
        steps_before, start, batches = next(
            each for each in reversed(self.begun) if each.steps_before <= consumed_steps
        )
        position = batches.position(consumed_steps - steps_before)
        position["block"], position["steps_before"] = (start.visit, start.row), steps_before
        position["corpus"] = self.digest()
        return position

    def load_state_dict(self, state: Position) -> None:
        """Continues from a position, with any number of ranks.

        Raises UserError for a position in the middle of an epoch of other files, or of the same in another order.
        """
        is_streamed = "block" in state
        if not is_streamed and state["segments"]:
            raise other_reading("a corpus that is not streamed", self.corpus.streaming)
        if is_streamed and (state["steps_before"] or state["segments"]):
            refuse_other("files", (state["seed"], state["corpus"]), (self.seed, self.digest()))
        self.start_epoch(state["epoch"], state if is_streamed else None)

    def begin(self, kept: Kept, steps: int, start: BlockStart) -> BatchesWithEpoch:
        """The batches of a block that begins after so many steps; removes copies that no worker of any rank still reads."""
        batches = self.cut(kept, shuffle=True, block=start)
        batches.set_epoch(self.epoch)
        self.begun.append(BegunBlock(steps, start, batches))
        first = self.begun[0].start.visit
        while len(self.begun) > 1 and self.begun[1].steps_before <= steps - STEPS_BEHIND:
            self.begun.popleft()
        self.remove_copies_between(first, self.begun[0].start.visit)
        return batches

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
        self.start_epoch(self.epoch, resumed)
        while True:
            kept, end = self.block(self.epoch, start)
            batches = self.begin(kept, steps, start)
            if resumed is not None:
                batches.load_state_dict(resumed)
                resumed = None
            yield from batches
            if end == start:
                break
            steps, start = steps + len(batches), end
        if not steps:
            wrong = f"epoch {self.epoch} of the training corpus has no utterance that can be used"
            write = "write data.path and data.columns of some, or a higher data.mix.NAME.weight"
            raise UserError("data.path", self.corpus.path, wrong, write)
