"""The tests under JAX in a process of their own: torchax takes the place of PyTorch's devices for the rest of a process."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(not (find_spec("jax") and find_spec("torchax")), reason="needs sedtrain[jax]")
def test_a_model_under_jax_is_the_one_in_pytorch():
    cases = Path(__file__).with_name("jax_cases.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
