import json
from collections import Counter
from math import log10, sqrt

import numpy as np
import pytest
from corpora import data_module, write
from hypothesis import given
from hypothesis import strategies as st

from sedtrain.data.buckets import Bounds
from sedtrain.inspection.sections import in_words, named
from sedtrain.inspection.splits import QUIETEST, Entry, is_clipped, level, read_corpus, robust_scores, silence
from sedtrain.inspection.summary import (
    Batching,
    Histogram,
    Spread,
    Texts,
    batchings,
    groups_of,
    inspected,
    round_step,
)

SECONDS = st.lists(st.floats(0.05, 60), min_size=1, max_size=60)


# --- statistics


@given(st.one_of(SECONDS.map(np.array), st.lists(st.integers(0, 400), min_size=1).map(np.array)))
def test_every_value_is_in_one_bin_of_a_histogram(values):
    found = Histogram(values)
    assert found.edges == sorted(set(found.edges))
    counted = [
        sum(low <= each < high for each in values) for low, high in zip(found.edges, found.edges[1:], strict=False)
    ]
    counted[-1] += sum(values == found.edges[-1])
    assert found.counts == counted
    assert sum(found.counts) == len(values)


@given(st.lists(st.integers(0, 400), min_size=1).map(np.array))
def test_bins_of_whole_numbers_begin_at_whole_numbers(values):
    assert all(edge == int(edge) for edge in Histogram(values).edges)


def test_what_is_far_off_has_one_bin():
    found = Histogram(np.array([*np.linspace(0, 10, 500), 1000.0]))
    assert found.edges[-2:] == [10.0, 1000.0]
    assert found.counts[-1] == 2  # 10 itself, and 1,000
    assert found.labels()[-2:] == ["10", "1,000"]


@pytest.mark.parametrize("least, step", [(0.3, 0.5), (1, 1), (1.01, 2), (0.02, 0.02), (6, 10), (70, 100), (0, 1)])
def test_steps_are_round(least, step):
    assert round_step(least) == pytest.approx(step)


def test_percentiles_are_those_of_the_sorted_values():
    spread = Spread(np.arange(101.0)[::-1])
    assert spread.percentiles == {p: float(p) for p in (0, 1, 5, 25, 50, 75, 95, 99, 100)}
    assert spread.mean == 50


def test_padding_is_what_batches_hold_beside_the_audio():
    seconds = np.array([1.0, 2.0, 4.0, 3.0])
    found = Batching("by hand", seconds, [[0, 1], [2, 3]])
    assert (found.num_batches, found.mean_utterances, found.largest_seconds) == (2, 2.0, 8.0)
    assert found.padding == pytest.approx(1 - 10 / (2 * 2 + 2 * 4))


@given(SECONDS, st.sampled_from([None, 7]))
def test_each_way_of_batching_holds_all_audio(lengths, block):
    seconds = np.array(lengths)
    for found in batchings(seconds, Bounds(24, num_buckets=30), 0, shuffle=True, block=block):
        assert found.num_batches * found.mean_utterances == pytest.approx(len(seconds))
        assert 0 <= found.padding + 1e-9 < 1
    single = batchings(seconds, Bounds(24, num_buckets=1), 0, shuffle=True, block=block)
    assert [each.name for each in single] == ["1 bucket", "as many at random"]


def test_padding_is_that_of_the_batches_of_training(tmp_path):
    """The number of samples in the tensors of an epoch, and of those that are real."""
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.parquet", np.random.default_rng(0).uniform(0.2, 3, 40).round(2))
    data = data_module(tmp_path, batch_seconds=6, num_buckets=5)
    masks = [batch.attention_mask for batch in data.train_dataloader()]
    found, _ = inspected(data, None)
    of_training = found.splits[0].batches[0]
    assert of_training.num_batches == len(masks)
    real = sum(int(mask.sum()) for mask in masks)
    assert of_training.padding == pytest.approx(1 - real / sum(mask.numel() for mask in masks), abs=1e-9)
    assert of_training.largest_seconds == pytest.approx(max(mask.numel() for mask in masks) / 16_000)


@given(st.lists(st.text("aäb ", max_size=5)))
def test_texts_and_characters_are_counted_and_characters_found_where_they_are_first(texts):
    entries = [Entry((0, index), str(index), 1.0, text, None, None, None) for index, text in enumerate(texts)]
    found = Texts(entries)
    assert {use.character: use.times for use in found.rarest} == Counter("".join(texts))
    assert all(use.character in use.text and texts[int(use.id)] == use.text for use in found.rarest)
    assert all(use.character not in text for use in found.rarest for text in texts[: int(use.id)])
    assert [use.times for use in found.rarest] == sorted(use.times for use in found.rarest)
    assert found.num_distinct == len(set(texts))
    assert found.num_repeated == sum(texts.count(each) > 1 for each in texts)
    several = {text: texts.count(text) for text in texts if texts.count(text) > 1}
    assert list(found.repeated.values()) == sorted(several.values(), reverse=True)[:5]
    assert found.repeated.items() <= several.items()


def test_groups_come_with_their_audio_the_largest_first():
    groups = groups_of(["a", "b", None, "b", "a"], np.array([3600.0, 1800.0, 9.0, 3600.0, 0.0]))
    assert [(each.name, each.num_utterances, each.hours) for each in groups] == [("b", 2, 1.5), ("a", 2, 1.0)]


def test_scores_are_standard_deviations_of_normal_values():
    values = np.random.default_rng(0).normal(5, 2, 100_000)
    assert robust_scores(values, 0)[:50] == pytest.approx((values[:50] - 5) / 2, abs=0.05)


def test_scores_know_values_that_are_missing_alike_or_barely_different():
    assert np.isnan(robust_scores(np.full(3, np.nan), 1)).all()
    assert np.isnan(robust_scores(np.array([1.0, np.nan, 3.0]), 1)).tolist() == [False, True, False]
    assert robust_scores(np.array([2.0, 2.0, 2.0]), 1).tolist() == [0, 0, 0]
    assert robust_scores(np.array([0.0] * 99 + [0.5]), 0.1)[-1] == pytest.approx(5)


# --- sound


def test_levels_are_those_of_a_sine():
    sine = np.sin(np.arange(16_000) * 2 * np.pi / 100).astype(np.float32)
    assert level(0.1 * sine) == pytest.approx(20 * log10(0.1 / sqrt(2)), abs=0.01)
    assert level(np.zeros(10, np.float32)) == QUIETEST


@pytest.mark.parametrize(
    "samples, clips", [([0, 1, 1, 1, 0], True), ([0, 1, 0, 1, 1], False), ([-1, -1, -1], True), ([1], False)]
)
def test_samples_in_a_row_at_full_scale_are_clipped(samples, clips):
    assert is_clipped(np.array(samples, np.float32)) == clips


def test_silence_is_what_is_40_decibels_below_the_loudest():
    tone = np.ones(16_000, np.float32)
    assert silence(np.concatenate([tone, 0.009 * tone, 0.011 * tone, 0 * tone]), 16_000) == pytest.approx(0.5)
    assert silence(np.zeros(16_000, np.float32), 16_000) == 1
    assert silence(np.ones(5, np.float32), 16_000) == 0


# --- words


@pytest.mark.parametrize(
    "cell, words",
    [
        (3.0, "3"),
        (0.956, "0.96"),
        (23.26, "23.3"),
        (1234.5, "1,234"),
        (0.0, "0"),
        (12345, "12,345"),
        ("3", "3"),
        (None, ""),
    ],
)
def test_numbers_are_short(cell, words):
    assert in_words(cell) == words


@pytest.mark.parametrize(
    "character, words", [("a", "a  U+0061"), ("\u200b", "U+200B zero width space"), ("\t", "U+0009 control character")]
)
def test_a_character_that_nobody_sees_is_named(character, words):
    assert named(character) == words


# --- a corpus


@pytest.fixture
def splits(tmp_path):
    """40 + 10 utterances; of training one is much longer, one is too long."""
    lengths = [1.0 + 0.01 * i for i in range(38)]
    speakers = [f"speaker {i % 4}" for i in range(40)]
    write(tmp_path / "train.parquet", [*lengths, 9.0, 31.0], speaker=speakers)
    write(tmp_path / "test.parquet", lengths[:10], speaker=["speaker 0"] * 5 + ["speaker 9"] * 5)
    return tmp_path


def inspection_of(folder, most=None, **options):
    columns = {"audio": "audio", "transcription": "text", "speaker": "speaker"}
    found, _ = inspected(data_module(folder, columns=columns, **options), most)
    return found


def test_an_inspection_counts_what_is_there(splits):
    found = inspection_of(splits)
    train, test = found.splits
    assert (train.num_read, train.num_utterances, test.num_utterances) == (40, 39, 10)
    assert train.hours == pytest.approx((sum(1.0 + 0.01 * i for i in range(38)) + 9) / 3600)
    assert [(each.reason, each.num_utterances, each.hours) for each in train.skipped] == [("too long", 1, 31 / 3600)]
    assert list(found.absent) == ["validation"]
    assert {each.name: each.num_utterances for each in train.groups["speaker"]} == {
        "speaker 0": 10,
        "speaker 1": 10,
        "speaker 2": 10,
        "speaker 3": 9,
    }
    assert (test.overlap.num_speakers, test.overlap.num_texts) == (1, 10)
    assert train.overlap is None
    assert train.texts.repeated == {"one": 10, "two": 10, "three": 10, "four": 9}
    assert (train.sounds.num_decoded, train.sounds.sampling_rates) == (39, {16_000: 39})
    assert -21 < train.sounds.level.percentiles[50] < -19  # the noise has a standard deviation of 0.1


def test_the_strangest_utterance_is_that_which_is_much_longer(splits):
    first, *others = inspection_of(splits).strangest
    assert (first.split, first.id, len(others)) == ("train", "train-38", 9)
    assert first.reasons[0] == "9.00 s long, median 1.14 s"  # of 1.00 to 1.37 s, those up to 1.09 s twice


def test_what_is_left_out_is_listed(splits):
    inspection_of(splits, on_bad_utterance="skip")
    [line] = (splits / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "too long"


def test_of_a_stream_the_first_utterances_are_read(splits):
    found = inspection_of(splits, most=7, streaming=True)
    assert [(each.num_read, each.is_whole) for each in found.splits] == [(7, False), (7, False)]
    whole = inspection_of(splits, most=40, streaming=True)
    assert [(each.num_read, each.is_whole) for each in whole.splits] == [(40, True), (10, True)]


def test_a_single_file_is_one_split(splits):
    columns, absent = read_corpus(data_module(splits / "test.parquet", folder=splits).corpus, None)
    assert ([each.split for each in columns], absent) == (["train"], {})


def test_a_mix_is_told_apart(splits):
    half = {"path": str(splits)}
    found = inspection_of(splits, mix={"a": half, "b": {**half, "language": "de"}})
    assert {each.name: each.num_utterances for each in found.splits[0].groups["dataset"]} == {"a": 39, "b": 39}
    assert {each.name: each.num_utterances for each in found.splits[0].groups["language"]} == {"de": 39}
