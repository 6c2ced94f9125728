"""Signals to a real training and its data workers, and what a command then says."""

import os
import re
import signal
import time

import pytest
from forked import Forked

from sedtrain.training.checkpoint_files import read_checkpoint


@pytest.fixture
def started(corpus, tmp_path):
    """A training without end, at work."""
    folder = tmp_path / "run"
    run = Forked(
        tmp_path, "data=parquet", f"data.path={corpus}", f"run_dir={folder}",
        "trainer.max_steps=100000", "trainer.max_time=null", "trainer.val_check_interval=100000",
        "callbacks.checkpoints.every_steps=1", "data.num_workers=2",
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (folder / "checkpoints/last.ckpt").exists() and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.05)
    yield run, folder
    run.kill()


def test_sigterm_to_all_its_processes_ends_a_training_with_a_checkpoint_and_says_how_to_go_on(started):
    """As a cluster sends it; before, what has a checkpoint written does nothing else."""
    run, folder = started
    os.killpg(run.pid, signal.SIGUSR1)
    time.sleep(1)
    os.killpg(run.pid, signal.SIGTERM)
    assert run.wait(100) == 128 + signal.SIGTERM, run.out + run.err
    assert "Traceback" not in run.err
    step = int(re.search(rf"stopped at step (\d+); saved in {folder}: model, checkpoints/last.ckpt", run.err)[1])
    assert "resume=auto with this run_dir resumes it" in run.err
    assert read_checkpoint(folder / "checkpoints/last.ckpt")["global_step"] == step > 0
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)
