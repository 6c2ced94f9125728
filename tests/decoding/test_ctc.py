"""Prefix scores, best paths and prefix beams equal what all paths of a small lattice say."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lattices import BLANK, END, A, B, collapsed, frames_of, heard, lattices, paths, prefix_score, texts

from sedtrain.decoding.ctc import Lattice, Prefixes, best_path, prefix_beam, recurrence

CLOSE = {"rel": 1e-4, "abs": 1e-4}
TEN = torch.tensor([10, 10])


@given(lattices(), st.lists(st.sampled_from([A, B]), max_size=4))
def test_prefix_scores_equal_the_sum_over_all_paths(lattice, text):
    prefixes = Prefixes.empty(lattice)
    for length in range(len(text) + 1):
        extensions = prefixes.extensions()
        for row in range(2):
            found, prefix = texts(frames_of(lattice, row)), tuple(text[:length])
            assert prefixes.scores[row, 0].item() == pytest.approx(prefix_score(found, prefix), **CLOSE)
            assert prefixes.whole[row, 0].item() == pytest.approx(found.get(prefix, -np.inf), **CLOSE)
            expected = [-np.inf, *(prefix_score(found, (*prefix, token)) for token in (A, B)), -np.inf]
            assert extensions[row, 0].tolist() == pytest.approx(expected, **CLOSE)
        if length < len(text):
            token = torch.full((2, 1), text[length])
            prefixes = prefixes.extended(torch.zeros_like(token), token)


@given(lattices())
def test_several_prefixes_are_extended_together_each_behind_its_parent(lattice):
    both = Prefixes.empty(lattice).extended(torch.zeros(2, 2, dtype=torch.long), torch.tensor([[A, B]] * 2))
    three = both.extended(torch.tensor([[1, 0, 1]] * 2), torch.tensor([[A, A, B]] * 2))
    for row, (number, text) in product(range(2), enumerate([(B, A), (A, A), (B, B)])):
        expected = prefix_score(texts(frames_of(lattice, row)), text)
        assert three.scores[row, number].item() == pytest.approx(expected, **CLOSE)


@given(lattices())
def test_a_wide_enough_prefix_beam_finds_all_texts_in_order(lattice):
    found = prefix_beam(lattice, num_beams=32, num_best=32, limits=TEN)
    for row, hypotheses in enumerate(found):
        expected = {text: score for text, score in texts(frames_of(lattice, row)).items() if score > -np.inf}
        assert {tuple(ids) for ids in hypotheses.ids} == set(expected)
        assert hypotheses.scores == sorted(hypotheses.scores, reverse=True)
        scores = [expected[tuple(ids)] for ids in hypotheses.ids]
        assert hypotheses.scores == pytest.approx(scores, **CLOSE)


@given(lattices(), st.integers(1, 4))
def test_the_best_texts_of_a_beam_are_those_of_all(lattice, num_best):
    for row, hypotheses in enumerate(prefix_beam(lattice, num_beams=32, num_best=num_best, limits=TEN)):
        scores = sorted(texts(frames_of(lattice, row)).values(), reverse=True)[:num_best]
        possible = [score for score in scores if score > -np.inf]
        assert hypotheses.scores == pytest.approx(possible, **CLOSE)


@given(lattices(), st.tuples(st.integers(0, 3), st.integers(0, 3)), st.integers(1, 4))
def test_no_text_is_longer_than_its_own_limit_and_shorter_ones_are_all_found(lattice, limits, num_best):
    for row, (path, beam) in enumerate(
        zip(best_path(lattice, limits), prefix_beam(lattice, 32, num_best, torch.tensor(limits)), strict=True)
    ):
        assert len(path.ids[0]) <= limits[row]
        found = texts(frames_of(lattice, row)).items()
        scores = sorted((score for text, score in found if len(text) <= limits[row] and score > -np.inf), reverse=True)
        assert beam.scores == pytest.approx(scores[:num_best], **CLOSE)


@given(lattices())
def test_the_best_path_is_the_most_probable_of_all(lattice):
    for row, hypotheses in enumerate(best_path(lattice, [10, 10])):
        path, score = max(paths(frames_of(lattice, row)), key=lambda each: each[1])
        assert hypotheses.ids == [list(collapsed(path))]
        assert hypotheses.scores == pytest.approx([score], **CLOSE)


@given(heard(), st.integers(1, 3))
def test_padded_frames_change_nothing(given, more):
    logits, num_frames = given
    lattice = Lattice.of(logits, num_frames, BLANK, END)
    padded = Lattice.of(torch.cat([logits, torch.randn(2, more, 4)], 1), num_frames, BLANK, END)
    for search in (lambda each: best_path(each, [10, 10]), lambda each: prefix_beam(each, 2, 2, TEN)):
        for one, other in zip(search(lattice), search(padded), strict=True):
            assert one.ids == other.ids
            assert one.scores == pytest.approx(other.scores, **CLOSE)


@given(st.lists(st.tuples(st.floats(-9, 0), st.floats(-9, 0)), min_size=1, max_size=20))
def test_the_recurrence_in_few_steps_is_that_of_one_step_a_frame(rows):
    decay, gain = torch.tensor(rows, dtype=torch.float64).T
    expected, value = [], -math.inf
    for by, added in rows:
        value = np.logaddexp(value + by, added)
        expected.append(value)
    assert recurrence(decay, gain).tolist() == pytest.approx(expected)


def test_a_text_stays_probable_over_a_thousand_frames():
    """Twenty tokens, each sure in its frame and improbable elsewhere: float32 does not lose them."""
    logits = torch.full((1, 1_000, 30), -20.0)
    logits[..., BLANK] = 0.0
    text = [5 + n for n in range(20)]
    for number, token in enumerate(text):
        logits[0, 25 + 50 * number, [BLANK, token]] = torch.tensor([-20.0, 0.0])
    lattice = Lattice.of(logits, torch.tensor([1_000]), BLANK, END)
    [found] = prefix_beam(lattice, num_beams=4, num_best=2, limits=torch.tensor([100]))
    assert found.ids[0] == text
    expected = -torch.nn.functional.ctc_loss(
        lattice.log_probs.double().clamp(min=-1e4).transpose(0, 1),
        torch.tensor([text]),
        (1_000,),
        (20,),
        reduction="sum",
    )
    assert found.scores[0] == pytest.approx(expected.item(), abs=1e-4)
