"""Cuts an epoch into batches by durations and text lengths, shuffles them, shares them among ranks, and resumes.

N utterances, M batches, G groups of utterances that may share a batch, R ranks. Every rank takes one batch in a step.
"""

import zlib
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from math import ceil
from typing import Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from sedtrain.data.buckets import Bounds, Floats, Integers
from sedtrain.errors import UserError

SHORTEST_SECONDS = 0.1  # the collator pads shorter audio with silence
MAX_NEIGHBOURS = 4  # batches drawn together and sorted by length; 1.1 % of the audio is padding, 4.4 % with 1
EMPTY = -1  # stands for the batch of a rank that gets none in the last step

Segment = tuple[int, int]
"""(number of ranks, number of steps): consecutive steps made by the same number of ranks."""


class Position(TypedDict):
    """Position of training in its epochs, stored in a checkpoint.

    seed, epoch:  decide the order of the batches
    segments:     steps made so far in this epoch; in a stream, so far in the current block
    plan, corpus: digests of the batches and of a stream's files; a resumed run must have the same
    block:        start of the current block of a stream: number of completed visits of parts, then rows of the next visit
    steps_before: steps of this epoch before the current block
    """

    seed: int
    epoch: int
    segments: list[Segment]
    plan: NotRequired[str]
    corpus: NotRequired[str]
    block: NotRequired[tuple[int, int]]
    steps_before: NotRequired[int]


class BatchPlan:
    """Groups of utterances that may share a batch, and the batch sizes; the same in every epoch, as is its length.

    A group is a bucket of durations. Utterances whose long texts would halve (or quarter, ...) the bucket's batch size
    form a separate group. The longest utterances of a group set its batch size; only its last batch may be smaller.
    Measured buckets are groups with known batch sizes.

    groups:         (N,) the group of each utterance
    starts:         (M + 1,) the start of each batch in `utterances`
    batch_groups:   (M,) the group of each batch, ascending
    neighbourhoods: (N,) the neighbourhood of each utterance, ascending: one to four batches of a group, drawn together
    """

    def __init__(
        self,
        seconds: Sequence[float] | Floats,
        bounds: Bounds,
        tokens: Sequence[int] | Integers | None = None,
    ) -> None:
        self.seconds = np.maximum(np.asarray(seconds, dtype=np.float64), SHORTEST_SECONDS)
        counted = None if tokens is None else np.asarray(tokens, dtype=np.int64)
        groups, sizes = bounds.groups(self.seconds, counted)
        self.groups = groups.astype(np.int32)
        in_order = np.sort(self.groups)
        size = sizes[in_order]
        in_group = np.arange(len(in_order)) - np.searchsorted(in_order, in_order)
        [starts] = np.nonzero(in_group % size == 0)
        self.starts, self.batch_groups = np.append(starts, len(in_order)), in_order[starts]
        neighbours = np.clip(np.bincount(self.batch_groups) // 8, 1, MAX_NEIGHBOURS)[in_order]
        self.neighbourhoods = np.cumsum(in_group % (neighbours * size) == 0, dtype=np.int32)

    def utterances(self, seed: Sequence[int] | None) -> Integers:
        """(N,) utterances, batch after batch, longest first in each batch; without a seed, longest first in each group."""
        if seed is None:
            return np.lexsort((-self.seconds, self.groups))
        order = np.lexsort((random_keys(seed, len(self.seconds)), self.groups))
        return order[np.lexsort((-self.seconds[order], self.neighbourhoods))]

    def batch_order(self, seed: Sequence[int] | None) -> Integers:
        """(M,) the order of the batches; without a seed, batches with longer utterances first."""
        if seed is None:
            return np.argsort(-self.seconds[self.utterances(None)[self.starts[:-1]]], kind="stable")
        return np.argsort(random_keys(seed, len(self.batch_groups)), kind="stable")

    def digest(self) -> str:
        """Eight hexadecimal digits that change with the utterances and the bounds."""
        checksum = 0
        for numbers in (self.seconds, self.groups, self.starts):
            checksum = zlib.crc32(numbers.data, checksum)
        return f"{checksum:08x}"


def random_keys(seed: Sequence[int], number: int) -> NDArray[np.uint64]:
    """Raw random numbers. All NumPy versions give the same ones; `shuffle` and `permutation` may change."""
    return np.random.PCG64(seed).random_raw(number)


def steps_of(groups: NDArray[np.int32], num_ranks: int) -> Integers:
    """(M,) groups of the batches in their order -> (steps, R) the index of the batch that each rank takes, or EMPTY.

    A step takes the first remaining batch and the next ones of its group. If there are too few, it takes batches from
    the groups nearest in length. Only the last step may have fewer batches than ranks. Each step depends only on the
    remaining batches.
    """
    by_group = np.argsort(groups, kind="stable")
    distinct, firsts = np.unique(groups[by_group], return_index=True)
    left = [iter(indices.tolist()) for indices in np.split(by_group, firsts[1:])]
    nearest = {group: np.argsort(np.abs(distinct - group), kind="stable").tolist() for group in distinct.tolist()}
    taken = [False] * len(groups)
    steps = np.full((ceil(len(groups) / num_ranks), num_ranks), EMPTY)
    leaders = ((index, group) for index, group in enumerate(groups.tolist()) if not taken[index])
    for number, (_, group) in enumerate(leaders):
        batches = list(islice(chain.from_iterable(left[near] for near in nearest[group]), num_ranks))
        steps[number, : len(batches)] = batches
        for index in batches:
            taken[index] = True
    return steps


def other_reading(written_by: str, streaming: bool) -> UserError:
    """The error for resuming in the middle of an epoch if the run that saved it read the corpus in another way."""
    wrong = (
        f"the checkpoint is from the middle of an epoch of {written_by}, and this run reads its corpus in another way"
    )
    write = "write data.streaming and data.mix as in the run that wrote it, or resume from the end of an epoch"
    return UserError("data.streaming", streaming, wrong, write)


def refuse_other(digested: str, written: tuple[int, str], current: tuple[int, str]) -> None:
    """Raises UserError if a checkpoint from the middle of an epoch has another seed or digest than this run."""
    if written != current:
        (old_seed, old_digest), (seed, digest) = written, current
        saved = f"the checkpoint was saved in the middle of an epoch of other {digested}"
        wrong = f"{saved}: seed {old_seed}, digest {old_digest}"
        write = "write the seed and the data.* of the run that wrote it, or resume from the end of an epoch"
        raise UserError("data", f"seed {seed}, digest {digest}", wrong, write)


class DurationBatches(Sampler[Any]):
    """Batches of one rank, as lists of utterance numbers. All ranks make the same number of steps, on similar lengths.

    A batch keeps the bounds, unless it is a single utterance beyond them. The batches of an epoch and their order
    depend only on (seed, epoch), not on the number of ranks. In the last step a rank may get an empty list. Without
    `shuffle` the longest batches come first, so that a lack of memory shows at once.

    tokens: target tokens of each utterance, needed if the bounds limit tokens
    block:  start of a block of a stream; makes the order differ between blocks of one epoch
    """

    def __init__(
        self,
        seconds: Sequence[float] | Floats,
        bounds: Bounds,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        tokens: Sequence[int] | Integers | None = None,
        block: tuple[int, ...] = (),
    ) -> None:
        self.plan = BatchPlan(seconds, bounds, tokens)
        self.block = block
        self.shuffle, self.seed, self.rank, self.num_ranks = shuffle, seed, rank, num_ranks
        self.epoch = 0
        self.segments: list[Segment] = []

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of every epoch; a resumed epoch continues where it stopped."""
        if epoch != self.epoch:
            self.epoch, self.segments = epoch, []

    def state_dict(self, consumed_steps: int) -> Position:
        """The position after `consumed_steps` of this epoch, including the steps before it was resumed.

        The trainer counts the steps, because workers fetch batches ahead of it, and this sampler runs ahead of the workers.
        """
        if consumed_steps >= len(self):
            return Position(seed=self.seed, epoch=self.epoch + 1, segments=[])
        return self.position(consumed_steps)

    def position(self, consumed_steps: int) -> Position:
        segments, more = list(self.segments), consumed_steps - self.resumed_steps()
        if more and segments and segments[-1][0] == self.num_ranks:
            more += segments.pop()[1]
        if more:
            segments.append((self.num_ranks, more))
        return Position(seed=self.seed, epoch=self.epoch, segments=segments, plan=self.plan.digest())

    def load_state_dict(self, state: Position) -> None:
        """Continues from a position, with any number of ranks.

        Raises UserError for a position in the middle of an epoch of other batches, or in the middle of a stream.
        """
        if "block" in state and not self.block and (state["steps_before"] or state["segments"]):
            raise other_reading("a stream, or a weighted mix", streaming=False)
        if state["segments"]:
            refuse_other("batches", (state["seed"], state["plan"]), (self.seed, self.plan.digest()))
        self.epoch, self.segments = state["epoch"], [(ranks, steps) for ranks, steps in state["segments"]]

    def num_steps(self, num_ranks: int) -> int:
        """Steps of a whole epoch by `num_ranks` ranks."""
        return ceil(len(self.plan.batch_groups) / num_ranks)

    def resumed_steps(self) -> int:
        return sum(steps for _, steps in self.segments)

    def order_seed(self, number: int) -> tuple[int, ...] | None:
        """The seed of a random order of this epoch: number 0 for the batches, 1 for the utterances."""
        return (self.seed, self.epoch, number, *self.block) if self.shuffle else None

    def batches_left(self) -> Integers:
        """Numbers of this epoch's remaining batches in their order; a resumed epoch has taken some already."""
        left = self.plan.batch_order(self.order_seed(0))
        for num_ranks, number in self.segments:
            taken = steps_of(self.plan.batch_groups[left], num_ranks)[:number]
            left = np.delete(left, taken[taken != EMPTY])
        return left

    def __iter__(self) -> Iterator[Any]:
        left = self.batches_left()
        own = steps_of(self.plan.batch_groups[left], self.num_ranks)[:, self.rank]
        utterances, starts = self.plan.utterances(self.order_seed(1)).astype(np.int32), self.plan.starts
        batches = (slice(starts[left[i]], starts[left[i] + 1]) if i != EMPTY else slice(0) for i in own)
        return (utterances[batch].tolist() for batch in batches)

    def __len__(self) -> int:
        """The steps of this whole epoch, including the steps before it was resumed, as Lightning counts them."""
        return self.resumed_steps() + ceil(len(self.batches_left()) / self.num_ranks)
