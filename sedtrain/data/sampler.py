"""Cuts an epoch into batches, by durations and text lengths alone; shuffles them, shares them among ranks, resumes.

N utterances, M batches, G groups of utterances that may share a batch, R ranks. A step takes a batch on every rank.
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
MAX_NEIGHBOURS = 4  # batches that are drawn together and sorted; 98.9 % of the audio is real, 95.6 % with 1
EMPTY = -1  # the batch of a rank for which the last step has none left

Segment = tuple[int, int]
"""(number of ranks, number of steps): a run of steps made by equally many ranks."""


class Position(TypedDict):
    """Position of training in its epochs, as a checkpoint keeps it.

    seed, epoch:  decide the order of the batches
    segments:     the steps of this epoch so far; of a stream, those of its block
    plan, corpus: digests of the batches, and of the files of a stream, that `segments` counts
    block:        where the block of a stream begins: visits of parts before it, rows before it in the next one
    steps_before: steps of this epoch before that block
    """

    seed: int
    epoch: int
    segments: list[Segment]
    plan: NotRequired[str]
    corpus: NotRequired[str]
    block: NotRequired[tuple[int, int]]
    steps_before: NotRequired[int]


class BatchPlan:
    """Groups of utterances that may share a batch, and the batch sizes; equal in every epoch, so its length is too.

    A group is a bucket of durations. Utterances whose long texts would halve the bucket's batches (or quarter them, ...)
    form a separate group. All batches of a group hold as many utterances as its longest ones allow; the last may hold
    fewer. Measured buckets are groups themselves, with known batch sizes.

    groups:         (N,) the group of each utterance
    starts:         (M + 1,) where each batch begins in `utterances`
    batch_groups:   (M,) the group of each batch, ascending
    neighbourhoods: (N,) ascending numbers of the batches, one to four of a group, that are drawn together
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
        """(N,) utterances, batch after batch, each longest first; without a seed, longest first in every group."""
        if seed is None:
            return np.lexsort((-self.seconds, self.groups))
        order = np.lexsort((random_keys(seed, len(self.seconds)), self.groups))
        return order[np.lexsort((-self.seconds[order], self.neighbourhoods))]

    def batch_order(self, seed: Sequence[int] | None) -> Integers:
        """(M,) the order of the batches; without a seed, those with the longest utterances first."""
        if seed is None:
            return np.argsort(-self.seconds[self.utterances(None)[self.starts[:-1]]], kind="stable")
        return np.argsort(random_keys(seed, len(self.batch_groups)), kind="stable")

    def digest(self) -> str:
        """Eight hexadecimal digits that differ where the utterances or the bounds do."""
        checksum = 0
        for numbers in (self.seconds, self.groups, self.starts):
            checksum = zlib.crc32(numbers.data, checksum)
        return f"{checksum:08x}"


def random_keys(seed: Sequence[int], number: int) -> NDArray[np.uint64]:
    """Raw random numbers: NumPy promises the same ones in all its versions, unlike its `shuffle` and `permutation`."""
    return np.random.PCG64(seed).random_raw(number)


def steps_of(groups: NDArray[np.int32], num_ranks: int) -> Integers:
    """(M,) groups of the batches in their order -> (steps, R) the index of the batch that each rank takes, or EMPTY.

    A step takes the first batch that is left and the next ones of its group; where these are too few, those of the groups
    nearest to it in length. Only the last step of all may have fewer batches than ranks. The steps that follow depend
    only on which batches are left.
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
    """The error for a checkpoint from the middle of an epoch that was read in another way."""
    wrong = (
        f"the checkpoint is from the middle of an epoch of {written_by}, and this run reads its corpus in another way"
    )
    write = "write data.streaming and data.mix as in the run that wrote it, or resume from the end of an epoch"
    return UserError("data.streaming", streaming, wrong, write)


def refuse_other(digested: str, written: tuple[int, str], current: tuple[int, str]) -> None:
    """Raises UserError where seed and digest of a checkpoint from the middle of an epoch are not those of this run."""
    if written != current:
        (old_seed, old_digest), (seed, digest) = written, current
        saved = f"the checkpoint was saved in the middle of an epoch of other {digested}"
        wrong = f"{saved}: seed {old_seed}, digest {old_digest}"
        write = "write the seed and the data.* of the run that wrote it, or resume from the end of an epoch"
        raise UserError("data", f"seed {seed}, digest {digest}", wrong, write)


class DurationBatches(Sampler[Any]):
    """The batches of one rank, as lists of utterance numbers; all ranks make equally many steps, in similar lengths.

    A batch keeps the bounds unless it is a single utterance that passes them. The batches of an epoch and their order
    are a function of (seed, epoch); ranks only share them. A rank for which the last step has no batch left gets an empty
    list. Without `shuffle` the longest batches come first, so that too little memory shows at once.

    tokens: target tokens of each utterance, needed where they are bounded
    block:  numbers that distinguish these utterances from those of other blocks of the same epoch
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
        """The position after `consumed_steps` of this epoch, those before it was resumed included.

        The trainer counts them, since workers fetch batches ahead of it, and this sampler runs ahead of the workers.
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

        Raises UserError for a position in the middle of an epoch of other batches, or of a stream where this is none.
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
        """The seed of one of the random orders of this epoch: 0 of the batches, 1 of the utterances."""
        return (self.seed, self.epoch, number, *self.block) if self.shuffle else None

    def batches_left(self) -> Integers:
        """Numbers of this epoch's batches in their order, without those that were taken before it was resumed."""
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
        """The steps of this whole epoch, those before it was resumed included, as Lightning counts."""
        return self.resumed_steps() + ceil(len(self.batches_left()) / self.num_ranks)
