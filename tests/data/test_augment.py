import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch.utils.data import DataLoader, Dataset

from sedtrain.batch import Utterance
from sedtrain.data.augment import Augment, Augmentation, generator, options_of
from sedtrain.data.augmentations import ColouredNoise, Gain, Speed, TimeMask
from sedtrain.errors import UserError

RATE = 16_000
CHAIN = {
    "speed": Speed([0.9, 1.0, 1.1]),
    "gain": Gain((-12.0, 12.0), probability=0.8),
    "noise": ColouredNoise(snr_db=(0.0, 20.0), probability=0.5),
    "time_mask": TimeMask(probability=0.7),
}

texts = st.text(max_size=20)  # ids as bad as they come, lone surrogates too
samples = arrays.arrays(np.float32, st.integers(1, 4000), elements=st.floats(-1, 1, width=32))
chains = st.lists(st.sampled_from(list(CHAIN)), unique=True).map(lambda names: {name: CHAIN[name] for name in names})


def utterance(id="a", audio=None, num_samples=RATE):
    if audio is None:
        audio = 0.1 * np.random.default_rng(len(id)).standard_normal(num_samples, dtype=np.float32)
    return Utterance(id, torch.from_numpy(audio), RATE, "text", "en", "speaker", len(audio) / RATE)


def sounds(chain, utterances, epoch=0):
    """The bytes of every utterance, by its id, in the order in which the chain is given them."""
    return {each.id: chain(each, epoch).audio.numpy().tobytes() for each in utterances}


@given(texts, st.integers(0, 2**32 - 1), st.integers(0, 10**6), samples, chains)
def test_seed_epoch_and_id_decide_and_nothing_that_was_augmented_before(id, seed, epoch, audio, chain):
    first = Augment(chain, seed)(utterance(id, audio), epoch)
    used = Augment(chain, seed)
    for before in ("b", "c"):
        used(utterance(before), epoch + 1)
    np.random.seed(0)
    torch.testing.assert_close(used(utterance(id, audio), epoch).audio, first.audio, rtol=0, atol=0)


@given(st.permutations(range(8)), st.integers(1, 8))
def test_neither_order_nor_the_rank_that_reads_it_changes_an_utterance(order, num_ranks):
    corpus = [utterance(f"u{i}", num_samples=500 + 100 * i) for i in range(8)]
    expected = sounds(Augment(CHAIN, 0), corpus)
    found = {}
    for rank in range(num_ranks):
        found |= sounds(Augment(CHAIN, 0), [corpus[i] for i in order[rank::num_ranks]])
    assert found == expected


@given(samples, chains, st.integers(0, 50))
def test_what_comes_out_is_finite_float32_within_full_scale_and_as_long_as_it_says(audio, chain, epoch):
    before = audio.copy()
    given_one, augment = utterance("a", audio), Augment(chain, 0)
    augmented = augment(given_one, epoch)
    assert augmented.audio.dtype == torch.float32
    assert augmented.audio.isfinite().all()
    assert 0 < len(augmented.audio) <= max(1, len(audio) * augment.longest)
    assert augmented.audio.abs().max() <= max(1.0, np.abs(audio).max())
    assert augmented.seconds == len(augmented.audio) / RATE
    np.testing.assert_array_equal(given_one.audio.numpy(), before)
    assert replace(augmented, audio=given_one.audio, seconds=given_one.seconds) == given_one


class Corpus(Dataset):
    """Items are batches of (epoch, utterance number)."""

    def __init__(self, augment):
        self.augment = augment

    def __getitem__(self, numbers):
        return {
            (epoch, i): self.augment(utterance(f"u{i}", num_samples=800), epoch).audio.numpy().tobytes()
            for epoch, i in numbers
        }


def test_workers_change_nothing():
    items = [(epoch, i) for epoch in range(2) for i in range(10)]
    alone = Corpus(Augment(CHAIN, 5))[items]
    random.Random(0).shuffle(items)
    batches = [items[i : i + 3] for i in range(0, len(items), 3)]
    loader = DataLoader(Corpus(Augment(CHAIN, 5)), batch_size=None, sampler=batches, num_workers=2)
    found = {}
    for batch in loader:
        found |= batch
    assert found == alone


def test_another_seed_epoch_id_or_name_sounds_different():
    one = {"noise": ColouredNoise(["white"])}
    audio = utterance().audio.numpy()
    variants = [
        Augment(one, 0)(utterance("a", audio), 0),
        Augment(one, 1)(utterance("a", audio), 0),
        Augment(one, 0)(utterance("a", audio), 1),
        Augment(one, 0)(utterance("b", audio), 0),
        Augment({"hiss": one["noise"]}, 0)(utterance("a", audio), 0),
    ]
    assert len({each.audio.numpy().tobytes() for each in variants}) == 5


def test_tuples_that_read_alike_have_random_numbers_of_their_own():
    keys = [
        (1, 2, "3", "n"),
        (1, 23, "", "n"),
        (12, 3, "", "n"),
        (1, 2, "3', 'n", ""),
        (1, 2, "", "3n"),
        (1, 2, "é", "n"),
    ]
    assert len({generator(*key).integers(2**63) for key in keys}) == len(keys)


def test_what_one_augmentation_does_depends_on_no_other():
    noise, spoken = {"noise": ColouredNoise()}, utterance()
    alone = Augment(noise, 0)(spoken, 0).audio
    for never in (Gain(probability=0.0), Gain((0.0, 0.0))):
        torch.testing.assert_close(Augment({"gain": never, **noise}, 0)(spoken, 0).audio, alone, rtol=0, atol=0)


def test_the_order_of_the_chain_is_the_order_it_is_written_in():
    class Add(Augmentation):
        def __init__(self, step):
            super().__init__()
            self.step = step

        def __call__(self, audio, sampling_rate, random):
            return audio * 0.5 + self.step

    silence = utterance(audio=np.zeros(4, np.float32))
    assert Augment({"a": Add(0.5), "b": Add(0.0)}, 0)(silence, 0).audio.tolist() == [0.25] * 4
    assert Augment({"b": Add(0.0), "a": Add(0.5)}, 0)(silence, 0).audio.tolist() == [0.5] * 4


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_each_is_applied_as_often_as_its_probability_says(probability):
    chain = Augment({"gain": Gain((6.0, 6.0), probability)}, 0)
    utterances = [utterance(str(i), np.full(4, 0.1, np.float32)) for i in range(2000)]
    num_changed = sum(chain(each, 0) is not each for each in utterances)
    assert num_changed / 2000 == pytest.approx(probability, abs=0.03)


def test_an_utterance_that_no_augmentation_touches_comes_back_itself():
    spoken = utterance()
    assert Augment({}, 0)(spoken, 0) is spoken
    assert Augment({"gain": Gain(probability=0.0), "speed": Speed([1.0])}, 0)(spoken, 0) is spoken


def test_audio_beyond_full_scale_is_scaled_down_as_a_whole_not_clipped():
    spoken = utterance()
    louder = Augment({"gain": Gain((60.0, 60.0))}, 0)(spoken, 0).audio
    assert louder.abs().max() == 1.0
    torch.testing.assert_close(louder, spoken.audio / spoken.audio.abs().max())


def test_nothing_is_made_longer_than_the_limit_and_faster_speech_passes():
    spoken = utterance(num_samples=RATE)
    for factor, limit, seconds in [(0.8, 1.3, 1.25), (0.8, 1.2, 1.0), (1.25, 0.5, 0.8)]:
        assert Augment({"speed": Speed([factor])}, 0, max_seconds=limit)(spoken, 0).seconds == seconds


def test_the_longest_factor_is_that_of_the_slowest_speeds_together():
    assert Augment({}, 0).longest == 1.0
    assert Augment({"a": Speed([0.8, 1.2]), "b": Speed([0.5]), "c": Gain()}, 0).longest == pytest.approx(2.5)
    assert Speed([1.1, 1.2]).longest == 1.0


def test_a_chain_survives_pickling():
    spoken, chain = utterance(), Augment(CHAIN, 3)
    again = pickle.loads(pickle.dumps(chain))
    torch.testing.assert_close(again(spoken, 2).audio, chain(spoken, 2).audio, rtol=0, atol=0)


def test_what_an_augmentation_refuses_is_refused_with_its_path():
    with pytest.raises(UserError) as refused, options_of("augment.hum"):
        Gain((3.0, -3.0))
    assert str(refused.value) == (
        "1 problem:\n\n  augment.hum.gain_db = [3.0, -3.0]\n"
        "    this has to be two numbers of decibels from -100 to 100, the lower one first\n    write [LOW,HIGH]"
    )
