"""Streams a corpus: reads its shards in random order and cuts them into blocks; each block is shuffled and batched.

The state of a stream is the start of a block and the steps made since. To resume, only that block is read again.
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

STEPS_BEHIND = 256  # steps for which old blocks and copies of shards are kept; more than workers prefetch
NUM_AHEAD = 4  # remote shards to fetch ahead while the block before them is trained on


class BlockStart(NamedTuple):
    """Start of a block: number of completed visits of parts in the epoch, and of rows read in the next visit."""

    visit: int
    row: int


class BegunBlock(NamedTuple):
    """A block with its batches, and the number of the epoch's steps before it."""

    steps_before: int
    start: BlockStart
    batches: BatchesWithEpoch


class StreamedBatches(Sampler[tuple[int, list[Reference]] | UserError]):
    """One rank's batches, each with its epoch, of a corpus read in blocks. `DurationBatches` cuts a block into batches.

    A block has `corpus.block_rows` rows, skipped ones included; if that is None, the epoch is one block. A part of weight
    2 is visited twice in an epoch. A part of weight 0.5 is half read in one epoch, and its other half in the next. The
    number of batches is unknown until the blocks are read, so this sampler has no length.

    begun: the blocks of the last STEPS_BEHIND steps; the trainer's current batch is from one of them
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
        """The visits of an epoch, shuffled: (part, number of its earlier visits in this epoch)."""
        visits = [(part, visit) for part, weight in enumerate(self.weights) for visit in range(ceil(weight))]
        keys = random_keys((self.seed, epoch, 2), len(visits))
        return [visits[i] for i in np.argsort(keys, kind="stable")]

    def digest(self) -> str:
        """Eight hexadecimal digits that change with the names, order or weights of files, but not with their folder."""
        names = [part.name for part in self.dataset.parts.parts]
        return f"{zlib.crc32(repr((names, self.weights, self.corpus.block_rows)).encode()):08x}"

    def read_block(self, epoch: int, start: BlockStart) -> tuple[Kept, BlockStart]:
        """The utterances of the block that begins at `start`, and the start of the next block.

        A block may span several parts. After the last visit blocks are empty.
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
        """The rows that a visit reads, without repeats. The visits of all epochs cycle through the part."""
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
        """The used ones among `rows` of a part."""
        if not len(rows):
            return joined([])
        if len(self.dataset):
            return among(self.dataset.kept, part, rows)
        used = self.corpus.usable("train", part, self.dataset.parts[part], rows.tolist())
        self.corpus.skipped.refuse_too_many("train")
        return used

    def remove_copies_between(self, first: int, last: int) -> None:
        """Removes the copies of parts with a visit in [first, last) and no later visit in the epoch."""
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
        """The position after `consumed_steps` of this epoch, including the steps before it was resumed."""
        assert self.begun, "batches are drawn before they are consumed"
        steps_before, start, batches = next(
            block for block in reversed(self.begun) if block.steps_before <= consumed_steps
        )
        position = batches.position(consumed_steps - steps_before)
        position["block"], position["steps_before"] = (start.visit, start.row), steps_before
        position["corpus"] = self.digest()
        return position

    def load_state_dict(self, state: Position) -> None:
        """Continues from a position, with any number of ranks.

        Raises UserError for a position in the middle of an epoch of other files, or of the same files in another order.
        """
        is_streamed = "block" in state
        if not is_streamed and state["segments"]:
            raise other_reading("a corpus that is not streamed", self.corpus.streaming)
        if is_streamed and (state["steps_before"] or state["segments"]):
            refuse_other("files", (state["seed"], state["corpus"]), (self.seed, self.digest()))
        self.start_epoch(state["epoch"], state if is_streamed else None)

    def begin(self, kept: Kept, steps: int, start: BlockStart) -> BatchesWithEpoch:
        """The batches of a block that begins after `steps` steps; removes copies that no worker of any rank still reads."""
        batches = self.cut(kept, shuffle=True, block=start)
        batches.set_epoch(self.epoch)
        self.begun.append(BegunBlock(steps, start, batches))
        first = self.begun[0].start.visit
        while len(self.begun) > 1 and self.begun[1].steps_before <= steps - STEPS_BEHIND:
            self.begun.popleft()
        self.remove_copies_between(first, self.begun[0].start.visit)
        return batches

    def __iter__(self) -> Iterator[tuple[int, list[Reference]] | UserError]:
        """Yields the batches; yields a UserError that ends them as the last item.

        A raised error would interrupt a DataLoader that starts its workers, which then closes its queues' pipes twice.
        """
        try:
            yield from self.draw()
        except UserError as error:
            yield error

    def draw(self) -> Iterator[tuple[int, list[Reference]]]:
        """Yields the batches. Raises UserError if the epoch has no usable utterance, or if a resumed block has changed."""
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
