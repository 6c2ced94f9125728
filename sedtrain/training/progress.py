"""What a person sees while a model trains: one bar for the whole run, or log lines where there is no terminal."""

import logging
import time
from typing import Any, NamedTuple

import lightning
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sedtrain.batch import Batch
from sedtrain.evaluation.results import TrainingTotals

logger = logging.getLogger(__name__)

COUNTED = ("steps", "utterances", "audio_seconds", "seconds", "validation_seconds")


class Consumed(NamedTuple):
    """What a rank has trained on."""

    utterances: int = 0
    audio_seconds: float = 0.0


class ProgressBar(lightning.pytorch.callbacks.ProgressBar):
    """Shows steps, loss, the validation score, audio-seconds per second and time left; counts what training consumed.

    `utterances` and `audio_seconds` are of all ranks, `here` what this one has consumed since they were last summed.
    log_every_seconds: without a terminal, how often a line is written to the log instead
    """

    def __init__(self, log_every_seconds: float = 20.0) -> None:
        super().__init__()
        self.log_every_seconds = log_every_seconds
        self.steps = self.utterances = 0
        self.audio_seconds = self.seconds = self.validation_seconds = 0.0
        self.here = Consumed()
        self.bar: Progress | None = None
        self.enabled = True

    def disable(self) -> None:
        """Nothing is shown, but all is counted; called by Lightning on every rank but the first."""
        self.enabled = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.last_line = time.perf_counter()
        self.started = self.last_line - self.seconds  # of a run that goes on, all its parts
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
        self.here = Consumed(self.here.utterances + len(batch), self.here.audio_seconds + batch.seconds)
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
        audio_seconds = self.audio_seconds + self.here.audio_seconds * trainer.world_size  # about, until it is summed
        return "  ".join([*words, f"{audio_seconds / self.training_seconds():.0f} s/s"])

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
        self.sum_over_ranks(trainer)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """All ranks come here, before one writes."""
        self.sum_over_ranks(trainer)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def sum_over_ranks(self, trainer: lightning.Trainer) -> None:
        here = torch.tensor(self.here, dtype=torch.float32, device=trainer.strategy.root_device)
        utterances, audio_seconds = trainer.strategy.reduce(here, reduce_op="sum").tolist()
        self.utterances += round(utterances)
        self.audio_seconds += audio_seconds
        self.here = Consumed()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self.stop()

    def totals(self) -> TrainingTotals:
        """Wall-clock seconds with validation; audio seconds per second of training alone."""
        return TrainingTotals(self.seconds, self.steps, self.utterances, self.audio_seconds / self.training_seconds())

    def training_seconds(self) -> float:
        return max(self.seconds - self.validation_seconds, 1e-9)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in COUNTED}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Has a run that goes on count on."""
        for name in COUNTED:
            setattr(self, name, state_dict[name])

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
