"""A training run: its Trainer, its plan as text, its number of steps, `fit`, and its final weights."""

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Timer

from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.data.dataset import BatchesWithEpoch
from sedtrain.decoding.collator import frames_per_second
from sedtrain.errors import UserError
from sedtrain.evaluation.results import TrainingTotals
from sedtrain.models.packing import fate_of_padding
from sedtrain.models.prefix import is_prefixed
from sedtrain.models.saved import SavedModel
from sedtrain.run_dir import checkpoints_of
from sedtrain.training.averaging import AverageBest, mean_weights
from sedtrain.training.checkpoint_files import is_intact, newest_whole, read_checkpoint
from sedtrain.training.checkpoints import NEVER, Checkpoints, Stopped, ValidateEvery
from sedtrain.training.finetune import FineTuning, PartPlan
from sedtrain.training.module import SpeechSeq2SeqModule
from sedtrain.training.progress import ProgressBar
from sedtrain.training.signals import StopOnInterrupt
from sedtrain.training.strategies import end_others, rejoin, tensor_float32
from sedtrain.training.tracking import Tracker, Tracking, callbacks_of
from sedtrain.training.utilization import Utilization

logger = logging.getLogger(__name__)

T = TypeVar("T")


def run_trainer(
    make: Callable[..., Trainer],
    settings: Mapping[str, Any],
    callbacks: Mapping[str, Callback | partial[Callback]],
    loggers: Sequence[Tracker],
    finetuning: FineTuning,
    metric: str,
    mode: str,
) -> Trainer:
    """The Trainer with the options of `trainer`, the callbacks, and the arguments that other options decide.

    make:      builds a Trainer with the options of `trainer`
    settings:  the whole configuration as plain values
    callbacks: by name; a partial takes the metric to monitor and its mode, max or min
    Raises UserError if nothing ends the training.
    """
    named = {
        name: callback(monitor=f"val/{metric}", mode=mode) if isinstance(callback, partial) else callback
        for name, callback in callbacks.items()
    }
    checkpoints = named.pop("checkpoints")  # comes last, to save the state of all others
    steps = settings["trainer"].get("val_check_interval")  # Lightning itself handles durations
    every = [ValidateEvery(steps)] if isinstance(steps, int) else []
    bars = [callback for callback in named.values() if isinstance(callback, ProgressBar)]
    shows_progress = settings["trainer"].get("enable_progress_bar") is not False
    for bar in [] if shows_progress else bars:
        bar.disable()  # stays among the callbacks, since it also counts
    trainer = make(
        default_root_dir=settings["run_dir"],
        callbacks=[*named.values(), *every, Tracking(settings), Utilization(), finetuning, checkpoints],
        logger=list(loggers) or False,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=shows_progress or bool(bars),
        **({"val_check_interval": NEVER} if every else {}),
    )
    if trainer.max_steps == -1 and trainer.max_epochs in (None, -1):
        wrong = "nothing ends this training, so its learning rate cannot be planned"
        write = "write trainer.max_steps=NUMBER or trainer.max_epochs=NUMBER"
        raise UserError("trainer.max_steps", -1, wrong, write)
    return trainer


@dataclass(frozen=True)
class TrainingRun:
    """The connected components of one run."""

    trainer: Trainer
    module: SpeechSeq2SeqModule
    data: SpeechTextDataModule
    saved: SavedModel
    finetuning: FineTuning
    folder: Path

    def callbacks(self, kind: type[T]) -> list[T]:
        return callbacks_of(self.trainer, kind)

    def plan(self) -> tuple[list[PartPlan], dict[str, str]]:
        """The plan of each part of the model, and named facts of the run, to show before training starts."""
        optimizer, _ = self.module.optimizer_and_schedule(num_steps=1)
        parts = self.finetuning.plan(self.saved.model, optimizer)
        per_epoch = "" if self.num_batches is None else f", {self.num_batches:,} in an epoch"
        execution = self.module.execution
        facts = {
            "training audio": self.data.corpus.training_audio(),
            "batches": f"{self.data.batch_sizes()}{per_epoch}",
            "steps": self.planned_steps(),
            "best weights": f"by {self.callbacks(Checkpoints)[0].monitor}",
            "vocabulary": f"{len(self.saved.tokenizer):,} tokens",
            "padding": fate_of_padding(self.saved.model.encoder, execution.packing, execution.backend),
            "ctc weight": f"{self.module.weights.ctc_weight:g}",
            "run folder": str(self.folder),
        }
        if is_prefixed(self.saved.model.config.decoder):
            facts["prefix"] = f"{frames_per_second(self.saved):.3g} frames a second"
        return parts, facts

    def planned_steps(self) -> str:
        """Planned optimizer steps as text, with any limit that may stop training earlier."""
        steps = f"{self.num_steps():,}"
        if self.num_batches is None and (self.trainer.max_epochs or -1) >= 0:
            steps += f", or {self.trainer.max_epochs:,} epochs if they end first"
            text = "the learning rate is planned for trainer.max_steps=%d, since an epoch of a stream or of a weighted mix has "
            text += "an unknown number of steps; trainer.max_epochs=%d may end training long before, even in warm-up"
            logger.warning(text, self.trainer.max_steps, self.trainer.max_epochs)
        left = self.seconds_left()
        return steps if left is None else f"{steps}, at most {timedelta(seconds=left)}"

    @cached_property
    def num_batches(self) -> int | None:
        """Batches in an epoch on all devices together; None if unknown."""
        return len(self.data.train_dataloader()) if self.data.corpus.has_length() else None

    def num_rank_batches(self) -> int | None:
        """Batches in an epoch on each device, within `trainer.limit_train_batches`; None if unknown."""
        if self.num_batches is None:
            return None
        batches, limit = self.data.train_batches, self.trainer.limit_train_batches
        assert isinstance(batches, BatchesWithEpoch)
        number = batches.num_steps(self.trainer.world_size)
        return min(number, limit) if isinstance(limit, int) else int(number * limit)

    def num_steps(self) -> int:
        """Optimizer steps of the whole training: the earlier end of `max_steps` and `max_epochs`.

        Raises UserError if that is unknown.
        """
        limits = [self.trainer.max_steps] if self.trainer.max_steps >= 0 else []
        epochs, batches = self.trainer.max_epochs, self.num_rank_batches()
        if epochs is not None and epochs >= 0 and batches is not None:
            limits.append(epochs * math.ceil(batches / self.trainer.accumulate_grad_batches))
        if not limits:
            wrong = "the number of steps in an epoch of a stream, or of a weighted mix, is unknown"
            raise UserError("trainer.max_steps", -1, wrong, "write trainer.max_steps=NUMBER")
        return min(limits)

    def seconds_left(self) -> float | None:
        """Time left of `trainer.max_time`; None without that limit."""
        timers = self.callbacks(Timer)
        return timers[0].time_remaining() if timers else None

    def ended_early(self) -> str | None:
        """A sentence if `trainer.max_time` ended training before its last step, else None."""
        left = self.seconds_left()
        if left is None or left > 0 or self.trainer.global_step >= self.num_steps():
            return None
        return f"trainer.max_time ended training at step {self.trainer.global_step:,} of {self.num_steps():,}"

    def fit(self, start: Path | None) -> None:
        """Trains, from the checkpoint `start` if given; returns also when a signal stops training."""
        if start:
            self.refuse_other_model(start)
        rejoin(self.trainer.strategy)
        try:
            with contextlib.suppress(Stopped), tensor_float32(self.trainer.strategy.root_device):
                self.trainer.fit(self.module, datamodule=self.data, ckpt_path=start, weights_only=True)
        except Exception:
            end_others(self.trainer.strategy)
            raise

    def refuse_other_model(self, start: Path) -> None:
        """Raises UserError for a checkpoint with other weights than this model, or other trained weights."""
        checkpoint = read_checkpoint(start, mapped=True)
        states = (self.module.state_dict(), checkpoint["state_dict"])
        shapes, checkpoint_shapes = ({name: weight.shape for name, weight in state.items()} for state in states)
        if names := {name for name, _ in shapes.items() ^ checkpoint_shapes.items()}:
            first = ", ".join(sorted(names)[:3])
            wrong = f"this checkpoint is of another model: {len(names)} weights differ in name or shape ({first}, ...)"
            instead = "write the encoder.*, decoder.*, adapter.*, loss.* and data.* that it was trained with"
            raise UserError("resume", str(start), wrong, instead)
        optimizer, _ = self.module.optimizer_and_schedule(num_steps=1)
        if groups_of(checkpoint["optimizer_states"][0]) != groups_of(optimizer.state_dict()):
            wrong = "the run of this checkpoint trained other weights, or with another optimizer"
            instead = "write the optimizer.* and finetune.* that it was trained with"
            raise UserError("resume", str(start), wrong, instead)

    def load_best(self) -> None:
        """Loads the weights of the best validation (without one, the last weights), in float32 after any precision."""
        weights = mean_weights(read_checkpoint(path, mapped=True)["state_dict"] for path in self.best_paths())
        self.saved.model.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()})
        self.saved.model.float()
        self.finetuning.finish(self.saved.model)

    def best_paths(self) -> list[Path]:
        """Checkpoints whose mean gives the final weights: those of `callbacks.average`, else the best, else the last."""
        averages = [path for average in self.callbacks(AverageBest) for path in average.paths]
        best = self.callbacks(Checkpoints)[0].best_model_path
        chosen = averages or ([Path(best)] if best else [])
        whole = [path for path in chosen if path.is_file() and is_intact(path)]
        for path in set(chosen) - set(whole):
            logger.warning("%s is missing or damaged, so it is left out of the final weights", path)
        return whole or [self.last()]

    def last(self) -> Path:
        """The newest whole checkpoint. Raises UserError if there is none."""
        last = newest_whole(checkpoints_of(str(self.folder)))
        if last is None:
            wrong = "training made no step: it starts at the step where it ends"
            instead = "write trainer.max_steps=MORE, or trainer.max_epochs=MORE"
            raise UserError("trainer.max_steps", self.trainer.max_steps, wrong, instead)
        return last

    def stopped_by(self) -> int | None:
        """Number of the signal that stopped training (SIGTERM if another rank received it); None without a signal."""
        return next((int(stop.stopped_by) for stop in self.callbacks(StopOnInterrupt) if stop.stopped_by), None)

    def totals(self) -> TrainingTotals | None:
        """Time, steps and audio of training, counted by the progress bar; None without it."""
        bars = self.callbacks(ProgressBar)
        ended_by = "trainer.max_time" if self.ended_early() else None
        return replace(bars[0].totals(), planned_steps=self.num_steps(), ended_by=ended_by) if bars else None


def groups_of(optimizer_state: Mapping[str, Any]) -> list[tuple[int, set[str]]]:
    """Number of parameters and names of options of each parameter group."""
    return [(len(group["params"]), set(group)) for group in optimizer_state["param_groups"]]
