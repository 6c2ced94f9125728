"""One training, connected: what a person is told before it starts, and what is kept at its end."""

import contextlib
import logging
import math
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Timer

from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.data.sampler import BatchesWithEpoch
from sedtrain.errors import UserError
from sedtrain.evaluation.results import TrainingTotals
from sedtrain.models.saved import SavedModel
from sedtrain.run_dir import checkpoints_of
from sedtrain.training.averaging import AverageBest, mean_weights
from sedtrain.training.checkpoints import Checkpoints, Stopped, is_whole, newest_whole, read_checkpoint
from sedtrain.training.finetune import FineTuning, PartPlan
from sedtrain.training.module import SpeechSeq2SeqModule
from sedtrain.training.progress import ProgressBar
from sedtrain.training.signals import StopOnInterrupt
from sedtrain.training.strategies import end_others, rejoin

logger = logging.getLogger(__name__)


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
            "batches": f"{self.data.batch_sizes()}{in_an_epoch}",
            "steps": self.planned_steps(),
            "vocabulary": f"{len(self.saved.tokenizer):,} tokens",
            "ctc weight": f"{self.module.weights.ctc_weight:g}",
            "run folder": str(self.folder),
        }
        return parts, facts

    def planned_steps(self) -> str:
        """For people: how many steps there are, and what may end them earlier, of which the learning rate knows nothing."""
        told = f"{self.num_steps():,}"
        if self.num_batches is None and (self.trainer.max_epochs or -1) >= 0:
            told += f", or {self.trainer.max_epochs:,} epochs if they end first"
            logger.warning(
                "the learning rate is planned for trainer.max_steps=%d: nobody knows how many steps an epoch of a stream, "
                "or of a weighted mix, has, and trainer.max_epochs=%d may end training long before, even in warm-up",
                self.trainer.max_steps,
                self.trainer.max_epochs,
            )
        return told + (f", at most {self.time_limit()}" if self.time_limit() else "")

    @cached_property
    def num_batches(self) -> int | None:
        """Of an epoch, before they are shared among the devices; None where nobody knows."""
        return len(self.data.train_dataloader()) if self.data.corpus.has_length() else None

    def num_rank_batches(self) -> int | None:
        """Those of an epoch that every device takes, and `trainer.limit_train_batches` lets it; None where nobody knows."""
        if self.num_batches is None:
            return None
        batches, limit = self.data.train_batches, self.trainer.limit_train_batches
        assert isinstance(batches, BatchesWithEpoch)
        number = batches.num_steps(self.trainer.world_size)
        return min(number, limit) if isinstance(limit, int) else int(number * limit)

    def num_steps(self) -> int:
        """Optimizer steps until the end of training, by `max_steps` or `max_epochs`, whichever comes first.

        Raises UserError where nobody knows.
        """
        limits = [self.trainer.max_steps] if self.trainer.max_steps >= 0 else []
        epochs, batches = self.trainer.max_epochs, self.num_rank_batches()
        if epochs is not None and epochs >= 0 and batches is not None:
            limits.append(epochs * math.ceil(batches / self.trainer.accumulate_grad_batches))
        if not limits:
            raise UserError(
                "trainer.max_steps=-1: nobody knows how many steps an epoch of a stream, or of a weighted mix, has",
                "trainer.max_steps=NUMBER",
            )
        return min(limits)

    def time_limit(self) -> str | None:
        timers = [callback for callback in self.callbacks if isinstance(callback, Timer)]
        return str(timedelta(seconds=timers[0].time_remaining() or 0)) if timers else None

    def fit(self, start: Path | None) -> None:
        """Trains, from the checkpoint `start` where there is one; returns also where training was asked to stop."""
        if start:
            self.refuse_other_model(start)
        rejoin(self.trainer.strategy)
        try:
            with contextlib.suppress(Stopped):
                self.trainer.fit(self.module, datamodule=self.data, ckpt_path=start, weights_only=True)
        except Exception as error:
            end_others(self.trainer.strategy)
            if (first := user_error_behind(error)) and "iter(combined_loader)" in str(error):
                raise first from None  # Lightning's teardown fails where workers have not begun, and hides what stopped them
            raise

    def refuse_other_model(self, start: Path) -> None:
        """Raises UserError where a checkpoint has not the weights of this model, or trains others of them."""
        checkpoint = read_checkpoint(start)
        there, here = checkpoint["state_dict"], self.module.state_dict()
        names = there.keys() ^ here.keys()
        names |= {name for name in there.keys() & here.keys() if there[name].shape != here[name].shape}
        if names:
            first = ", ".join(sorted(names)[:3])
            raise UserError(
                f"{start}: this checkpoint is of another model: {len(names)} weights differ in name or shape ({first}, ...)",
                "the encoder.*, decoder.*, adapter.*, loss.* and data.* that it was trained with",
            )
        optimizer, _ = self.module.optimizer_and_schedule(num_steps=1)
        if groups_of(checkpoint["optimizer_states"][0]) != groups_of(optimizer.state_dict()):
            raise UserError(
                f"{start}: this checkpoint trains other weights, or with another optimizer",
                "the optimizer.* and finetune.* that it was trained with",
            )

    @property
    def checkpoints(self) -> Checkpoints:
        return next(each for each in self.callbacks if isinstance(each, Checkpoints))

    def load_best(self) -> None:
        """Takes the weights of the best validation, else the last, in float32 whatever the training was in."""
        weights = mean_weights(read_checkpoint(path)["state_dict"] for path in self.best_paths())
        self.saved.model.load_state_dict({name.removeprefix("model."): each for name, each in weights.items()})
        self.saved.model.float()
        self.finetuning.finish(self.saved.model)

    def best_paths(self) -> list[Path]:
        """The checkpoints that the final weights are the mean of: the best, or those of an average that is on."""
        averages = [path for each in self.callbacks if isinstance(each, AverageBest) for path in each.paths]
        best = self.checkpoints.best_model_path
        chosen = averages or ([Path(best)] if best else [])
        whole = [path for path in chosen if path.is_file() and is_whole(path)]
        for path in set(chosen) - set(whole):
            logger.warning("%s is missing or damaged, and left out of the final weights", path)
        return whole or [self.last()]

    def last(self) -> Path:
        """The newest checkpoint that is whole. Raises UserError where there is none."""
        last = newest_whole(checkpoints_of(str(self.folder)))
        if last is None:
            raise UserError(
                "no step was made: the training starts where it is to end",
                "trainer.max_steps=MORE, or trainer.max_epochs=MORE",
            )
        return last

    def stopped_by(self) -> int | None:
        """The number of the signal that asked training to stop, SIGTERM where another rank received it."""
        for callback in self.callbacks:
            if isinstance(callback, StopOnInterrupt) and callback.stopped_by:
                return int(callback.stopped_by)
        return int(signal.SIGTERM) if self.checkpoints.stopped else None

    def totals(self) -> TrainingTotals | None:
        """What training consumed, as the progress bar counted it."""
        for callback in self.callbacks:
            if isinstance(callback, ProgressBar):
                return callback.totals()
        return None


def user_error_behind(error: BaseException) -> UserError | None:
    """The UserError that was being handled, or that was the cause, when `error` was raised."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, UserError):
        behind = behind.__cause__ or behind.__context__
    return behind


def groups_of(optimizer_state: Mapping[str, Any]) -> list[tuple[int, set[str]]]:
    """Of each group of an optimizer's parameters, how many they are and what options they have."""
    return [(len(group["params"]), set(group)) for group in optimizer_state["param_groups"]]
