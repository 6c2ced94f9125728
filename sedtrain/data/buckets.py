"""Groups utterances that may share a batch, and sizes the batches by bounds of padded audio and text or by buckets.

N utterances, G groups of utterances that may share a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
from numpy.typing import NDArray

from sedtrain.annotations import is_of
from sedtrain.errors import UserError
from sedtrain.plain import plain_value
from sedtrain.ranges import Count, Positive

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

NUM_CANDIDATES = 256  # bucket edges tried at equal steps of rank, and again at equal steps of duration
BUCKET_PRICE = 0.2  # of a full batch; it gives small corpora fewer buckets, so that batches mix differently each epoch
WRITE = (
    "write data.batches=FILE of task=fit_batches, or a list of {seconds: NUMBER, tokens: NUMBER, utterances: NUMBER} with "
    "rising seconds and tokens"
)


class Bucket(NamedTuple):
    """Limits of a bucket: most seconds and target tokens of an utterance, and the number of utterances in a batch."""

    seconds: Positive
    tokens: Count
    utterances: Count


def buckets_of(batches: str | Sequence[Mapping[str, Any]]) -> list[Bucket]:
    """The buckets of `data.batches`, which is a list or a YAML file. Raises UserError for anything else."""
    listed = batches
    if isinstance(batches, str):
        listed = plain_value(Path(batches).expanduser(), "data.batches", batches, WRITE)
    if not isinstance(listed, list | tuple) or not listed:
        raise UserError("data.batches", batches, "this is no list of buckets", WRITE)
    kinds = get_type_hints(Bucket, include_extras=True)
    for number, values in enumerate(listed):
        has_all = isinstance(values, Mapping) and set(values) == set(kinds)
        if not has_all or not all(is_of(kinds[name], value) for name, value in values.items()):
            raise UserError(f"data.batches[{number}]", values, "this is no bucket", WRITE)
    buckets = [Bucket(**values) for values in listed]
    for number, (before, bucket) in enumerate(pairwise(buckets), start=1):
        if bucket.seconds <= before.seconds or bucket.tokens < before.tokens:
            wrong = f"the bucket before it holds {before.seconds:g} s and {before.tokens} tokens"
            raise UserError(f"data.batches[{number}]", listed[number], wrong, WRITE)
    return buckets


def bucket_edges(seconds: Floats, batch_seconds: float, num_buckets: int) -> Floats:
    """The longest duration of each bucket, ascending: at most `num_buckets` buckets with the least padding.

    The cost is the padded seconds of all batches, as if each batch were full and as long as its bucket allows. Each
    bucket adds a small price, since its last batch is seldom full. Dynamic programming finds the cheapest candidates.
    """
    if not len(seconds):
        return seconds
    ordered = np.sort(seconds)
    by_rank = ordered[np.linspace(0, len(ordered) - 1, NUM_CANDIDATES).astype(np.int64)]
    by_length = ordered[np.searchsorted(ordered, np.linspace(ordered[0], ordered[-1], NUM_CANDIDATES))]
    edges = np.unique(np.concatenate([by_rank, by_length]))
    up_to = np.concatenate([[0], np.searchsorted(ordered, edges, side="right")])
    inside = up_to[None, 1:] - up_to[:, None]  # [i, j]: utterances longer than edge i - 1 and up to edge j
    size = np.maximum(batch_seconds // edges, 1)
    num_batches = np.ceil(inside / size) + BUCKET_PRICE * (inside > 0)
    padded = np.where(inside >= 0, num_batches * size * edges, np.inf)
    least, choices = padded[0], []
    for _ in range(num_buckets - 1):
        total = least[:, None] + padded[1:]
        choices.append(total.argmin(axis=0))
        least = total.min(axis=0)
    chosen = [len(edges) - 1]
    for choice in reversed(choices):
        chosen.append(choice[chosen[-1]])
    return edges[np.unique(chosen)]


def groups_by_buckets(seconds: Floats, tokens: Integers, buckets: Sequence[Bucket]) -> tuple[Integers, Integers]:
    """(N,) the group of each utterance, and (G,) the batch size of each group.

    An utterance goes to the first bucket that allows both its seconds and its tokens. So a long text moves it to a
    later bucket. An utterance beyond the last bucket makes a batch alone.
    """
    edges, most_tokens, sizes = zip(*buckets, strict=True)
    first = np.maximum(np.searchsorted(edges, seconds), np.searchsorted(most_tokens, tokens))
    distinct, groups = np.unique(first, return_inverse=True)
    return groups, np.array([*sizes, 1])[distinct]


@dataclass(frozen=True)
class Bounds:
    """Limits of a batch.

    batch_seconds, batch_tokens: most seconds of audio and, if given, most target tokens, padding included
    num_buckets: most buckets of similar durations; a batch never mixes buckets
    buckets:     measured buckets; if given, they replace the three bounds above
    shortest_seconds: silence pads shorter utterances to this length, and they count as that long
    """

    batch_seconds: float = 24.0
    batch_tokens: int | None = None
    num_buckets: int = 30
    buckets: Sequence[Bucket] | None = None
    shortest_seconds: float = 0.0

    @classmethod
    def of(
        cls,
        batch_seconds: float = 24.0,
        batch_tokens: int | None = None,
        num_buckets: int = 30,
        batches: str | Sequence[Mapping[str, Any]] | None = None,
    ) -> "Bounds":
        """Builds the bounds from options of `data`. Raises UserError if `batches` is no list of buckets."""
        return cls(batch_seconds, batch_tokens, num_buckets, None if batches is None else buckets_of(batches))

    def groups(self, seconds: Floats, tokens: Integers | None) -> tuple[Integers, Integers]:
        """(N,) the group of each utterance, and (G,) the batch size of each group."""
        if self.buckets is not None:
            assert tokens is not None, "buckets bound tokens too"
            return groups_by_buckets(seconds, tokens, self.buckets)
        seconds = np.maximum(seconds, self.shortest_seconds)
        edges = bucket_edges(seconds, self.batch_seconds, self.num_buckets)
        bucket = np.searchsorted(edges, seconds)
        most = max(len(seconds), 1)
        room = np.clip(self.batch_seconds // seconds, 1, most)
        halvings = np.zeros(len(room), dtype=np.int64)
        if self.batch_tokens is not None:
            assert tokens is not None, "tokens are what batch_tokens bounds"
            room = np.clip(self.batch_tokens // np.maximum(tokens, 1), 1, room)
            full = np.clip(self.batch_seconds // edges, 1, most)[bucket]
            halvings = np.ceil(np.log2(np.maximum(full / room, 1))).astype(np.int64)
        distinct, groups = np.unique(bucket * 64 + halvings, return_inverse=True)
        sizes = np.full(len(distinct), len(seconds))
        np.minimum.at(sizes, groups, room.astype(np.int64))
        return groups, sizes
