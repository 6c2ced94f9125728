"""Decides when checkpoints are written and what they hold; a run resumes from one as if it had never stopped.

Checkpoints are always written between two optimizer steps: the next batch has arrived, but nothing of it is computed.
Then the validation, logs and learning rate of the last step are done, and no gradient is pending.
"""

import sys
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from torch.optim.lr_scheduler import LambdaLR

from sedtrain.errors import UserError
from sedtrain.ranges import Count, Positive
from sedtrain.run_dir import LAST
from sedtrain.training.averaging import EMA, OWN_WEIGHTS
from sedtrain.training.checkpoint_files import CheckpointFiles, random_state, set_aside_damaged, set_random_state
from sedtrain.training.strategies import gather_states
from sedtrain.training.tracking import callbacks_of, trackers

NEVER = sys.maxsize  # as `val_check_batch`: Lightning never validates


class ValidateEvery(Callback):
    """Validates every `num_steps` optimizer steps; a shorter run validates at its end.

    Lightning counts batches instead. The last step of an epoch may take fewer batches than the others, so its validations
    would fall between the batches of a step, and the checkpoint would hold other weights than were scored.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps, self.last_step = num_steps, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.num_steps = min(self.num_steps, int(min(trainer.estimated_stepping_batches, NEVER)))
        self.last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Sets `val_check_batch`: Lightning validates when its count of batches is a multiple of it."""
        is_due = trainer.global_step != self.last_step and trainer.global_step % self.num_steps == 0
        trainer.val_check_batch = 1 if is_due else NEVER
        self.last_step = trainer.global_step


class Stopped(Exception):
    """A signal stopped training early; the checkpoint is written."""


class Checkpoints(ModelCheckpoint):
    """Writes `best.ckpt` by a validation metric, and `last.ckpt` after every validation and at the end of training.

    every_steps, every_minutes, every_epochs: additional intervals for `last.ckpt`; None: no such interval
    due, stop: set by signals: write a checkpoint after the current step, and stop there
    """

    def __init__(
        self,
        dirpath: str,
        monitor: str,
        mode: str,
        every_steps: Count | None = None,
        every_minutes: Positive | None = None,
        every_epochs: Count | None = None,
    ) -> None:
        super().__init__(
            dirpath,
            "best",
            monitor,
            mode=mode,
            save_last=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        self.every_steps, self.every_minutes, self.every_epochs = every_steps, every_minutes, every_epochs
        self.due = self.validated = self.stop = self.ended = self.in_own_folder = False
        self.saved_step, self.saved_at = 0, time.monotonic()
        self.resumed: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        trainer.strategy.checkpoint_io = CheckpointFiles()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_different_starts(gather_states(trainer.global_step), str(self.dirpath))
        if trainer.is_global_zero and Path(str(trainer.ckpt_path)).name != LAST:  # LAST was verified on reading
            set_aside_damaged(Path(str(self.dirpath)))
        if self.resumed and not self.in_own_folder:
            take_settings(trainer, pl_module)
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.due = self.validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_epochs and (trainer.current_epoch + 1) % self.every_epochs == 0:
            self.due = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Raises Stopped on every rank if one of them was told to stop."""
        if self.resumed:  # undo Lightning's counting and random draws on the way to this batch
            trainer.fit_loop.epoch_loop._batches_that_stepped = self.resumed["logged_steps"]
            if len(states := self.resumed["random_states"]) == trainer.world_size:
                set_random_state(states[trainer.global_rank])
            self.resumed = None
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        if done % trainer.accumulate_grad_batches:
            return  # between the batches of a step
        if trainer.strategy.reduce_boolean_decision(self.is_due(trainer), all=False):
            self.save(trainer)
            if trainer.strategy.reduce_boolean_decision(self.stop, all=False):
                raise Stopped

    def on_train_batch_end(self, *_: Any) -> None:
        """Does nothing, unlike ModelCheckpoint: a run resumed from a checkpoint written here would skip this validation."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ended = True
        self.save(trainer)

    def is_due(self, trainer: Trainer) -> bool:
        """True after a validation, a signal, or an interval of steps, minutes or epochs."""
        if self.due or self.stop:
            return True
        if self.every_steps and trainer.global_step != self.saved_step and trainer.global_step % self.every_steps == 0:
            return True
        return self.every_minutes is not None and time.monotonic() - self.saved_at >= 60 * self.every_minutes

    def save(self, trainer: Trainer) -> None:
        """Saves the logs, then writes `best.ckpt` if the last validation was the best, and `last.ckpt`."""
        for logger in trainer.loggers:
            logger.save()
        candidates = self._monitor_candidates(trainer)
        if self.validated:
            self._save_topk_checkpoint(trainer, candidates)
        self.due = self.validated = False
        self._save_last_checkpoint(trainer, candidates)
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()

    @property
    def state_key(self) -> str:
        """The key of this callback in a checkpoint. ModelCheckpoint's own names the metric, which may change."""
        return "Checkpoints"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the best scores and their files, wherever the run's folder is now; nothing from another run."""
        if self.in_own_folder:
            super().load_state_dict(moved(state_dict, Path(str(self.dirpath))))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        fit_loop = trainer.fit_loop
        between_batches(checkpoint["loops"]["fit_loop"], self.ended, fit_loop.epoch_loop._num_ready_batches_reached())
        checkpoint["resume"] = {
            "ended": self.ended,
            "logged_steps": fit_loop.epoch_loop._batches_that_stepped,
            "random_states": gather_states(random_state()),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps a finished run finished. A new run that starts from it gets its own patience, time limit and counts."""
        self.resumed = checkpoint["resume"]
        assert trainer.ckpt_path is not None
        self.in_own_folder = Path(trainer.ckpt_path).resolve().parent == Path(str(self.dirpath)).resolve()
        trainer.should_stop = self.in_own_folder and self.resumed["ended"]
        for callback in [] if self.in_own_folder else callbacks_of(trainer, Callback):
            if isinstance(callback, EarlyStopping | Timer) or getattr(callback, "counts_one_run", False):
                checkpoint["callbacks"].pop(callback.state_key, None)
        for tracker in trackers(trainer):
            tracker.keep_before(self.resumed["logged_steps"])
        own_weights = checkpoint.get(OWN_WEIGHTS)
        if own_weights and not callbacks_of(trainer, EMA):
            trainer.strategy.load_model_state_dict({"state_dict": own_weights})


def refuse_different_starts(steps: list[int], folder: str) -> None:
    """Raises UserError if the ranks read different checkpoints, such as on a network disk that shows new files late."""
    if len(set(steps)) > 1:
        wrong = f"the processes of this run start from different steps, by rank: {steps}"
        instead = "write run_dir=FOLDER on a disk where all machines see the same files, or the same command again"
        raise UserError("run_dir", str(Path(folder).parent), wrong, instead)


def take_settings(trainer: Trainer, pl_module: Any) -> None:
    """Gives the optimizer and schedule this run's settings, after they loaded another run's state."""
    [optimizer], [config] = trainer.optimizers, trainer.lr_scheduler_configs
    new = pl_module.configure_optimizers()
    for group, new_group in zip(optimizer.param_groups, new["optimizer"].param_groups, strict=True):
        group.update({name: value for name, value in new_group.items() if name != "params"})
    schedule: Any = config.scheduler
    schedule.base_lrs = new["lr_scheduler"]["scheduler"].base_lrs
    if isinstance(schedule, LambdaLR):
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        schedule._last_lr = [rate * factor for rate, factor in zip(schedule.base_lrs, factors, strict=True)]
        for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate


def between_batches(loops: dict[str, Any], ended: bool, epoch_is_over: bool) -> None:
    """Sets the counts of Lightning's loops to the moment between two batches, where Lightning resumes exactly.

    At the end of training Lightning counts the current epoch as done; this undoes that unless `epoch_is_over`.
    """
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    batches["is_last_batch"] = False
    for counts in (batches["total"], batches["current"]):
        counts["ready"] = counts["started"] = counts["processed"] = counts["completed"]
    if ended and epoch_is_over:
        batches["current"] = dict.fromkeys(batches["current"], 0)
    elif ended:
        for counts in (epochs["total"], epochs["current"]):
            counts["processed"] -= 1
            counts["completed"] -= 1


def moved(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The state of Checkpoints with its files in `folder`."""
    names = ("best_model_path", "kth_best_model_path", "last_model_path")
    paths = {name: state[name] and str(folder / Path(state[name]).name) for name in names}
    best = {str(folder / Path(path).name): score for path, score in state["best_k_models"].items()}
    return {**state, **paths, "best_k_models": best, "dirpath": str(folder)}
