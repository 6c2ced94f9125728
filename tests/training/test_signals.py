"""Signals to a real training and its data workers, and what a command then says."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sedtrain.training.checkpoint_files import read_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture
def started(corpus, tmp_path):
    """A training without end, at work."""
    folder = tmp_path / "run"
    run = subprocess.Popen(
        [
            sys.executable, "-m", "sedtrain", "data=parquet", f"data.path={corpus}", f"run_dir={folder}",
            "trainer.max_steps=100000", "trainer.max_time=null", "trainer.val_check_interval=100000",
            "callbacks.checkpoints.every_steps=1", "data.num_workers=2",
        ],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (folder / "checkpoints/last.ckpt").exists() and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.05)
    yield run, folder
    run.kill()
    run.communicate()


def test_sigterm_to_all_its_processes_ends_a_training_with_a_checkpoint_and_says_how_to_go_on(started):
    """As a cluster sends it; before, what has a checkpoint written does nothing else."""
    run, folder = started
    os.killpg(run.pid, signal.SIGUSR1)
    time.sleep(1)
    os.killpg(run.pid, signal.SIGTERM)
    out, err = run.communicate(timeout=100)
    assert run.returncode == 128 + signal.SIGTERM, out + err
    assert "Traceback" not in err
    step = int(re.search(rf"stopped at step (\d+); saved in {folder}: model, checkpoints/last.ckpt", err)[1])
    assert "resume=auto with this run_dir resumes it" in err
    assert read_checkpoint(folder / "checkpoints/last.ckpt")["global_step"] == step > 0
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)
