"""Signals during training: Ctrl-C and SIGTERM write a checkpoint and stop, SIGUSR1 only writes one."""

import logging
import os
import signal
from pathlib import Path
from types import FrameType

from lightning import Callback, LightningModule, Trainer

from sedtrain.training.checkpoints import Checkpoints, Stopped
from sedtrain.training.progress import ProgressBar
from sedtrain.training.tracking import callbacks_of

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
REQUEUE = signal.SIGUSR2  # submitit has SLURM send it shortly before a job's time limit


class StopOnInterrupt(Callback):
    """Ctrl-C or SIGTERM writes a checkpoint after the current step and stops; a second Ctrl-C ends the command at once.

    SIGUSR1 writes a checkpoint after the current step, and training continues. A signal to one rank acts on all.
    If a launcher such as submitit handles REQUEUE, that signal writes a checkpoint and stops; then the launcher requeues
    the job. SIGTERM only announces this, so it acts like SIGUSR1 there.
    Lightning restores the earlier handlers after the last checkpoint.
    """

    def __init__(self) -> None:
        self.stopped_by: signal.Signals | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ignores SIGUSR1 if it has no handler: Lightning would otherwise install its own, which requeues a SLURM job."""
        if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        launched = callable(signal.getsignal(REQUEUE))
        self.signal_of_other_ranks = REQUEUE if launched else signal.SIGTERM
        only_save = {signal.SIGUSR1, signal.SIGTERM} if launched else {signal.SIGUSR1}
        checkpoints = callbacks_of(trainer, Checkpoints)[0]

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

        for number in (*SIGNALS, *([REQUEUE] if launched else [])):
            signal.signal(number, receive)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Stopped) and self.stopped_by is None:
            self.stopped_by = self.signal_of_other_ranks


def end_at_once(trainer: Trainer, checkpoints: Checkpoints) -> None:
    """Names the saved checkpoints and ends the process with status 130; an exception would wait for the current step."""
    for bar in callbacks_of(trainer, ProgressBar):
        bar.stop()
    kept = sorted(str(path) for path in Path(str(checkpoints.dirpath)).glob("*.ckpt"))
    if trainer.is_global_zero:
        saved = f"saved before: {', '.join(kept)}" if kept else "nothing is saved yet"
        logger.error("interrupted at step %d; %s", trainer.global_step, saved)
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(signal.SIGTERM)
    os._exit(130)
