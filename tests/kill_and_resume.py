"""Kills a run with SIGKILL at random moments and resumes it until it is finished; it must equal a run that is never killed.

    python tests/kill_and_resume.py --kills 30 --seed 0 data.num_workers=2

Overrides of the run follow. Prints the step and moment of each kill; ends with status 1 if anything differs.
"""

import argparse
import csv
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import lightning
import torch
from forked import Forked

from sedtrain.training.checkpoint_files import is_intact, read_checkpoint

MOMENTS = ("loading", "forward", "backward", "update", "validating", "writing")
SHORT = [
    "trainer.max_steps=100", "trainer.max_time=null", "trainer.val_check_interval=10", "trainer.log_every_n_steps=1",
    "callbacks.checkpoints.every_steps=2", "decoding.max_new_tokens=5", "data.batch_seconds=6", "data.num_workers=2",
    "encoder.tiny.hidden_dropout=0.1", "decoder.tiny.hidden_dropout_prob=0.1", "augment=[speed,gain]",
]  # fmt: skip
TOO_LONG_SECONDS = 300


class Tell(lightning.Callback):
    """Writes the current step and moment of the run into a file, as `step moment`."""

    def __init__(self, file: str) -> None:
        self.descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)

    def tell(self, trainer, moment):
        os.pwrite(self.descriptor, f"{trainer.global_step} {moment}".ljust(24).encode(), 0)

    def on_train_batch_start(self, trainer, *_):
        self.tell(trainer, "forward")

    def on_before_backward(self, trainer, *_):
        self.tell(trainer, "backward")

    def on_after_backward(self, trainer, *_):
        self.tell(trainer, "update")

    def on_train_batch_end(self, trainer, *_):
        self.tell(trainer, "loading")

    def on_validation_start(self, trainer, *_):
        self.tell(trainer, "validating")

    def on_validation_end(self, trainer, *_):
        self.tell(trainer, "loading")


def start(run, overrides, file):
    """Starts a run in a session of its own, so that its workers can be killed with it."""
    told = ["+callbacks.tell._target_=kill_and_resume.Tell", f"+callbacks.tell.file={file}"] if file else []
    return Forked(run.parent, *SHORT, *overrides, f"run_dir={run}", "resume=auto", *told)


def finish(run, overrides):
    """Runs to the end."""
    training = start(run, overrides, None)
    assert training.wait(TOO_LONG_SECONDS) == 0, training.err


def told(run, file):
    """The current step and moment of the run, (-1, "") before its first step."""
    if any((run / "checkpoints").glob("*.unfinished")):
        step, _, _ = file.read_text().partition(" ")
        return int(step or -1), "writing"
    step, _, moment = file.read_text().strip().partition(" ")
    return int(step or -1), moment


def kill_once(run, overrides, draw, moment):
    """Starts or resumes the run and kills it at `moment` some steps later; (step, moment), or None if it finished."""
    file = run.with_suffix(".moment")
    file.write_text("")
    for unfinished in (run / "checkpoints").glob("*.unfinished"):
        unfinished.unlink()  # left by the kill before: it would be taken for one being written
    training = start(run, overrides, file)
    steps_later, delay, first = draw.randrange(5), draw.random() / 50, None
    deadline = time.monotonic() + TOO_LONG_SECONDS
    while training.poll() is None:
        assert time.monotonic() < deadline, f"stuck: {training.err}"
        step, now = told(run, file)
        first = step if first is None and step >= 0 else first
        if first is not None and ((step - first >= steps_later and now == moment) or step - first >= 12):
            time.sleep(delay)
            os.kill(training.pid, signal.SIGKILL)  # its workers find out by themselves
            training.wait()
            struck = told(run, file)
            training.kill()
            return struck if training.returncode == -signal.SIGKILL else None
        time.sleep(0.0005)
    assert training.returncode == 0, training.err
    return None


def whole_checkpoints(run):
    """Whether every file under the name of a checkpoint is whole."""
    return all(map(is_intact, (run / "checkpoints").glob("*.ckpt")))


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def differences(run, other):
    """The files and parts of two finished runs that are not equal bit by bit."""
    for name in ("last.ckpt", "best.ckpt"):
        here, there = (read_checkpoint(each / "checkpoints" / name) for each in (run, other))
        for part in (here.keys() | there.keys()) - {"callbacks"}:
            if not equal(here.get(part), there.get(part)):
                yield f"{name}: {part}"
    if (run / "model/model.safetensors").read_bytes() != (other / "model/model.safetensors").read_bytes():
        yield "model.safetensors"
    rows = [list(csv.DictReader((each / "metrics.csv").read_text().splitlines())) for each in (run, other)]
    if rows[0] != rows[1]:
        yield f"metrics.csv: {len(rows[0])} and {len(rows[1])} rows"
    results = [json.loads((each / "results.json").read_text()) for each in (run, other)]
    for part in ("metrics", "skipped"):
        if results[0][part] != results[1][part]:
            yield f"results.json: {part}"
    if any(results[0]["train"][part] != results[1]["train"][part] for part in ("steps", "utterances")):
        yield "results.json: train"


def kill_and_resume(folder, kills, seed, overrides, moments=MOMENTS):
    """The folders of a run that is never killed and of one that is, and (step, moment) of each kill."""
    never, killed = folder / "never_killed", folder / "killed"
    finish(never, overrides)
    draw, struck = random.Random(seed), []
    for number in range(kills):
        moment = kill_once(killed, overrides, draw, draw.choice(moments))
        if moment is None:
            break
        struck.append(moment)
        print(f"kill {number + 1}: step {moment[0]}, {moment[1]}", flush=True)
        assert whole_checkpoints(killed), "a checkpoint is damaged"
    finish(killed, overrides)
    return never, killed, struck


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the runs, which are kept; else a temporary one")
    parser.add_argument("overrides", nargs="*", help="of the run, such as trainer.max_steps=200")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        never, killed, struck = kill_and_resume(folder, asked.kills, asked.seed, asked.overrides)
        found = list(differences(killed, never))
    counts = {moment: sum(each == moment for _, each in struck) for moment in MOMENTS}
    print(f"seed {asked.seed}: {len(struck)} kills, {counts}")
    print("different: " + ", ".join(found) if found else "all is equal bit by bit")
    sys.exit(bool(found) or len(struck) < asked.kills)


if __name__ == "__main__":
    main()
