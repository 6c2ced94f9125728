"""Small CTC lattices, and what all their paths say."""

from itertools import groupby, product

import numpy as np
import torch
from hypothesis import strategies as st

from sedtrain.decoding.ctc import Lattice

BLANK, A, B, END = range(4)


@st.composite
def heard(draw, most_frames=4, vocabulary=4):
    """(B, T, V) scores and (B,) frames of two utterances, the second of at most as many, with anything in its padding."""
    num_frames = [draw(st.integers(1, most_frames))]
    num_frames.append(draw(st.integers(1, num_frames[0])))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = random.normal(0, draw(st.sampled_from([0.5, 3.0, 8.0])), (2, num_frames[0], vocabulary))
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(num_frames)


def lattices(**sizes):
    return heard(**sizes).map(lambda logits_and_frames: Lattice.of(*logits_and_frames, BLANK, END))


def frames_of(lattice, row):
    """(T, V) log-probabilities of one utterance without its padding, as float64."""
    return lattice.log_probs[row, : lattice.num_frames[row]].double().numpy()


def collapsed(path):
    return tuple(token for token, _ in groupby(path) if token != BLANK)


def paths(frames):
    """Each path with its log-probability."""
    for path in product(range(frames.shape[1]), repeat=len(frames)):
        yield path, sum(frames[t, token] for t, token in enumerate(path))


def texts(frames):
    """Each text with the log-probability of all its paths."""
    found = {}
    for path, score in paths(frames):
        text = collapsed(path)
        found[text] = np.logaddexp(found.get(text, -np.inf), score)
    return found


def prefix_score(found, prefix):
    """The log-probability of all texts that begin with the prefix."""
    return np.logaddexp.reduce([score for text, score in found.items() if text[: len(prefix)] == prefix] or [-np.inf])
