"""Streams: every utterance once, the same steps for all ranks, and a position to resume from, wherever training stops."""

import json
from collections import Counter
from fractions import Fraction
from itertools import islice
from math import ceil, floor, log
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from sedtrain.batch import Skipped
from sedtrain.data import streaming
from sedtrain.data.buckets import Bounds, Bucket
from sedtrain.data.corpus import Corpus
from sedtrain.data.dataset import BatchesWithEpoch, SplitDataset, kept_rows
from sedtrain.data.limits import Limits
from sedtrain.data.parts import Parts
from sedtrain.data.streaming import BlockStart, StreamedBatches
from sedtrain.errors import UserError

SECONDS = (1.0, 7.3, 2.5, 0.4, 12.0, 3.3, 5.1)
WORDS = (2, 9, 1, 4, 30)
shard_sizes = st.lists(st.integers(0, 23), min_size=1, max_size=6).filter(any)
weights = st.sampled_from([Fraction(1), Fraction(2), Fraction(1, 2), Fraction(1, 3), Fraction(5, 2)])
rank_numbers = st.integers(1, 8)
block_sizes = st.integers(1, 60)
stops = st.lists(st.integers(0, 12), max_size=4)


class Rows:
    """As many utterances as asked for, some of which are too long."""

    def __init__(self, number, part):
        self.number, self.part = number, part

    def __len__(self):
        return self.number

    def id(self, index):
        return f"{self.part}-{index}"

    def seconds(self, indices):
        return np.array([SECONDS[(self.part + index) % len(SECONDS)] for index in indices])

    def texts(self, indices):
        return ["word " * WORDS[(self.part + index) % len(WORDS)] for index in indices]

    def skipped(self, index, reason, detail):
        return Skipped(self.id(index), reason, detail)

    def misdeclared(self, index):
        return None

    def problem(self, index, seconds):
        return None


class Opened(Parts):
    """Parts that are made up; remembers what was opened."""

    def __init__(self, sizes):
        super().__init__([SimpleNamespace(fetch_ahead=lambda: None, name=str(size)) for size in sizes])
        self.sizes, self.asked, self.removed = sizes, [], []

    def __getitem__(self, number):
        self.asked.append(number)
        return Rows(self.sizes[number], number)

    def remove_copy(self, number):
        self.removed.append(number)


class Noted(list):
    def note_planned(self, split, num_seen, skipped):
        self.extend(skipped)

    def refuse_too_many(self, split):
        assert split == "train"


def sampler(
    sizes,
    *,
    parts_weights=None,
    num_rows=20,
    seed=0,
    rank=0,
    num_ranks=1,
    batch_seconds=15.0,
    batch_tokens=None,
    num_buckets=5,
    max_seconds=30.0,
    buckets=None,
):
    corpus = Corpus([], Limits(0.05, max_seconds), Noted(), 1.0, num_rows, None)
    weights = [float(each) for each in parts_weights or [1] * len(sizes)]
    corpus.weights = lambda: weights
    dataset = SplitDataset(Opened(sizes), None, SimpleNamespace(num_tokens=lambda text: len(text.split())), 0)
    bounds = Bounds(batch_seconds, batch_tokens, num_buckets, buckets)
    return StreamedBatches(dataset, corpus, bounds, seed, rank, num_ranks)


def epoch(sizes, number=0, **options):
    batches = sampler(sizes, **options)
    batches.set_epoch(number)
    return [references for _, references in batches]


def over_ranks(sizes, num_ranks, number=0, **options):
    return [epoch(sizes, number, rank=rank, num_ranks=num_ranks, **options) for rank in range(num_ranks)]


def flat(batches):
    return [reference for batch in batches for reference in batch]


def everything(sizes):
    return sorted((part, index) for part, size in enumerate(sizes) for index in range(size))


@given(shard_sizes, rank_numbers, block_sizes, st.integers(0, 3))
def test_every_utterance_is_seen_once_over_all_ranks_in_equally_many_steps(sizes, num_ranks, num_rows, number):
    ranks = over_ranks(sizes, num_ranks, number, num_rows=num_rows)
    assert sorted(flat(flat(ranks))) == everything(sizes)
    assert len({len(batches) for batches in ranks}) == 1


@given(shard_sizes, rank_numbers, block_sizes)
def test_ranks_only_share_out_the_same_batches(sizes, num_ranks, num_rows):
    shared = flat(over_ranks(sizes, num_ranks, num_rows=num_rows))
    assert sorted(batch for batch in shared if batch) == sorted(epoch(sizes, num_rows=num_rows))


@given(shard_sizes, block_sizes)
def test_only_an_utterance_alone_passes_the_bound(sizes, num_rows):
    for batch in epoch(sizes, num_rows=num_rows, batch_seconds=10.0):
        lengths = [SECONDS[(part + index) % len(SECONDS)] for part, index in batch]
        assert len(batch) == 1 or len(batch) * max(lengths) <= 10.0


@given(shard_sizes, block_sizes)
def test_only_a_target_alone_passes_the_bound_of_tokens(sizes, num_rows):
    batches = epoch(sizes, num_rows=num_rows, batch_tokens=20)
    assert sorted(flat(batches)) == everything(sizes)
    for batch in batches:
        lengths = [WORDS[(part + index) % len(WORDS)] for part, index in batch]
        assert len(batch) == 1 or len(batch) * max(lengths) <= 20


def test_95_percent_of_the_audio_is_real_in_blocks_of_the_usual_size():
    """Log-normal with sigma 0.65, 1 to 20 s; batches of 24 s: 99 %, of 120 s: 96 %; larger ones want larger blocks."""
    seconds = np.random.default_rng(0).lognormal(log(5), 0.65, 20_000).clip(1, 20)
    batches = sampler([1000] * 20, num_rows=4096, batch_seconds=120.0, num_buckets=30)
    batches.corpus.usable = lambda split, part, rows, indices: kept_rows(
        part, indices, seconds[1000 * part + np.array(indices)]
    )
    padded = sum(len(refs) * max(seconds[1000 * part + index] for part, index in refs) for _, refs in batches)
    assert seconds.sum() / padded > 0.95


@given(st.lists(st.tuples(st.integers(3, 15), weights), min_size=1, max_size=4), block_sizes, st.integers(1, 6))
def test_an_utterance_of_weight_w_is_seen_w_times_an_epoch_and_all_as_often_as_the_others(parts, num_rows, num_epochs):
    sizes, parts_weights = zip(*parts, strict=True)
    seen = Counter()
    for number in range(num_epochs):
        seen.update(flat(epoch(sizes, number, parts_weights=parts_weights, num_rows=num_rows)))
    for part, (size, weight) in enumerate(parts):
        times = [seen[part, index] for index in range(size)]
        assert set(times) <= {floor(num_epochs * weight), ceil(num_epochs * weight)}
        assert abs(sum(times) - num_epochs * weight * size) <= 1


@given(shard_sizes, st.lists(rank_numbers, min_size=1, max_size=3), block_sizes, stops)
def test_measured_buckets_hold_in_a_stream_that_stops_and_resumes_with_other_ranks(sizes, ranks, num_rows, stops):
    buckets = [Bucket(2.0, 5, 4), Bucket(10.0, 12, 2)]
    seen = flat(stopped(sizes, ranks, stops, num_rows=num_rows, buckets=buckets))
    assert sorted(flat(seen)) == everything(sizes)
    for batch in filter(None, seen):
        lengths = [((part + index) % len(SECONDS), (part + index) % len(WORDS)) for part, index in batch]
        longest, most = max(SECONDS[i] for i, _ in lengths), max(WORDS[i] for _, i in lengths)
        assert len(batch) <= next((b.utterances for b in buckets if longest <= b.seconds and most <= b.tokens), 1)


def stepwise(sizes, num_ranks, number, position=None, **options):
    """Sampler of rank 0 and what all ranks take in each step that is left."""
    ranks = [sampler(sizes, rank=rank, num_ranks=num_ranks, **options) for rank in range(num_ranks)]
    for rank in ranks:
        rank.set_epoch(number)
        if position:
            rank.load_state_dict(json.loads(json.dumps(position)))
    return ranks[0], list(zip(*ranks, strict=True))


def stopped(sizes, ranks, stops, **options):
    """What is seen by a run that stops again and again, each time after so many steps; its numbers of ranks take turns."""
    seen, position, done = [], None, 0
    for turn, stop in enumerate([*stops, None]):
        first, steps = stepwise(sizes, ranks[turn % len(ranks)], 1, position, **options)
        seen += steps[:stop]
        if stop is not None:
            done += len(steps[:stop])
            position = first.state_dict(done)
    return [[references for _, references in step] for step in seen]


@given(shard_sizes, rank_numbers, block_sizes, stops)
def test_a_run_that_stops_again_and_again_takes_the_same_steps(sizes, num_ranks, num_rows, stops):
    whole = stopped(sizes, [num_ranks], [], num_rows=num_rows)
    assert stopped(sizes, [num_ranks], stops, num_rows=num_rows) == whole


@given(shard_sizes, st.lists(rank_numbers, min_size=1, max_size=3), block_sizes, stops)
def test_resuming_with_other_ranks_loses_and_repeats_nothing(sizes, ranks, num_rows, stops):
    seen = flat(stopped(sizes, ranks, stops, num_rows=num_rows))
    assert sorted(flat(seen)) == everything(sizes)
    assert sorted(batch for batch in seen if batch) == sorted(epoch(sizes, 1, num_rows=num_rows))


@given(shard_sizes, st.integers(1, 30))
def test_resuming_reads_one_block(sizes, num_rows):
    whole = sampler(sizes, num_rows=num_rows)
    num_steps = len(list(whole))
    position = whole.state_dict(num_steps)
    last = sampler(sizes, num_rows=num_rows)
    last.load_state_dict(position)
    opened = last.dataset.parts.asked
    assert not list(last)
    start = BlockStart(*position["block"])
    assert set(opened) <= {part for part, _ in last.order(0)[start.visit :]}
    assert sum(sizes[part] for part in set(opened[1:-1])) <= num_rows


def test_a_position_is_small():
    batches, num_steps = sampler([1000] * 20, num_rows=500), 3000
    assert sum(1 for _ in islice(batches, num_steps)) == num_steps
    assert len(json.dumps(batches.state_dict(num_steps))) < 150


def test_epochs_and_seeds_differ_and_repeat():
    sizes = [10, 20, 7]
    assert epoch(sizes, 0) == epoch(sizes, 0)
    assert len({str(epoch(sizes, number, seed=seed)) for number in range(3) for seed in range(3)}) == 9


def test_utterances_of_different_shards_meet_in_a_batch():
    batches = epoch([10] * 20, num_rows=100)
    assert sum(len({part for part, _ in batch}) > 1 for batch in batches) > len(batches) / 2


def test_the_copies_of_shards_are_removed_when_nobody_can_be_at_them(monkeypatch):
    monkeypatch.setattr(streaming, "STEPS_BEHIND", 3)
    batches = sampler([10] * 10, num_rows=10)
    parts = batches.dataset.parts
    open_at_once = [len(set(parts.asked)) - len(parts.removed) for _ in batches]
    assert max(open_at_once) <= 3
    assert len(set(parts.removed)) >= 8


def test_what_is_left_out_is_noted_once_and_the_rest_is_seen():
    batches = sampler([14], max_seconds=10.0)
    assert len(flat([references for _, references in batches])) == 12
    assert [each.reason for each in batches.corpus.skipped] == ["too long"] * 2


def test_an_epoch_without_an_utterance_is_an_error():
    with pytest.raises(UserError, match="epoch 0 of the training corpus has no utterance that can be used"):
        list(sampler([14], max_seconds=0.1).draw())


def test_the_error_that_ends_a_stream_is_its_last_item():
    [error] = sampler([14], max_seconds=0.1)
    assert isinstance(error, UserError)


def test_a_position_of_other_data_is_refused():
    batches = sampler([30, 30])
    list(batches)
    position = batches.state_dict(1)
    other = sampler([30, 30], batch_seconds=99.0)
    other.load_state_dict(position)
    with pytest.raises(UserError, match="the checkpoint was saved in the middle of an epoch of other batches"):
        list(other.draw())


@pytest.mark.parametrize("other", [{"seed": 1}, {"num_rows": 7}, {"parts_weights": [2, 1]}])
def test_a_position_between_two_blocks_is_not_taken_for_one_of_another_order(other):
    batches = sampler([10, 20], num_rows=10)
    list(batches)
    first_of_second = batches.begun[0].steps_before or len(batches.begun[0].batches)
    position = batches.state_dict(first_of_second)
    assert position["segments"] == [] or position["steps_before"] == 0
    with pytest.raises(UserError, match="the checkpoint was saved in the middle of an epoch of other files"):
        sampler([10, 20], **{"num_rows": 10, **other}).load_state_dict(position)


def test_a_position_in_a_corpus_that_is_not_streamed_is_refused_and_the_other_way_round():
    kept = kept_rows(0, range(30), [1.0] * 30)
    whole = BatchesWithEpoch(SimpleNamespace(longest=1.0), kept, Bounds(5.0), shuffle=True)
    batches = sampler([30])
    list(batches)
    with pytest.raises(
        UserError, match="of a corpus that is not streamed, and this run reads its corpus in another way"
    ):
        sampler([30]).load_state_dict(whole.state_dict(1))
    with pytest.raises(UserError, match="reads its corpus in another way"):
        whole.load_state_dict(batches.state_dict(1))


class Drawn(Dataset):
    """Gives back what is asked for, from the workers."""

    def __getitem__(self, drawn):
        return SimpleNamespace(drawn=drawn)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_workers_and_ranks_share_an_epoch_exactly(num_ranks, num_workers):
    sizes, epoch, seen = [11, 7, 5], num_workers % 2, []
    for rank in range(num_ranks):
        batches = sampler(sizes, rank=rank, num_ranks=num_ranks)
        batches.set_epoch(epoch)
        loader = DataLoader(Drawn(), batch_size=None, sampler=batches, num_workers=num_workers)
        seen.append([each.drawn[1] for each in loader if each.drawn[0] == epoch])
    assert sorted(flat(flat(seen))) == everything(sizes)
    assert len({len(batches) for batches in seen}) == 1
