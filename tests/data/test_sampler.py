import itertools
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from sedtrain.data import sampler as batching
from sedtrain.data.buckets import Bounds, Bucket, bucket_edges
from sedtrain.data.sampler import BatchPlan, DurationBatches, steps_of
from sedtrain.errors import UserError

BATCH_SECONDS = 24.0
BATCH_TOKENS = 60

utterances = st.lists(st.tuples(st.floats(0.05, 40), st.integers(0, 90)), max_size=80)
rank_numbers = st.integers(1, 8)
measured = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 90), st.integers(1, 20)), min_size=1, max_size=6).map(
    lambda rows: [Bucket(*row) for row in rising(rows)]
)
cuts = st.one_of(st.just({}), st.builds(dict, buckets=measured))
"""The bounds of batches, or measured buckets."""


def rising(rows):
    """(seconds, tokens, utterances) whose seconds rise, and tokens do not fall."""
    seconds, tokens = sorted({row[0] for row in rows}), sorted(row[1] for row in rows)
    return zip(seconds, tokens, [row[2] for row in rows], strict=False)


def digits(number, seed=0):
    """Lengths in seconds that are spread like those of read speech."""
    generator = random.Random(seed)
    return [min(max(generator.lognormvariate(1.2, 0.6), 0.3), 20.0) for _ in range(number)]


def log_normal(number, median):
    """Lengths of 1 to 20 s, log-normal with sigma 0.65."""
    return np.random.default_rng(0).lognormal(math.log(median), 0.65, number).clip(1, 20)


def sampler(corpus, **options):
    """Over (seconds, tokens) of each utterance."""
    bounds = {"batch_seconds": BATCH_SECONDS, "batch_tokens": BATCH_TOKENS, "num_buckets": 5, "buckets": None}
    bounds = Bounds(**{name: options.pop(name, value) for name, value in bounds.items()})
    seconds, tokens = [each[0] for each in corpus], [each[1] for each in corpus]
    return DurationBatches(seconds, bounds, tokens=tokens, **{"shuffle": True, **options})


def epoch(corpus, number=0, **options):
    batches = sampler(corpus, **options)
    batches.set_epoch(number)
    return list(batches)


def steps(corpus, num_ranks, position=None, **options):
    """What all ranks take, step by step, from a position on."""
    ranks = [sampler(corpus, rank=rank, num_ranks=num_ranks, **options) for rank in range(num_ranks)]
    for rank in ranks:
        rank.load_state_dict(position or {"seed": 0, "epoch": 0, "segments": []})
    return list(zip(*ranks, strict=True))


def flat(batches):
    return [i for batch in batches for i in batch]


def batches_of(steps):
    return [batch for step in steps for batch in step if batch]


def padded(batch, lengths):
    return len(batch) * max(lengths[i] for i in batch)


def real_share(batches, seconds):
    return sum(seconds) / sum(padded(batch, seconds) for batch in batches)


@given(utterances, rank_numbers, st.booleans(), st.integers(0, 3), cuts)
def test_every_utterance_is_seen_once_over_all_ranks_in_equally_many_steps(corpus, num_ranks, shuffle, number, cut):
    options = {"shuffle": shuffle, "num_ranks": num_ranks, **cut}
    ranks = [epoch(corpus, number, rank=rank, **options) for rank in range(num_ranks)]
    assert sorted(flat(flat(ranks))) == list(range(len(corpus)))
    assert {len(batches) for batches in ranks} == {len(sampler(corpus, **options))}


@given(utterances, rank_numbers, st.booleans(), st.floats(0.5, 100), st.integers(1, 200))
def test_only_an_utterance_alone_passes_a_bound(corpus, num_ranks, shuffle, batch_seconds, batch_tokens):
    bounds = {"batch_seconds": batch_seconds, "batch_tokens": batch_tokens, "shuffle": shuffle}
    for batch in batches_of(steps(corpus, num_ranks, **bounds)):
        assert len(batch) == 1 or padded(batch, [each[0] for each in corpus]) <= batch_seconds
        assert len(batch) == 1 or padded(batch, [each[1] for each in corpus]) <= batch_tokens


@given(utterances, rank_numbers, measured)
def test_a_batch_is_within_a_measured_bucket_and_as_large_as_it_says(corpus, num_ranks, buckets):
    """But for the last batch of a bucket; what no bucket holds stands alone."""
    sizes = {}
    for batch in batches_of(steps(corpus, num_ranks, buckets=buckets)):
        bucket = buckets_that_hold([corpus[i] for i in batch], buckets)
        sizes.setdefault(bucket, []).append(len(batch))
        assert all(buckets_that_hold([corpus[i]], buckets) == bucket for i in batch)
    for bucket, lengths in sizes.items():
        full = 1 if bucket is None else bucket.utterances
        assert sum(length != full for length in lengths) <= 1 and max(lengths) <= full


def buckets_that_hold(several, buckets):
    """The first, or None."""
    holding = [each for each in buckets if all(s <= each.seconds and n <= each.tokens for s, n in several)]
    return holding[0] if holding else None


def test_a_long_text_moves_to_the_bucket_that_was_measured_with_as_many_tokens():
    buckets = [Bucket(2.0, 10, 3), Bucket(8.0, 40, 2)]
    corpus = [(2.0, 10), (1.0, 11), (2.0, 3), (0.5, 0), (8.0, 40), (8.1, 5), (1.0, 41)]
    found = sorted(sorted(batch) for batch in epoch(corpus, buckets=buckets))
    assert found == [[0, 2, 3], [1, 4], [5], [6]]


def test_the_bounds_count_padding():
    assert epoch([(12.0, 1), (12.0, 1), (12.0, 1)], num_buckets=1, shuffle=False) == [[0, 1], [2]]
    assert epoch([(12.0, 1), (1.0, 1), (1.0, 1)], num_buckets=1, shuffle=False) == [[0, 1], [2]]
    assert epoch([(1.0, 30), (1.0, 30), (1.0, 30)], num_buckets=1, shuffle=False) == [[0, 1], [2]]
    assert epoch([(1.0, 30)] * 3, num_buckets=1, shuffle=False, batch_tokens=None) == [[0, 1, 2]]


def test_an_utterance_over_a_bound_stands_alone():
    assert epoch([(1.0, 1), (30.0, 1), (1.0, 1), (1.0, 61)], shuffle=False) == [[1], [0, 2], [3]]


def test_one_long_text_does_not_make_the_batches_of_its_bucket_small():
    corpus = [(2.0, 5)] * 120 + [(2.0, 60)]
    assert sorted(map(len, epoch(corpus))) == [1] + [12] * 10


def test_audio_that_the_collator_lengthens_counts_as_long_as_it_becomes():
    assert {len(batch) for batch in epoch([(0.0, 1)] * 90, batch_seconds=3.05)} == {30}


def least_padding(seconds, batch_seconds, num_buckets):
    """Over all ways to choose edges: the padded seconds if each batch were full and as long as its bucket, and
    a fifth of a batch more for each bucket."""
    unique = sorted(set(seconds))
    return min(
        padded_buckets(seconds, batch_seconds, [*edges, unique[-1]])
        for number in range(num_buckets)
        for edges in itertools.combinations(unique[:-1], number)
    )


def padded_buckets(seconds, batch_seconds, edges):
    total, below = 0.0, 0.0
    for edge in edges:
        size = max(batch_seconds // edge, 1)
        total += (math.ceil(sum(below < each <= edge for each in seconds) / size) + 0.2) * size * edge
        below = edge
    return total


@given(st.lists(st.integers(1, 12).map(float), min_size=1, max_size=40), st.integers(1, 4))
def test_edges_are_those_of_all_that_pad_least(seconds, num_buckets):
    edges = bucket_edges(np.array(seconds), BATCH_SECONDS, num_buckets).tolist()
    assert len(edges) <= num_buckets and edges == sorted(edges) and edges[-1] == max(seconds)
    expected = least_padding(seconds, BATCH_SECONDS, num_buckets)
    assert padded_buckets(seconds, BATCH_SECONDS, edges) == pytest.approx(expected)


@pytest.mark.parametrize("median", [2.0, 4.0, 8.0, 12.0])
def test_thirty_buckets_leave_under_a_twentieth_of_padding(median):
    seconds = log_normal(20_000, median)
    batches = list(DurationBatches(seconds, Bounds(240.0), shuffle=True))
    assert real_share(batches, seconds) > 0.95
    one_bucket = list(DurationBatches(seconds, Bounds(240.0, num_buckets=1), shuffle=True))
    assert real_share(one_bucket, seconds) < 0.95


def test_batches_of_a_large_corpus_are_sorted_among_their_neighbours(monkeypatch):
    seconds = log_normal(200_000, 4.0)
    assert real_share(list(DurationBatches(seconds, Bounds(240.0), shuffle=True)), seconds) > 0.98
    monkeypatch.setattr(batching, "MAX_NEIGHBOURS", 1)
    assert 0.95 < real_share(list(DurationBatches(seconds, Bounds(240.0), shuffle=True)), seconds) < 0.97


def test_batches_are_nearly_as_full_as_their_bound():
    seconds = log_normal(20_000, 4.0)
    assert len(DurationBatches(seconds, Bounds(240.0), shuffle=True)) < 1.1 * seconds.sum() / 240


def test_a_small_corpus_is_not_torn_into_thirty_batches():
    assert len(DurationBatches(digits(60), Bounds(240.0), shuffle=True)) <= 3
    assert len(DurationBatches(digits(13), Bounds(12.0), shuffle=True)) <= 5


@given(utterances, rank_numbers, cuts)
def test_ranks_take_batches_of_one_bucket_while_it_has_any(corpus, num_ranks, cut):
    plan = sampler(corpus, **cut).plan
    left = Counter(plan.batch_groups.tolist())
    for step in steps(corpus, num_ranks, **cut):
        groups = [plan.groups[batch[0]] for batch in step if batch]
        assert groups.count(groups[0]) == min(left[groups[0]], num_ranks)
        left -= Counter(groups)


@given(st.lists(st.floats(0.1, 40), max_size=80), st.integers(1, 5))
def test_buckets_are_ranges_of_durations(seconds, num_buckets):
    plan = BatchPlan(seconds, Bounds(BATCH_SECONDS, num_buckets=num_buckets))
    in_order = [group for _, group in sorted(zip(seconds, plan.groups.tolist(), strict=True))]
    assert in_order == sorted(in_order) and len(set(in_order)) <= num_buckets


@given(utterances, rank_numbers, st.integers(0, 3), cuts)
def test_the_batches_do_not_depend_on_the_number_of_ranks(corpus, num_ranks, number, cut):
    position = {"seed": 0, "epoch": number, "segments": []}
    assert sorted(batches_of(steps(corpus, num_ranks, position, **cut))) == sorted(epoch(corpus, number, **cut))


@given(utterances, st.booleans())
def test_a_single_rank_has_no_empty_batch(corpus, shuffle):
    assert all(epoch(corpus, shuffle=shuffle))


@given(utterances, rank_numbers, cuts)
def test_only_the_last_step_leaves_ranks_without_utterances(corpus, num_ranks, cut):
    assert all(all(step) for step in steps(corpus, num_ranks, **cut)[:-1])


def test_a_step_is_the_first_batch_left_and_the_next_of_its_bucket_then_of_the_nearest():
    assert steps_of(np.array([7, 3, 7, 7, 3, 7]), 2).tolist() == [[0, 2], [1, 4], [3, 5]]
    assert steps_of(np.array([7, 3, 7, 7, 3]), 2).tolist() == [[0, 2], [1, 4], [3, -1]]
    assert steps_of(np.array([1, 9, 5, 2, 9]), 3).tolist() == [[0, 3, 2], [1, 4, -1]]
    assert steps_of(np.array([7, 3, 7]), 1).tolist() == [[0], [1], [2]]


@given(utterances, st.integers(0, 2**32), st.integers(0, 1000))
def test_the_order_is_a_function_of_seed_and_epoch(corpus, seed, number):
    resumed = sampler(corpus, seed=seed)
    for earlier in (3, number):
        resumed.set_epoch(earlier)
    np.random.seed(number)  # the state of anyone else's generator has no say
    assert list(resumed) == epoch(corpus, number, seed=seed)
    assert list(resumed) == list(resumed)


def test_the_order_is_that_of_earlier_versions():
    """A run resumed after an upgrade has to find its place: change this only with a reason in the change log."""
    expected = [[2, 6], [1, 8, 0], [12, 3, 9], [10, 7, 5, 11], [4]]
    assert list(DurationBatches(digits(13), Bounds(12.0), shuffle=True)) == expected


def test_epochs_and_seeds_have_other_orders_and_other_batches():
    seconds = digits(400)
    samplers = [DurationBatches(seconds, Bounds(BATCH_SECONDS), shuffle=True, seed=seed) for seed in (0, 1, 11)]
    orders = []
    for each, number in itertools.product(samplers, (0, 1, 10, 110)):
        each.set_epoch(number)
        orders.append(list(each))
    assert len({str(order) for order in orders}) == len(orders)
    assert len({len(order) for order in orders}) == 1
    together = [{frozenset(batch) for batch in order if len(batch) > 1} for order in orders[:2]]
    assert len(together[0] & together[1]) < len(together[0]) / 8


def test_a_small_corpus_has_other_batches_in_every_epoch_too():
    batches = DurationBatches(digits(300), Bounds(240.0), shuffle=True)
    together = set()
    for number in range(10):
        batches.set_epoch(number)
        together |= {frozenset(batch) for batch in batches}
    assert len(together) > 8 * len(batches)


def test_without_shuffling_every_epoch_begins_with_the_longest():
    corpus = [(seconds, 1) for seconds in digits(200)]
    first = epoch(corpus, 0, shuffle=False, seed=0)
    assert first == epoch(corpus, 5, shuffle=False, seed=7)
    in_order = [corpus[i] for i in flat(first)]
    assert in_order == sorted(corpus, reverse=True)


@given(utterances, rank_numbers)
def test_without_shuffling_steps_go_from_long_to_short(corpus, num_ranks):
    longest = [max(corpus[i][0] for i in step[0]) for step in steps(corpus, num_ranks, shuffle=False)]
    assert longest == pytest.approx(sorted(longest, reverse=True), abs=0.1)


def test_shuffled_batches_do_not_run_from_long_to_short():
    seconds = digits(2000)
    longest = [
        max(seconds[i] for i in batch) for batch in DurationBatches(seconds, Bounds(BATCH_SECONDS), shuffle=True)
    ]
    half = len(longest) // 2
    assert sum(longest[:half]) / half == pytest.approx(sum(longest[half:]) / (len(longest) - half), rel=0.25)


def abs_and_value(number):
    return abs(number), number


stops = st.lists(st.integers(0, 30), max_size=6)


@given(utterances, rank_numbers, stops, st.integers(0, 3), cuts)
def test_an_epoch_stopped_anywhere_and_often_resumes_as_if_never_stopped(corpus, num_ranks, stops, number, cut):
    expected = steps(corpus, num_ranks, {"seed": 0, "epoch": number, "segments": []}, **cut)
    made, position = 0, {"seed": 0, "epoch": number, "segments": []}
    for more in stops:
        rank = sampler(corpus, num_ranks=num_ranks, **cut)
        rank.load_state_dict(position)
        assert len(rank) == len(expected)
        made = min(made + more, max(len(expected) - 1, 0))
        position = json.loads(json.dumps(rank.state_dict(made))) if expected else position
        assert len(position["segments"]) <= 1
    assert steps(corpus, num_ranks, position, **cut) == expected[made:]


@given(utterances, st.lists(st.tuples(rank_numbers, st.integers(0, 12)), max_size=6), rank_numbers, cuts)
def test_an_epoch_resumes_with_other_numbers_of_ranks_without_loss_or_repeat(corpus, stops, last, cut):
    """Against a brute force: a list from which each step takes its first batch and those of the nearest buckets."""
    groups, left = sampler(corpus, **cut).plan.groups, epoch(corpus, **cut)
    position, made, taken = {"seed": 0, "epoch": 0, "segments": []}, 0, []
    for num_ranks, number in [*stops, (last, None)]:
        done = steps(corpus, num_ranks, position, **cut)[:number]
        for step in done:
            near = sorted(left, key=lambda batch: abs_and_value(groups[batch[0]] - groups[left[0][0]]))[:num_ranks]
            assert list(step) == near + [[]] * (num_ranks - len(near))
            left = [batch for batch in left if batch not in near]
        rank = sampler(corpus, num_ranks=num_ranks, **cut)
        rank.load_state_dict(position)
        made, taken = made + len(done), taken + done
        position = json.loads(json.dumps(rank.state_dict(made)))
        if position["epoch"] == 1:
            break
    assert position == {"seed": 0, "epoch": 1, "segments": []}
    assert sorted(flat(batches_of(taken))) == list(range(len(corpus)))


def test_a_position_holds_no_utterance():
    rank = DurationBatches(digits(1000), Bounds(BATCH_SECONDS), shuffle=True, num_ranks=2, seed=3)
    rank.set_epoch(4)
    position = rank.state_dict(17)
    assert position == {"seed": 3, "epoch": 4, "segments": [(2, 17)], "plan": rank.plan.digest()}
    rank.num_ranks = 4
    rank.load_state_dict(position)
    assert rank.state_dict(20)["segments"] == [(2, 17), (4, 3)]
    assert rank.state_dict(17)["segments"] == [(2, 17)]


def test_a_position_does_not_depend_on_how_far_the_batches_were_fetched():
    rank = DurationBatches(digits(100), Bounds(BATCH_SECONDS), shuffle=True)
    before = rank.state_dict(2)
    list(itertools.islice(rank, 5))
    assert rank.state_dict(2) == before


def test_the_epoch_after_a_resumed_one_is_whole():
    corpus = [(seconds, 1) for seconds in digits(100)]
    rank = sampler(corpus)
    rank.load_state_dict(sampler(corpus).state_dict(5))
    assert len(list(rank)) == len(rank) - 5
    rank.set_epoch(0)
    assert len(list(rank)) == len(rank) - 5
    rank.set_epoch(1)
    assert list(rank) == epoch(corpus, 1)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"batch_seconds": 20.0},
        {"batch_tokens": 20},
        {"num_buckets": 2},
        {"buckets": [Bucket(20.0, 60, 2)]},
        {"corpus": digits(99)},
        {"corpus": [seconds + 1e-9 for seconds in digits(100)]},
    ],
)
def test_other_batches_cannot_resume_in_the_middle_of_an_epoch(other):
    other = {"seed": 0, "corpus": digits(100), **other}
    written = sampler([(seconds, 5) for seconds in digits(100)])
    resumed = sampler([(seconds, 5) for seconds in other.pop("corpus")], **other)
    with pytest.raises(UserError) as raised:
        resumed.load_state_dict(written.state_dict(4))
    assert str(raised.value) == (
        f"1 problem:\n\n  data = 'seed {resumed.seed}, digest {resumed.plan.digest()}'\n"
        f"    the checkpoint was saved in the middle of an epoch of other batches: seed 0, digest {written.plan.digest()}\n"
        "    write the seed and the data.* of the run that wrote it, or resume from the end of an epoch"
    )
    resumed.load_state_dict(written.state_dict(len(written)))
    assert (resumed.epoch, resumed.segments) == (1, [])


class Numbers:
    """A dataset whose item is the list it is asked for."""

    def __getitem__(self, numbers):
        return numbers


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_loader_hands_the_batches_out_in_order_with_any_number_of_workers(num_ranks):
    corpus = [(seconds, 1) for seconds in digits(61)]
    seen = []
    for rank in range(num_ranks):
        expected = epoch(corpus, rank=rank, num_ranks=num_ranks)
        for num_workers in (0, 2):
            batches = sampler(corpus, rank=rank, num_ranks=num_ranks)
            loader = DataLoader(Numbers(), batch_size=None, sampler=batches, num_workers=num_workers)
            assert len(loader) == len(expected)
            assert list(loader) == expected
        seen += flat(expected)
    assert sorted(seen) == list(range(61))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_stopped_ahead_of_training_resumes_where_training_stopped(num_workers):
    corpus = [(seconds, 1) for seconds in digits(61)]
    expected, batches = epoch(corpus), sampler(corpus)
    loader = DataLoader(Numbers(), batch_size=None, sampler=batches, num_workers=num_workers)
    trained = list(itertools.islice(loader, 3))
    resumed = sampler(corpus)
    resumed.load_state_dict(batches.state_dict(3))
    loader = DataLoader(Numbers(), batch_size=None, sampler=resumed, num_workers=num_workers)
    assert trained + list(loader) == expected


def test_a_million_utterances_are_planned_by_whole_arrays():
    """In far less than the minute that a loop in Python would take."""
    plan = BatchPlan(log_normal(1_000_000, 4.0), Bounds(240.0))
    assert sorted(plan.utterances((0, 0, 1))[:5].tolist()) != [0, 1, 2, 3, 4]
    assert len(plan.batch_groups) < 25_000
