"""When checkpoints are written, what they hold, and how a run resumes from one as if it had never stopped.

A checkpoint is always written between two steps of the optimizer, when the next batch has arrived and nothing of it is
computed yet. Validation, logs and learning rate of the step before are done then, and no gradient is under way.
"""

import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from torch.optim.lr_scheduler import LambdaLR

from sedtrain.errors import UserError
from sedtrain.ranges import Count, Positive
from sedtrain.run_dir import LAST
from sedtrain.training.averaging import EMA, OWN_WEIGHTS
from sedtrain.training.checkpoint_files import CheckpointFiles, set_aside_damaged
from sedtrain.training.loggers import trackers

NEVER = sys.maxsize  # batches from one validation of Lightning to the next


class ValidateEvery(Callback):
    """Validates after every so many steps of the optimizer; a run of fewer steps validates at its end.

    Lightning counts batches instead. The last step of an epoch may take fewer batches than the others, so that validations
    would fall into the middle of steps, and other weights would be kept than were scored.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps, self.last_step = num_steps, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.num_steps = min(self.num_steps, int(min(trainer.estimated_stepping_batches, NEVER)))
        self.last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Sets `val_check_batch`: Lightning validates next where its count of batches is a multiple of it."""
        is_due = trainer.global_step != self.last_step and trainer.global_step % self.num_steps == 0
        trainer.val_check_batch = 1 if is_due else NEVER
        self.last_step = trainer.global_step


class Stopped(Exception):
    """Training stopped early because a signal asked for it, and its checkpoint is written."""


class Checkpoints(ModelCheckpoint):
    """Writes `best.ckpt` by a validation metric, and `last.ckpt` after every validation and at the end of training.

    every_steps, every_minutes, every_epochs: how often `last.ckpt` is written in addition; None: not
    due, stop: set by signals to have a checkpoint written after the current step, and to stop then
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
        if trainer.is_global_zero and Path(str(trainer.ckpt_path)).name != LAST:  # which was verified when it was read
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
        """Raises Stopped on every rank where one of them was asked to stop."""
        if self.resumed:  # undo what Lightning has counted and drawn on its way to this batch
            trainer.fit_loop.epoch_loop._batches_that_stepped = self.resumed["logged_steps"]
            if len(states := self.resumed["random_states"]) == trainer.world_size:
                set_random_state(states[trainer.global_rank])
            self.resumed = None
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        if done % trainer.accumulate_grad_batches:
            return  # in the middle of a step
        if trainer.strategy.reduce_boolean_decision(self.is_due(trainer), all=False):
            self.save(trainer)
            if trainer.strategy.reduce_boolean_decision(self.stop, all=False):
                raise Stopped

    def on_train_batch_end(self, *_: Any) -> None:
        """Does nothing, unlike in ModelCheckpoint: a checkpoint written here would skip the validation of this step."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ended = True
        self.save(trainer)

    def is_due(self, trainer: Trainer) -> bool:
        """True after a validation or an epoch that asked for it, a signal, `every_steps` or `every_minutes`."""
        if self.due or self.stop:
            return True
        if self.every_steps and trainer.global_step != self.saved_step and trainer.global_step % self.every_steps == 0:
            return True
        return self.every_minutes is not None and time.monotonic() - self.saved_at >= 60 * self.every_minutes

    def save(self, trainer: Trainer) -> None:
        """Writes `last.ckpt`, and `best.ckpt` after the best validation, by `checkpoint_files.write_checkpoint`; logs first."""
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
        """The key of this callback's state in a checkpoint, whatever the metric is now."""
        return "Checkpoints"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the best scores and their files, which lie in the run's folder now; nothing from another run."""
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
        """Keeps a finished run finished; another run that starts from it has its own patience, time and counts."""
        self.resumed = checkpoint["resume"]
        assert trainer.ckpt_path is not None
        self.in_own_folder = Path(trainer.ckpt_path).resolve().parent == Path(str(self.dirpath)).resolve()
        trainer.should_stop = self.in_own_folder and self.resumed["ended"]
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in [] if self.in_own_folder else callbacks:
            if isinstance(callback, EarlyStopping | Timer) or getattr(callback, "counts_one_run", False):
                checkpoint["callbacks"].pop(callback.state_key, None)
        for tracker in trackers(trainer):
            tracker.keep_before(self.resumed["logged_steps"])
        own_weights = checkpoint.get(OWN_WEIGHTS)
        if own_weights and not any(isinstance(callback, EMA) for callback in callbacks):
            trainer.strategy.load_model_state_dict({"state_dict": own_weights})


def random_state() -> dict[str, Any]:
    """The generators of Python, NumPy, PyTorch and this process's GPU, in types that load without running code."""
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    keys = {**numpy["state"], "key": numpy["state"]["key"].tolist()}
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": keys},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Sets the generators to a state of `random_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def gather_states(state: Any) -> list[Any]:
    """The states of all ranks, in their order; every rank has to call it."""
    if not torch.distributed.is_initialized():
        return [state]
    states = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


def refuse_different_starts(steps: list[int], folder: str) -> None:
    """Raises UserError where the ranks have not read the same checkpoint, such as on a disk that is slow to show files."""
    if len(set(steps)) > 1:
        wrong = f"the processes of this run start from different steps, by rank: {steps}"
        instead = "write run_dir=FOLDER on a disk where all machines see the same files, or the same command again"
        raise UserError("run_dir", str(Path(folder).parent), wrong, instead)


def take_settings(trainer: Trainer, pl_module: Any) -> None:
    """Gives the optimizer the settings of this run; its moments come from another one."""
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
    """Sets the counts of Lightning's loops to the moment after one batch and before the next, where it resumes exactly.

    At the end of training Lightning counts the epoch under way as done; that is undone unless `epoch_is_over`.
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
