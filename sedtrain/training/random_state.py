"""States of the random number generators, in types that a checkpoint loads without running code."""

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and PyTorch's generators, and of this process's GPU."""
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    keys = {**numpy["state"], "key": numpy["state"]["key"].tolist()}
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": keys},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
