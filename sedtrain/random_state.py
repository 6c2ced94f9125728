"""The state of every random number generator of a process, as plain values; and of all ranks."""

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Of Python, NumPy, PyTorch and this process's GPU, in types that load without running code."""
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
    """Has the generators go on where `random_state` was taken."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def of_all_ranks(state: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank hands in, in the order of ranks; every rank has to call it."""
    if not torch.distributed.is_initialized():
        return [state]
    states: list[dict[str, Any]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states
