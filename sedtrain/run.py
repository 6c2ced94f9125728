"""One training, connected: what a person is told before it starts, and what is kept at its end."""

import math
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Timer

from sedtrain.averaging import AverageBest, mean_weights
from sedtrain.batch import UserError
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.evaluation.results import TrainingTotals
from sedtrain.export import SavedModel
from sedtrain.finetune import FineTuning, PartPlan
from sedtrain.module import SpeechSeq2SeqModule
from sedtrain.progress import Checkpoints, ProgressBar, StopOnInterrupt


@dataclass(frozen=True)
class TrainingRun:
    """Everything that one training needs, connected."""

    trainer: lightning.Trainer
    module: SpeechSeq2SeqModule
    data: SpeechTextDataModule
    saved: SavedModel
    finetuning: FineTuning
    folder: Path

    @property
    def callbacks(self) -> list[lightning.Callback]:
        callbacks: list[lightning.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return callbacks

    def plan(self) -> tuple[list[PartPlan], dict[str, str]]:
        """What the parts of the model do, and what a person wants to know before training starts."""
        optimizer, _ = self.module.optimizer_and_schedule(num_steps=1)
        parts = self.finetuning.plan(self.saved.model, optimizer)
        in_an_epoch = "" if self.num_batches is None else f", {self.num_batches:,} in an epoch"
        facts = {
            "training audio": self.data.corpus.training_audio(),
            "batches": f"{self.data.batch_seconds:g} s of audio{in_an_epoch}",
            "steps": f"{self.num_steps():,}" + (f", at most {self.time_limit()}" if self.time_limit() else ""),
            "vocabulary": f"{len(self.saved.tokenizer):,} tokens",
            "ctc weight": f"{self.module.weights.ctc_weight:g}",
            "run folder": str(self.folder),
        }
        return parts, facts

    @cached_property
    def num_batches(self) -> int | None:
        """Of an epoch, before they are shared among the devices; None where nobody knows."""
        return len(self.data.train_dataloader()) if self.data.corpus.has_length() else None

    def num_steps(self) -> int:
        """Optimizer steps until the end of training, by `max_steps` or `max_epochs`, whichever comes first.

        Raises UserError where nobody knows.
        """
        limits = [self.trainer.max_steps] if self.trainer.max_steps >= 0 else []
        if self.trainer.max_epochs is not None and self.trainer.max_epochs >= 0 and self.num_batches is not None:
            batches = self.num_batches / self.trainer.world_size
            limits.append(self.trainer.max_epochs * math.ceil(batches / self.trainer.accumulate_grad_batches))
        if not limits:
            raise UserError(
                "trainer.max_steps=-1: nobody knows how many steps an epoch of a stream, or of a weighted mix, has",
                "trainer.max_steps=NUMBER",
            )
        return min(limits)

    def time_limit(self) -> str | None:
        timers = [callback for callback in self.callbacks if isinstance(callback, Timer)]
        return str(timedelta(seconds=timers[0].time_remaining() or 0)) if timers else None

    def load_best(self) -> None:
        """Takes the weights of the best validation, where there was one, in float32 whatever the training was in."""
        if paths := self.best_paths():
            states = (torch.load(path, map_location="cpu", weights_only=True)["state_dict"] for path in paths)
            self.module.load_state_dict(mean_weights(states))
        self.module.float()
        self.finetuning.finish(self.saved.model)

    def best_paths(self) -> list[Path]:
        """The checkpoints that the final weights are the mean of: the best, or those of an average that is on."""
        averages = [path for each in self.callbacks if isinstance(each, AverageBest) for path in each.paths]
        best = next(each.best_model_path for each in self.callbacks if isinstance(each, Checkpoints))
        return averages or ([Path(best)] if best else [])

    def interrupted(self) -> bool:
        return any(isinstance(each, StopOnInterrupt) and each.interrupted for each in self.callbacks)

    def totals(self) -> TrainingTotals | None:
        """What training consumed, as the progress bar counted it."""
        for callback in self.callbacks:
            if isinstance(callback, ProgressBar):
                return callback.totals()
        return None
