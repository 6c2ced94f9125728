import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sedtrain.batch import UserError
from sedtrain.data.batching import DurationBatches, batches_by_seconds, split_evenly

BATCH_SECONDS = 24.0

corpora = st.lists(st.floats(0.05, 40), max_size=80)
# Enough short utterances for 8 ranks whatever else there is: batches can then always be halved until they divide.
shareable = st.builds(lambda lengths: [*lengths, *[1.0] * 16], corpora)


def digits(number, seed=0):
    """Lengths in seconds that are spread like those of read speech."""
    generator = random.Random(seed)
    return [min(max(generator.lognormvariate(1.2, 0.6), 0.3), 20.0) for _ in range(number)]


def padded_seconds(batch, seconds):
    return len(batch) * max(seconds[i] for i in batch)


def epoch(seconds, number=0, **options):
    batches = DurationBatches(seconds, BATCH_SECONDS, **{"shuffle": True, **options})
    batches.set_epoch(number)
    return list(batches)


@given(corpora, st.permutations(range(12)), st.floats(1, 60))
def test_batches_keep_the_order_and_the_bound(seconds, shuffled, batch_seconds):
    order = [i for i in shuffled if i < len(seconds)]
    batches = batches_by_seconds(order, seconds, batch_seconds)
    assert [i for batch in batches for i in batch] == order
    for batch in batches:
        assert len(batch) == 1 or padded_seconds(batch, seconds) <= batch_seconds


@given(corpora, st.floats(1, 60))
def test_no_batch_could_take_the_next_utterance_too(seconds, batch_seconds):
    batches = batches_by_seconds(range(len(seconds)), seconds, batch_seconds)
    for batch, following in itertools.pairwise(batches):
        assert padded_seconds([*batch, following[0]], seconds) > batch_seconds


def test_the_bound_counts_padding():
    assert batches_by_seconds([0, 1, 2], [12.0, 1.0, 1.0], 24.0) == [[0, 1], [2]]
    assert batches_by_seconds([0, 1, 2], [1.0, 1.0, 12.0], 24.0) == [[0, 1], [2]]


def test_an_utterance_over_the_bound_stands_alone():
    assert batches_by_seconds([0, 1, 2, 3], [1.0, 30.0, 1.0, 1.0], 24.0) == [[0], [1], [2, 3]]


@given(shareable, st.integers(1, 8), st.booleans(), st.integers(0, 3))
def test_every_utterance_is_seen_once_over_all_ranks_in_equally_many_steps(seconds, num_ranks, shuffle, number):
    options = {"shuffle": shuffle, "num_ranks": num_ranks}
    ranks = [epoch(seconds, number, rank=rank, **options) for rank in range(num_ranks)]
    assert sorted(i for batches in ranks for batch in batches for i in batch) == list(range(len(seconds)))
    assert {len(batches) for batches in ranks} == {len(DurationBatches(seconds, BATCH_SECONDS, **options))}


@given(shareable, st.integers(1, 8), st.booleans())
def test_no_batch_is_over_the_bound_or_empty(seconds, num_ranks, shuffle):
    for rank in range(num_ranks):
        for batch in epoch(seconds, rank=rank, num_ranks=num_ranks, shuffle=shuffle):
            assert batch
            assert len(batch) == 1 or padded_seconds(batch, seconds) <= BATCH_SECONDS


@given(shareable, st.integers(0, 2**32), st.integers(0, 1000))
def test_the_order_is_a_function_of_seed_and_epoch(seconds, seed, number):
    resumed = DurationBatches(seconds, BATCH_SECONDS, shuffle=True, seed=seed)
    for earlier in (3, number):
        resumed.set_epoch(earlier)
    random.seed(number)  # the state of anyone else's generator has no say
    assert list(resumed) == epoch(seconds, number, seed=seed)
    assert list(resumed) == list(resumed)


def test_epochs_and_seeds_have_other_orders_and_other_batches():
    seconds = digits(200)
    orders = [epoch(seconds, number, seed=seed) for seed in (0, 1, 11) for number in (0, 1, 10, 110)]
    assert len({str(order) for order in orders}) == len(orders)
    neighbours = [{frozenset(batch) for batch in order} for order in orders[:2]]
    assert len(neighbours[0] & neighbours[1]) < len(neighbours[0]) / 4


def test_without_shuffling_every_epoch_begins_with_the_longest():
    seconds = digits(200)
    first = epoch(seconds, 0, shuffle=False, seed=0)
    assert first == epoch(seconds, 5, shuffle=False, seed=7)
    in_order = [seconds[i] for batch in first for i in batch]
    assert in_order == sorted(seconds, reverse=True)


def test_shuffled_batches_of_read_speech_hold_under_a_tenth_of_padding():
    seconds = digits(2000)
    batches = epoch(seconds)
    padding = 1 - sum(seconds) / sum(padded_seconds(batch, seconds) for batch in batches)
    in_corpus_order = batches_by_seconds(range(2000), seconds, BATCH_SECONDS)
    unsorted_padding = 1 - sum(seconds) / sum(padded_seconds(batch, seconds) for batch in in_corpus_order)
    assert padding < 0.1 < 0.3 < unsorted_padding


def test_shuffled_batches_do_not_run_from_long_to_short():
    seconds = digits(2000)
    longest = [max(seconds[i] for i in batch) for batch in epoch(seconds)]
    half = len(longest) // 2
    assert sum(longest[:half]) / half == pytest.approx(sum(longest[half:]) / (len(longest) - half), rel=0.25)


def test_ranks_get_equally_much_by_halving_the_largest_batches():
    assert split_evenly([[0, 1, 2, 3], [4, 5], [6]], 4) == [[0, 1], [2, 3], [4, 5], [6]]
    assert split_evenly([[0, 1, 2], [3]], 2) == [[0, 1, 2], [3]]


def test_utterances_that_ranks_cannot_share_evenly_are_the_users_to_know():
    with pytest.raises(UserError) as raised:
        epoch([20.0] * 9, num_ranks=2)
    assert str(raised.value) == (
        "9 batches of one utterance cannot be shared evenly by 2 devices\n"
        "  write instead: trainer.devices=N with an N that divides 9, or a larger data.batch_seconds"
    )
