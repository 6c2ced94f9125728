"""Batches of similar length: bounded by padded seconds, shuffled by (seed, epoch), cut evenly over ranks."""

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from sedtrain.batch import UserError


def batches_by_seconds(order: Sequence[int], seconds: Sequence[float], batch_seconds: float) -> list[list[int]]:
    """`order` cut into batches of at most `batch_seconds` of audio with padding; a longer utterance stands alone."""
    batches: list[list[int]] = []
    longest = 0.0
    for index in order:
        longest = max(longest, seconds[index])
        if batches and (len(batches[-1]) + 1) * longest <= batch_seconds:
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = seconds[index]
    return batches


def split_evenly(batches: list[list[int]], num_ranks: int) -> list[list[int]]:
    """As many batches as `num_ranks` divides, by halving the largest: no utterance is dropped or repeated.

    Raises UserError where every batch holds one utterance and their number still does not suffice.
    """
    batches = list(batches)
    while len(batches) % num_ranks:
        largest = max(range(len(batches)), key=lambda i: len(batches[i]))
        if len(batches[largest]) < 2:
            raise UserError(
                f"{len(batches)} batches of one utterance cannot be shared evenly by {num_ranks} devices",
                f"trainer.devices=N with an N that divides {len(batches)}, or a larger data.batch_seconds",
            )
        half = len(batches[largest]) // 2
        batches[largest : largest + 1] = [batches[largest][:half], batches[largest][half:]]
    return batches


class DurationBatches(Sampler[list[int]]):
    """The batches of one rank, as lists of utterance numbers: every rank makes the same number of steps.

    With `shuffle`, utterances are sorted by their length times a random factor within ±`jitter`, so that neighbours
    change from epoch to epoch while padding stays small; the order is a function of (seed, epoch) alone. Without, the
    longest come first, so that a memory that does not suffice shows at once.
    """

    def __init__(
        self,
        seconds: Sequence[float],
        batch_seconds: float,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        jitter: float = 0.1,
    ) -> None:
        self.seconds, self.batch_seconds, self.shuffle = seconds, batch_seconds, shuffle
        self.seed, self.rank, self.num_ranks, self.jitter = seed, rank, num_ranks, jitter
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of every epoch."""
        self.epoch = epoch

    def batches(self) -> list[list[int]]:
        """This epoch's batches over all ranks."""
        generator = random.Random(f"{self.seed}-{self.epoch}")
        indices = range(len(self.seconds))
        factors = [generator.uniform(1 - self.jitter, 1 + self.jitter) if self.shuffle else 1.0 for _ in indices]
        order = sorted(indices, key=lambda i: -self.seconds[i] * factors[i])
        batches = split_evenly(batches_by_seconds(order, self.seconds, self.batch_seconds), self.num_ranks)
        if self.shuffle:
            generator.shuffle(batches)
        return batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches()[self.rank :: self.num_ranks])

    def __len__(self) -> int:
        return len(self.batches()) // self.num_ranks
