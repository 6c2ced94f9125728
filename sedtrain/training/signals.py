"""What a signal does to a training: Ctrl-C and SIGTERM end it with a checkpoint, SIGUSR1 only has one written."""

import logging
import os
import signal
from pathlib import Path
from types import FrameType

import lightning

from sedtrain.training.checkpoints import Checkpoints, Stopped
from sedtrain.training.progress import ProgressBar

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
REQUEUE = signal.SIGUSR2  # as submitit has SLURM send it before a job is ended


class StopOnInterrupt(lightning.Callback):
    """Ctrl-C or SIGTERM ends training after the current step, with a checkpoint; the second Ctrl-C ends the command at once.

    SIGUSR1 has a checkpoint written after the current step, and training goes on. A signal to one rank is one to all.
    Where a launcher waits for REQUEUE, that ends training in the same way before it is the launcher's turn, which has
    SIGTERM announce it: then that has only a checkpoint written.
    Lightning's teardown puts back what signals did before, when the last checkpoint is written.
    """

    def __init__(self) -> None:
        self.stopped_by: signal.Signals | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Keeps Lightning from requeueing a job of SLURM by itself, which it does where nobody cares for SIGUSR1."""
        if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:  # in a job of submitit, or without the command
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        launched = callable(signal.getsignal(REQUEUE))
        self.of_another_rank = REQUEUE if launched else signal.SIGTERM
        only_save = {signal.SIGUSR1, signal.SIGTERM} if launched else {signal.SIGUSR1}
        checkpoints = next(each for each in trainer.checkpoint_callbacks if isinstance(each, Checkpoints))

        def receive(number: int, frame: FrameType | None) -> None:
            received = signal.Signals(number)
            checkpoints.due = True
            if received in only_save:
                return
            if received is signal.SIGINT and self.stopped_by:
                end_at_once(trainer, checkpoints)
            self.stopped_by, checkpoints.stop = received, True
            again = "; press Ctrl-C again to stop at once" if received is signal.SIGINT else ""
            logger.info("stopping after this step, or the validation under way, and saving a checkpoint%s", again)

        for each in (*SIGNALS, *([REQUEUE] if launched else [])):
            signal.signal(each, receive)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, Stopped) and self.stopped_by is None:
            self.stopped_by = self.of_another_rank


def end_at_once(trainer: lightning.Trainer, checkpoints: Checkpoints) -> None:
    """Says where things stand and ends the process with status 130: an exception would wait for what is under way."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ProgressBar):
            callback.stop()
    kept = sorted(str(path) for path in Path(str(checkpoints.dirpath)).glob("*.ckpt"))
    if trainer.is_global_zero:
        saved = f"saved before: {', '.join(kept)}" if kept else "nothing is saved yet"
        logger.error("interrupted at step %d; %s", trainer.global_step, saved)
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(signal.SIGTERM)
    os._exit(130)
