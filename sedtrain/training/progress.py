"""Progress of a run: a bar in a terminal, log lines elsewhere, and totals of time and audio."""

import logging
import time
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sedtrain.batch import Batch
from sedtrain.data.workers import Loader
from sedtrain.evaluation.metrics import METRICS
from sedtrain.evaluation.results import TrainingTotals
from sedtrain.ranges import Positive

logger = logging.getLogger(__name__)

COUNTED = ("steps", "utterances", "audio_seconds", "seconds", "validation_seconds")


class ProgressBar(LightningProgressBar):
    """Shows steps, loss, validation score, speed, data wait and time left; counts steps, utterances, audio and time.

    log_every_seconds: interval of log lines without a terminal
    utterances, audio_seconds: totals of all ranks at the last checkpoint; `unsummed` holds this rank's since then
    """

    def __init__(self, log_every_seconds: Positive = 20.0) -> None:
        super().__init__()
        self.log_every_seconds = log_every_seconds
        self.steps = self.utterances = 0
        self.audio_seconds = self.seconds = self.validation_seconds = 0.0
        self.unsummed = torch.zeros(2, dtype=torch.float64)  # utterances, seconds of audio
        self.bar: Progress | None = None
        self.enabled = True

    def disable(self) -> None:
        """Hides the bar, but keeps counting. Lightning calls this on every rank but the first."""
        self.enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last_line = time.perf_counter()
        self.started = self.last_line - self.seconds  # as if a resumed run had never stopped
        self.seconds_before = self.training_seconds()
        self.total = int(trainer.estimated_stepping_batches)
        console = Console(stderr=True)
        if console.is_terminal and self.enabled:
            done = TextColumn("[bold]{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn()
            left = TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[scores]}")
            self.bar = Progress(*done, *left, console=console, expand=True)
            self.task = self.bar.add_task("training", total=self.total, completed=trainer.global_step, scores="")
            self.bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, *_: Any) -> None:
        self.unsummed += torch.tensor([len(batch), batch.seconds], dtype=torch.float64)
        self.seconds = time.perf_counter() - self.started
        self.steps = trainer.global_step
        if self.bar is not None:
            self.bar.update(self.task, completed=trainer.global_step, scores=self.scores(trainer))
        elif self.enabled and time.perf_counter() - self.last_line > self.log_every_seconds:
            self.last_line = time.perf_counter()
            logger.info("step %d of %d  %s", trainer.global_step, self.total, self.scores(trainer))

    def scores(self, trainer: Trainer) -> str:
        """The latest values, such as `loss 1.234  wer 12.3 %  85 s/s  data wait 3 %`; the wait is this process's."""
        latest = trainer.callback_metrics
        words = [f"loss {latest['train/loss']:.3f}"] if "train/loss" in latest else []
        for name in [name for name in METRICS if f"val/{name}" in latest][:1]:
            words.append(f"{name} {100 * latest[f'val/{name}']:.1f} %")
        audio_seconds = self.audio_seconds + self.unsummed[1].item() * trainer.world_size  # an estimate until summed
        words.append(f"{audio_seconds / self.training_seconds():.0f} s/s")
        if isinstance(loader := trainer.train_dataloader, Loader):
            share = loader.waited / max(self.training_seconds() - self.seconds_before, 1e-9)
            words.append(f"data wait {100 * min(share, 1.0):.0f} %")
        return "  ".join(words)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validation_started = time.perf_counter()
        if self.bar is not None:
            self.bar.update(self.task, description="validating")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validation_seconds += time.perf_counter() - self.validation_started
        if self.bar is not None:
            self.bar.update(self.task, description="training")
        words = [f"{name} {value:.4f}" for name, value in trainer.callback_metrics.items() if name.startswith("val/")]
        logger.debug("step %d  %s", trainer.global_step, "  ".join(words))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = time.perf_counter() - self.started
        self.stop()
        self.sum_over_ranks(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Sums over the ranks; runs on all of them before the first writes."""
        self.sum_over_ranks(trainer)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def sum_over_ranks(self, trainer: Trainer) -> None:
        unsummed = self.unsummed.float().to(trainer.strategy.root_device)
        utterances, audio_seconds = trainer.strategy.reduce(unsummed, reduce_op="sum").tolist()
        self.utterances += round(utterances)
        self.audio_seconds += audio_seconds
        self.unsummed.zero_()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.stop()

    def totals(self) -> TrainingTotals:
        """Totals for results.json: the seconds include validation, the speed does not."""
        return TrainingTotals(self.seconds, self.steps, self.utterances, self.audio_seconds / self.training_seconds())

    def training_seconds(self) -> float:
        return max(self.seconds - self.validation_seconds, 1e-9)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in COUNTED}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the counts of a resumed run."""
        vars(self).update({name: state_dict[name] for name in COUNTED})

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
