"""The random number generators go on where their state was taken."""

import random

import numpy as np
import torch

from sedtrain.training.checkpoint_files import random_state, read_checkpoint, set_random_state, write_checkpoint
from sedtrain.training.strategies import gather_states


def draw():
    return random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()


def test_a_state_out_of_a_file_repeats_what_was_drawn_after_it(tmp_path):
    draw()
    np.random.standard_normal()  # leaves a second normal number in reserve
    write_checkpoint({"states": gather_states(random_state())}, tmp_path / "last.ckpt")
    drawn = draw()
    assert draw() != drawn
    [state] = read_checkpoint(tmp_path / "last.ckpt")["states"]
    set_random_state(state)
    assert draw() == drawn
