"""The frames of a text's tokens are those of its most probable path."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lattices import BLANK, END, A, B, collapsed, frames_of, lattices, paths

from sedtrain.decoding.alignment import align
from sedtrain.decoding.ctc import Lattice

TEXTS = st.lists(st.sampled_from([A, B]), max_size=4)


def path_of(aligned, num_frames):
    path = [BLANK] * num_frames
    for each in aligned:
        path[each.start : each.end] = [each.token] * (each.end - each.start)
    return tuple(path)


@given(lattices(most_frames=5), st.tuples(TEXTS, TEXTS))
def test_the_frames_are_those_of_the_best_of_all_paths(lattice, wanted):
    for row, (text, aligned) in enumerate(zip(wanted, align(lattice, wanted), strict=True)):
        frames = frames_of(lattice, row)
        best = max((score for path, score in paths(frames) if collapsed(path) == tuple(text)), default=-np.inf)
        if best == -np.inf:
            assert aligned is None
            continue
        path = path_of(aligned, len(frames))
        assert collapsed(path) == tuple(text)
        assert sum(frames[t, token] for t, token in enumerate(path)) == pytest.approx(best, abs=1e-4)
        for each in aligned:
            assert each.confidence == pytest.approx(np.exp(frames[each.start : each.end, each.token]).mean(), abs=1e-5)


def test_a_token_that_ctc_does_not_know_has_no_frames():
    lattice = Lattice.of(torch.zeros(3, 4, 4), torch.tensor([4, 4, 1]), BLANK, END)
    assert align(lattice, [[A], [7], [A, B]])[1:] == [None, None]
    assert align(lattice, [[], [], []]) == [[], [], []]


def test_a_token_is_found_where_it_is_said():
    logits = torch.zeros(1, 10, 4)
    logits[0, :, BLANK] = 5
    for start, end, token in ((2, 4, A), (5, 6, A), (6, 9, B)):
        logits[0, start:end, [BLANK, token]] = torch.tensor([0.0, 5.0])
    [aligned] = align(Lattice.of(logits, torch.tensor([10]), BLANK, END), [[A, A, B]])
    assert [(each.token, each.start, each.end) for each in aligned] == [(A, 2, 4), (A, 5, 6), (B, 6, 9)]
    assert all(each.confidence > 0.95 for each in aligned)
