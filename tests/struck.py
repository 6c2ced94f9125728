"""Two runs in one launch: one is left alone, in the other a rank is killed with SIGKILL.

    torchrun --nproc-per-node 2 --max-restarts 3 tests/struck.py FOLDER OVERRIDES

Their folders are FOLDER/never and FOLDER/killed; FOLDER/struck lists what happened.
"""

import os
import signal
import sys
import time
from pathlib import Path

import lightning
import torch

from sedtrain.__main__ import main

RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


class Struck(lightning.Callback):
    """Sends one rank a signal in the middle of a step, once. After a restart the first rank arrives last."""

    def __init__(self, file: str, rank: int, step: int, number: int = int(signal.SIGKILL)) -> None:
        self.file, self.rank, self.step, self.number = Path(file), rank, step, number
        if RESTARTS and os.environ["RANK"] == "0":
            time.sleep(1)

    def tell(self, what):
        with self.file.open("a") as file:
            file.write(f"{what}, restarts {RESTARTS}\n")

    def on_before_backward(self, trainer, *_):
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step) and not self.file.exists():
            self.tell("struck")
            os.kill(os.getpid(), self.number)

    def on_train_end(self, trainer, *_):
        if trainer.global_rank == self.rank:
            self.tell("ended")


if __name__ == "__main__":
    folder, *overrides = sys.argv[1:]
    os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache {os.environ['RANK']}"
    torch.set_num_threads(1)
    struck = [
        f"+callbacks.struck.{each}" for each in ("_target_=struck.Struck", f"file={folder}/struck", "rank=1", "step=5")
    ]
    for name in ("never", "killed"):
        sys.argv = ["sedtrain", *overrides, f"run_dir={folder}/{name}", *(struck if name == "killed" else [])]
        main()
