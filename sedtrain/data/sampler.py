"""The batches of an epoch, planned from durations and text lengths alone: bounded, shuffled, shared by ranks, resumed.

N utterances, M batches, G groups of utterances that may share a batch, R ranks. A step takes a batch on every rank.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from sedtrain.data.buckets import Bucket, Floats, Integers, bounded, fitted
from sedtrain.errors import UserError

SHORTEST_SECONDS = 0.1  # what is shorter gets silence behind it
MAX_NEIGHBOURS = 4  # batches that are drawn together and sorted: 98.9 % of the audio is real, with 1 it is 95.6 %
EMPTY = -1  # the batch of a rank that has run dry


class BatchPlan:
    """Which utterances may share a batch, and how many: the same in every epoch, so that all have equally many batches.

    A group is a bucket of durations, or the part of one whose texts are so long that they halve its batches, once or
    oftener. All batches of a group hold as many utterances as its longest ones allow; the last may hold fewer.
    With `buckets` the groups are these, their sizes are known, and the other bounds have no say.

    groups:         (N,) the group of each utterance
    starts:         (M + 1,) where each batch begins in `utterances`
    batch_groups:   (M,) the group of each batch, ascending
    neighbourhoods: (N,) ascending numbers of the batches, one to four of a group, that are drawn together
    """

    def __init__(
        self,
        seconds: Sequence[float] | Floats,
        batch_seconds: float,
        tokens: Sequence[int] | Integers | None = None,
        batch_tokens: int | None = None,
        num_buckets: int = 30,
        buckets: Sequence[Bucket] | None = None,
    ) -> None:
        self.seconds = np.maximum(np.asarray(seconds, dtype=np.float64), SHORTEST_SECONDS)
        counted = None if tokens is None else np.asarray(tokens, dtype=np.int64)
        if buckets is None:
            self.groups, sizes = bounded(self.seconds, batch_seconds, counted, batch_tokens, num_buckets)
        else:
            assert counted is not None, "tokens are what a bucket bounds beside seconds"
            self.groups, sizes = fitted(self.seconds, counted, buckets)
        in_order = np.sort(self.groups)
        size = sizes[in_order]
        place = np.arange(len(in_order)) - np.searchsorted(in_order, in_order)
        [starts] = np.nonzero(place % size == 0)
        self.starts, self.batch_groups = np.append(starts, len(in_order)), in_order[starts]
        neighbours = np.clip(np.bincount(self.batch_groups) // 8, 1, MAX_NEIGHBOURS)[in_order]
        self.neighbourhoods = np.cumsum(place % (neighbours * size) == 0)

    def utterances(self, seed: Sequence[int] | None) -> Integers:
        """(N,) the utterances of one batch after the other, in each the longest first; without a seed, in all."""
        if seed is None:
            return np.lexsort((-self.seconds, self.groups))
        order = np.lexsort((random_keys(seed, len(self.seconds)), self.groups))
        return order[np.lexsort((-self.seconds[order], self.neighbourhoods))]

    def batch_order(self, seed: Sequence[int] | None) -> Integers:
        """(M,) numbers of all batches; without a seed, those with the longest utterances first."""
        if seed is None:
            return np.argsort(-self.seconds[self.utterances(None)[self.starts[:-1]]], kind="stable")
        return np.argsort(random_keys(seed, len(self.batch_groups)), kind="stable")

    def digest(self) -> str:
        """Eight hexadecimal digits that differ where utterances or bounds do."""
        checksum = 0
        for numbers in (self.seconds, self.groups, self.starts):
            checksum = zlib.crc32(numbers.data, checksum)
        return f"{checksum:08x}"


def random_keys(seed: Sequence[int], number: int) -> NDArray[np.uint64]:
    """Raw numbers, which NumPy promises to draw alike in all versions; its `shuffle` and `permutation` may change."""
    return np.random.PCG64(seed).random_raw(number)


def steps_of(groups: Integers, num_ranks: int) -> Integers:
    """(M,) groups of the batches in their order -> (steps, R) the place of the batch that each rank takes, or EMPTY.

    A step is made of the first batch that is left and the next of its group. The last step of a group leaves ranks
    empty where it has fewer batches left. The steps after any one of them depend only on what batches are left.
    """
    by_group = np.argsort(groups, kind="stable")
    in_order = groups[by_group]
    place = np.arange(len(groups)) - np.searchsorted(in_order, in_order)
    rank = place % num_ranks
    steps = np.full((np.count_nonzero(rank == 0), num_ranks), EMPTY)
    steps[np.cumsum(rank == 0) - 1, rank] = by_group
    return steps[np.argsort(steps[:, 0])]


Segment = tuple[int, int]
"""By how many ranks how many steps were made, one after the other."""


class Position(TypedDict):
    """Where training stands in its epochs: the steps made by ranks in turn, of a stream in the block that begins there."""

    seed: int
    epoch: int
    segments: list[Segment]
    plan: NotRequired[str]
    corpus: NotRequired[str]
    block: NotRequired[tuple[int, int]]
    steps_before: NotRequired[int]


def advanced(segments: list[Segment], num_ranks: int, num_steps: int) -> list[Segment]:
    """The segments after so many more steps by so many ranks."""
    if not num_steps:
        return list(segments)
    if segments and segments[-1][0] == num_ranks:
        return [*segments[:-1], (num_ranks, segments[-1][1] + num_steps)]
    return [*segments, (num_ranks, num_steps)]


def other_kind(written: str) -> UserError:
    return UserError(
        f"the checkpoint is from the middle of an epoch of {written}, and this training reads its corpus in another way",
        "data.streaming and data.mix of the run that wrote it, or a checkpoint from the end of an epoch",
    )


class DurationBatches(Sampler[list[int]]):
    """The batches of one rank, as lists of utterance numbers; all ranks make equally many steps, in each of one bucket.

    No batch has more than `batch_seconds` of audio or `batch_tokens` of target, padding included, but for an utterance
    that has more alone. The batches of an epoch and their order are a function of (seed, epoch); ranks only share them
    out, and one that finds none left in the bucket of a step has the empty list, which never happens to a single rank.
    Without `shuffle` the longest come first, so that a memory that does not suffice shows at once.

    tokens: target tokens of each utterance, needed where `batch_tokens` or `buckets` are to bound them
    buckets: what makes a batch instead of the other bounds; what passes the last of them stands alone
    block:  numbers that tell these utterances from others of the same epoch, which are drawn apart
    """

    def __init__(
        self,
        seconds: Sequence[float] | Floats,
        batch_seconds: float,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        tokens: Sequence[int] | Integers | None = None,
        batch_tokens: int | None = None,
        num_buckets: int = 30,
        buckets: Sequence[Bucket] | None = None,
        block: tuple[int, ...] = (),
    ) -> None:
        self.plan = BatchPlan(seconds, batch_seconds, tokens, batch_tokens, num_buckets, buckets)
        self.block = block
        self.shuffle, self.seed, self.rank, self.num_ranks = shuffle, seed, rank, num_ranks
        self.epoch = 0
        self.segments: list[Segment] = []

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of every epoch; the one that was resumed goes on where it stopped."""
        if epoch != self.epoch:
            self.epoch, self.segments = epoch, []

    def state_dict(self, consumed_steps: int) -> Position:
        """The position after so many steps of this epoch, those before a resumption included.

        The trainer has to count them: workers fetch batches ahead of it, and this sampler runs ahead of the workers.
        """
        if consumed_steps >= len(self):
            return Position(seed=self.seed, epoch=self.epoch + 1, segments=[])
        return self.position(consumed_steps)

    def position(self, consumed_steps: int) -> Position:
        segments = advanced(self.segments, self.num_ranks, consumed_steps - self.resumed_steps())
        return Position(seed=self.seed, epoch=self.epoch, segments=segments, plan=self.plan.digest())

    def load_state_dict(self, state: Position) -> None:
        """Continues from a position, with any number of ranks.

        Raises UserError in the middle of an epoch whose batches are not these.
        """
        if state["segments"]:
            written, here = (state["seed"], state["plan"]), (self.seed, self.plan.digest())
            if written != here:
                raise UserError(
                    "the checkpoint is from the middle of an epoch with other batches: its seed and plan are "
                    f"{written[0]} and {written[1]}, here they are {here[0]} and {here[1]}",
                    "the seed and the data.* of the run that wrote it, or a checkpoint from the end of an epoch",
                )
        self.epoch, self.segments = state["epoch"], [(ranks, steps) for ranks, steps in state["segments"]]

    def num_steps(self, num_ranks: int) -> int:
        """Of a whole epoch by so many ranks."""
        return len(steps_of(self.plan.batch_groups, num_ranks))

    def resumed_steps(self) -> int:
        return sum(steps for _, steps in self.segments)

    def stream(self, number: int) -> tuple[int, ...] | None:
        """The seed of one of the random orders of this epoch."""
        return (self.seed, self.epoch, number, *self.block) if self.shuffle else None

    def batches_left(self) -> Integers:
        """Numbers of this epoch's batches in their order, without those of the steps that were made before."""
        left = self.plan.batch_order(self.stream(0))
        for num_ranks, number in self.segments:
            taken = steps_of(self.plan.batch_groups[left], num_ranks)[:number]
            left = np.delete(left, taken[taken != EMPTY])
        return left

    def __iter__(self) -> Iterator[list[int]]:
        left = self.batches_left()
        mine = steps_of(self.plan.batch_groups[left], self.num_ranks)[:, self.rank]
        utterances, starts = self.plan.utterances(self.stream(1)), self.plan.starts
        batches = (slice(starts[left[i]], starts[left[i] + 1]) if i != EMPTY else slice(0) for i in mine)
        return (utterances[batch].tolist() for batch in batches)

    def __len__(self) -> int:
        """The steps of this whole epoch, those before a resumption included, as Lightning counts."""
        return self.resumed_steps() + len(steps_of(self.plan.batch_groups[self.batches_left()], self.num_ranks))


class BatchesWithEpoch(Sampler[tuple[int, list[tuple[int, int]]]]):
    """Batches of references, each with the epoch that it is drawn in: a worker that outlives an epoch is told of no other.

    references: what each number of a batch stands for
    """

    def __init__(self, batches: DurationBatches, references: Sequence[tuple[int, int]]) -> None:
        self.batches, self.references = batches, references

    @property
    def epoch(self) -> int:
        return self.batches.epoch

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        epoch = self.epoch
        return ((epoch, [self.references[number] for number in numbers]) for numbers in self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def num_steps(self, num_ranks: int) -> int:
        return self.batches.num_steps(num_ranks)

    def state_dict(self, consumed_steps: int) -> Position:
        return self.batches.state_dict(consumed_steps)

    def load_state_dict(self, state: Position) -> None:
        """Raises UserError in the middle of an epoch of other batches, or of a stream."""
        if "block" in state and (state["steps_before"] or state["segments"]):
            raise other_kind("a stream, or a weighted mix")
        self.batches.load_state_dict(state)
