"""Which utterances may share a batch, and how many: by bounds of padded audio and text, or as memory was measured to hold.

N utterances, G groups of utterances that may share a batch.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml  # type: ignore[import-untyped]
from numpy.typing import NDArray

from sedtrain.errors import UserError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

NUM_CANDIDATES = 256  # durations tried as edges of buckets, once spread over the utterances and once over the seconds
BUCKET_PRICE = 0.2  # of a full batch: small corpora get fewer buckets, or the same utterances would always meet


class Bucket(NamedTuple):
    """Utterances of at most so many seconds, and so many target tokens, of which a batch holds so many."""

    seconds: float
    tokens: int
    utterances: int


WRITE = (
    "data.batches=FILE of task=fit_batches, or a list of {seconds: NUMBER, tokens: NUMBER, utterances: NUMBER} with "
    "rising seconds and tokens"
)


def buckets_of(batches: str | Sequence[Mapping[str, Any]]) -> list[Bucket]:
    """The buckets that `data.batches` means: those of a YAML file, or as they are. Raises UserError for what is none."""
    listed = read(batches) if isinstance(batches, str) else batches
    if not isinstance(listed, list | tuple) or not listed:
        raise UserError("data.batches: this is no list of buckets", WRITE)
    buckets = [bucket_of(each, number) for number, each in enumerate(listed)]
    for number, (before, bucket) in enumerate(pairwise(buckets), start=1):
        if bucket.seconds <= before.seconds or bucket.tokens < before.tokens:
            raise UserError(f"data.batches[{number}]: {named(bucket)} follows {named(before)}", WRITE)
    return buckets


def read(path: str) -> Any:
    try:
        return yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeError) as error:
        raise UserError(f"data.batches={path} cannot be read: {error}", WRITE) from error
    except yaml.YAMLError as error:
        raise UserError(f"data.batches={path} is no YAML: {' '.join(str(error).split())}", WRITE) from error


def bucket_of(values: object, number: int) -> Bucket:
    is_named = isinstance(values, Mapping) and set(values) == set(Bucket._fields)
    if not is_named or not all(is_above_0(name, each) for name, each in dict(values).items()):  # type: ignore[call-overload]
        raise UserError(f"data.batches[{number}]={values}: this is no bucket", WRITE)
    return Bucket(**values)  # type: ignore[arg-type]


def is_above_0(name: str, value: object) -> bool:
    kinds = int | float if name == "seconds" else int
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < float("inf")


def named(bucket: Bucket) -> str:
    return f"{bucket.seconds:g} s and {bucket.tokens} tokens"


def bucket_edges(seconds: Floats, batch_seconds: float, num_buckets: int) -> Floats:
    """The longest duration of each of at most `num_buckets` buckets, ascending, so that padding is least.

    Counts the padded seconds of all batches as if each were full and as long as its bucket, and a small price of each
    bucket, since its last batch is seldom full. The best choice among the candidates, by dynamic programming.
    """
    if not len(seconds):
        return seconds
    ordered = np.sort(seconds)
    by_rank = ordered[np.linspace(0, len(ordered) - 1, NUM_CANDIDATES).astype(np.int64)]
    by_length = ordered[np.searchsorted(ordered, np.linspace(ordered[0], ordered[-1], NUM_CANDIDATES))]
    edges = np.unique(np.concatenate([by_rank, by_length]))
    up_to = np.concatenate([[0], np.searchsorted(ordered, edges, side="right")])
    inside = up_to[None, 1:] - up_to[:, None]  # [i, j]: utterances in a bucket from above edge i - 1 to edge j
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


def bounded(
    seconds: Floats, batch_seconds: float, tokens: Integers | None, batch_tokens: int | None, num_buckets: int
) -> tuple[Integers, Integers]:
    """(N,) the group of each utterance, (G,) how many of each make a batch of so many seconds and tokens at most."""
    edges = bucket_edges(seconds, batch_seconds, num_buckets)
    bucket = np.searchsorted(edges, seconds)
    most = max(len(seconds), 1)
    room = np.clip(batch_seconds // seconds, 1, most)
    halvings = np.zeros(len(room), dtype=np.int64)
    if batch_tokens is not None:
        assert tokens is not None, "tokens are what batch_tokens bounds"
        room = np.clip(batch_tokens // np.maximum(tokens, 1), 1, room)
        full = np.clip(batch_seconds // edges, 1, most)[bucket]
        halvings = np.ceil(np.log2(np.maximum(full / room, 1))).astype(np.int64)
    names, groups = np.unique(bucket * 64 + halvings, return_inverse=True)
    sizes = np.full(len(names), len(seconds))
    np.minimum.at(sizes, groups, room.astype(np.int64))
    return groups, sizes


def fitted(seconds: Floats, tokens: Integers, buckets: Sequence[Bucket]) -> tuple[Integers, Integers]:
    """(N,) the group of each utterance, (G,) how many of each make a batch.

    A group is the first bucket that holds both its seconds and its tokens: a long text moves to a later one. What is
    beyond the last stands alone.
    """
    edges, most_tokens, sizes = zip(*buckets, strict=True)
    first = np.maximum(np.searchsorted(edges, seconds), np.searchsorted(most_tokens, tokens))
    names, groups = np.unique(first, return_inverse=True)
    return groups, np.array([*sizes, 1])[names]
