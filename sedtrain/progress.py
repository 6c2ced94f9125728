"""What a person sees while a model trains: one bar for the whole run, or log lines where there is no terminal."""

import logging
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sedtrain.batch import Batch
from sedtrain.evaluation.results import TrainingTotals

logger = logging.getLogger(__name__)


class ProgressBar(lightning.pytorch.callbacks.ProgressBar):
    """Shows steps, loss, the validation score, audio-seconds per second and time left; counts what training consumed.

    log_every_seconds: without a terminal, how often a line is written to the log instead
    """

    def __init__(self, log_every_seconds: float = 20.0) -> None:
        super().__init__()
        self.log_every_seconds = log_every_seconds
        self.steps = self.utterances = 0
        self.audio_seconds = self.seconds = self.validation_seconds = 0.0
        self.bar: Progress | None = None
        self.enabled = True

    def disable(self) -> None:
        """Nothing is shown, but all is counted; called by Lightning on every rank but the first."""
        self.enabled = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.started = self.last_line = time.perf_counter()
        self.total = int(trainer.estimated_stepping_batches)
        console = Console(stderr=True)
        if console.is_terminal and self.enabled:
            self.bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[scores]}"),
                console=console,
                expand=True,
            )
            self.task = self.bar.add_task("training", total=self.total, completed=trainer.global_step, scores="")
            self.bar.start()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self.utterances += len(batch) * trainer.world_size
        self.audio_seconds += batch.seconds * trainer.world_size
        self.seconds = time.perf_counter() - self.started
        self.steps = trainer.global_step
        if self.bar is not None:
            self.bar.update(self.task, completed=trainer.global_step, scores=self.scores(trainer))
        elif self.enabled and time.perf_counter() - self.last_line > self.log_every_seconds:
            self.last_line = time.perf_counter()
            logger.info("step %d of %d  %s", trainer.global_step, self.total, self.scores(trainer))

    def scores(self, trainer: lightning.Trainer) -> str:
        """The latest values, as `loss 1.234  wer 12.3 %  85 s/s`."""
        latest = trainer.callback_metrics
        words = [f"loss {latest['train/loss']:.3f}"] if "train/loss" in latest else []
        for name in ("wer", "bleu"):
            if f"val/{name}" in latest:
                words.append(f"{name} {100 * latest[f'val/{name}']:.1f} %")
        return "  ".join([*words, f"{self.totals().audio_seconds_per_second:.0f} s/s"])

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.validation_started = time.perf_counter()
        if self.bar is not None:
            self.bar.update(self.task, description="validating")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.validation_seconds += time.perf_counter() - self.validation_started
        if self.bar is not None:
            self.bar.update(self.task, description="training")
        values = {
            name: f"{float(value):.4f}" for name, value in trainer.callback_metrics.items() if name.startswith("val/")
        }
        logger.debug("step %d  %s", trainer.global_step, "  ".join(f"{name} {value}" for name, value in values.items()))

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.seconds = time.perf_counter() - self.started
        self.stop()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self.stop()

    def totals(self) -> TrainingTotals:
        """Wall-clock seconds with validation; audio seconds per second of training alone."""
        training_seconds = max(self.seconds - self.validation_seconds, 1e-9)
        return TrainingTotals(self.seconds, self.steps, self.utterances, self.audio_seconds / training_seconds)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class Checkpoints(ModelCheckpoint):
    """Writes `best.ckpt` by a validation metric and `last.ckpt` at every validation and at the end of training."""

    def __init__(self, dirpath: str, monitor: str, mode: str) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_last=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        trainer.save_checkpoint(f"{self.dirpath}/last.ckpt")


class StopOnInterrupt(lightning.Callback):
    """The first Ctrl-C ends training after the current step, with a checkpoint; the second ends the command at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self.before: Any = signal.SIG_DFL

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        def interrupt(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                end_at_once(trainer)
            self.interrupted = True
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # no validation on the way out
            logger.info(
                "stopping after this step, or the validation under way, and saving a checkpoint; "
                "press Ctrl-C again to stop at once"
            )

        self.before = signal.signal(signal.SIGINT, interrupt)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        signal.signal(signal.SIGINT, self.before)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        if self.before is not signal.SIG_DFL:
            signal.signal(signal.SIGINT, self.before)


def end_at_once(trainer: lightning.Trainer) -> None:
    """Says where things stand and ends the process with status 130: an exception would wait for what is under way."""
    kept: list[str] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ProgressBar):
            callback.stop()
        if isinstance(callback, Checkpoints):
            kept = sorted(str(path) for path in Path(callback.dirpath or "").glob("*.ckpt"))
    if trainer.is_global_zero:
        saved = f"saved at the last validation: {', '.join(kept)}" if kept else "nothing is saved yet"
        logger.error("interrupted at step %d; %s", trainer.global_step, saved)
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(signal.SIGTERM)
    os._exit(130)
