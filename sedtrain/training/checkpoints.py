"""When checkpoints are written, and how a run goes on from one as if it had never stopped.

All are written at one kind of moment: between two steps of the optimizer, when the next batch has arrived and nothing of it is
computed yet. Validation, logs and learning rate are then done with the step before, and no gradient is under way.
"""

import hashlib
import logging
import os
import pickle
import random
import sys
import time
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import lightning
import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from torch.optim.lr_scheduler import LambdaLR

from sedtrain.errors import UserError, require
from sedtrain.run_dir import BEST, LAST, PREVIOUS
from sedtrain.training.averaging import EMA, OWN_WEIGHTS
from sedtrain.training.loggers import trackers

logger = logging.getLogger(__name__)


MARK = b"\nsha256:"


TRAILER_BYTES = len(MARK) + 64  # behind the zip archive, which readers of zip files pass over


CHUNK_BYTES = 1 << 22


class Hashed:
    """A file for writing that knows the SHA-256 of what went into it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Writes beside the file and then takes its place; the one that `last.ckpt` replaces stays as `previous.ckpt`.

    Whenever the process is killed, a whole checkpoint lies under one of these names. Raises OSError where it cannot be
    written, such as on a full disk, and leaves everything as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            hashed = Hashed(file)
            torch.save(content, cast(IO[bytes], hashed))
            file.write(MARK + hashed.sha256.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error.__context__, OSError):  # torch raises an error of its own over it
            raise error.__context__ from None
        raise
    if path.name == LAST and path.exists():
        path.replace(path.with_name(PREVIOUS))
    unfinished.replace(path)
    sync_folder(path.parent)


def set_aside_damaged(folder: Path) -> None:
    """Renames a damaged `last.ckpt`, which at the next write would take the place of the whole one before it."""
    last = folder / LAST
    if last.is_file() and not is_whole(last):
        last.replace(last.with_name(f"{LAST}.damaged"))


def sync_folder(folder: Path) -> None:
    """Brings the new names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_whole(path: Path) -> bool:
    """Whether a file ends with the digest of what stands before it."""
    size = path.stat().st_size - TRAILER_BYTES
    if size <= 0:
        return False
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(min(CHUNK_BYTES, size - file.tell())):
            sha256.update(chunk)
        return file.read() == MARK + sha256.hexdigest().encode()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a whole checkpoint, on the CPU; raises UserError for any other file."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such checkpoint", "resume=auto, or resume=FILE of a run's checkpoints")
    if not is_whole(path):
        raise UserError(
            f"{path}: this checkpoint is damaged: its digest is not that of its content",
            f"the {PREVIOUS} or best.ckpt beside it; resume=auto takes the newest that is whole",
        )
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: this checkpoint holds more than numbers and plain values, and could run code: {error}",
            "a checkpoint that a training of sedtrain wrote",
        ) from error
    return content


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint of a folder that is not damaged, None where there is none; raises UserError where all are."""
    last = folder / LAST
    if last.is_file() and is_whole(last):
        return last
    found = [path for path in (folder / BEST, last, folder / PREVIOUS) if path.is_file()]
    if not found:
        return None
    steps = {path: read_checkpoint(path)["global_step"] for path in found if is_whole(path)}
    if not steps:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{folder}: every checkpoint is damaged: {names}", "run_dir=ANOTHER_FOLDER, to train anew")
    newest = max(steps, key=lambda path: steps[path])
    logger.warning("%s is missing or damaged; continuing from %s", last, newest.name)
    return newest


class CheckpointFiles(CheckpointIO):
    """How Lightning writes and reads checkpoints."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Whatever `map_location` and `weights_only` say: onto the CPU, and without running code."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def random_state() -> dict[str, Any]:
    """Of Python, NumPy, PyTorch and this process's GPU, in types that load without running code."""
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
    """Has the generators go on where `random_state` was taken."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def of_all_ranks(state: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank hands in, in the order of ranks; every rank has to call it."""
    if not torch.distributed.is_initialized():
        return [state]
    states: list[dict[str, Any]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


NEVER = sys.maxsize  # batches, of which Lightning counts as many from one validation to the next


class ValidateEvery(lightning.Callback):
    """Has Lightning validate after every so many steps of the optimizer; a training of fewer does at its end.

    Lightning counts batches. An epoch's last step may be made of fewer than the others, by which validations would fall into
    the middle of steps: the weights that are kept would not be those that were scored.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps, self.last_step = num_steps, 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.num_steps = min(self.num_steps, int(min(trainer.estimated_stepping_batches, NEVER)))
        self.last_step = trainer.global_step

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        """Lightning asks next whether its count of batches is a multiple of `val_check_batch`."""
        has_stepped = trainer.global_step != self.last_step
        is_due = has_stepped and trainer.global_step % self.num_steps == 0
        trainer.val_check_batch = 1 if is_due else NEVER
        self.last_step = trainer.global_step


class Stopped(Exception):
    """Training ended before its time because someone asked for it; the checkpoint of that moment is written."""


class Checkpoints(ModelCheckpoint):
    """Writes `best.ckpt` by a validation metric, and `last.ckpt` after every validation and at the end of training.

    every_steps, every_minutes, every_epochs: how often `last.ckpt` is written besides; None: not
    """

    def __init__(
        self,
        dirpath: str,
        monitor: str,
        mode: str,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        every_epochs: int | None = None,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_last=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        every = {"every_steps": every_steps, "every_minutes": every_minutes, "every_epochs": every_epochs}
        for name, value in every.items():
            wanted = "1 or more, or null" if name != "every_minutes" else "a number above 0, or null"
            require(value is None or value > 0, f"callbacks.checkpoints.{name}", value, wanted)
        self.every_steps, self.every_minutes, self.every_epochs = every_steps, every_minutes, every_epochs
        self.due = self.validated = self.stop = self.stopped = self.ended = self.in_own_folder = False
        self.saved_step = 0
        self.saved_at = time.monotonic()
        self.resumed: dict[str, Any] | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        trainer.strategy.checkpoint_io = CheckpointFiles()

    # --- when

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        refuse_different_starts(of_all_ranks({"step": trainer.global_step}))
        if trainer.is_global_zero and Path(str(trainer.ckpt_path)).name != LAST:  # that was verified when it was read
            set_aside_damaged(Path(str(self.dirpath)))
        if self.resumed and not self.in_own_folder:
            take_settings(trainer, pl_module)
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.due = self.validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.every_epochs and (trainer.current_epoch + 1) % self.every_epochs == 0:
            self.due = True

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Raises Stopped on every rank where one of them was asked to stop."""
        if self.resumed:
            self.restore(trainer, self.resumed)
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        if done % trainer.accumulate_grad_batches:
            return  # in the middle of a step
        if trainer.strategy.reduce_boolean_decision(self.is_due(trainer), all=False):
            self.save(trainer)
            self.stopped = trainer.strategy.reduce_boolean_decision(self.stop, all=False)
            if self.stopped:
                raise Stopped

    def on_train_batch_end(self, *_: Any) -> None:
        """Nothing, unlike in the class above: a checkpoint written here would skip the validation of this step."""

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.ended = True
        self.save(trainer)

    def is_due(self, trainer: lightning.Trainer) -> bool:
        if self.due or self.stop:
            return True
        if self.every_steps and trainer.global_step != self.saved_step and trainer.global_step % self.every_steps == 0:
            return True
        return self.every_minutes is not None and time.monotonic() - self.saved_at >= 60 * self.every_minutes

    def save(self, trainer: lightning.Trainer) -> None:
        """Writes `last.ckpt`, after a validation also `best.ckpt` if it is; the logs first, so that they reach as far."""
        for logger in trainer.loggers:
            logger.save()
        candidates = self._monitor_candidates(trainer)
        if self.validated:
            self._save_topk_checkpoint(trainer, candidates)
        self.due = self.validated = False
        self._save_last_checkpoint(trainer, candidates)
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()

    # --- what

    @property
    def state_key(self) -> str:
        """By which a checkpoint's part is found again, whatever the metric is now."""
        return "Checkpoints"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The best scores, with their files where the run's folder lies now; those of another run do not count."""
        if self.in_own_folder:
            super().load_state_dict(moved(state_dict, Path(str(self.dirpath))))

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        fit_loop = trainer.fit_loop
        between_batches(checkpoint["loops"]["fit_loop"], self.ended, fit_loop.epoch_loop._num_ready_batches_reached())
        checkpoint["resume"] = {
            "ended": self.ended,
            "logged_steps": fit_loop.epoch_loop._batches_that_stepped,
            "random_states": of_all_ranks(random_state()),
        }

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Has a training that was at its end stay there, unless another run starts from it."""
        self.resumed = checkpoint["resume"]
        assert trainer.ckpt_path is not None
        self.in_own_folder = Path(trainer.ckpt_path).resolve().parent == Path(str(self.dirpath)).resolve()
        trainer.should_stop = self.in_own_folder and self.resumed["ended"]
        for each in [] if self.in_own_folder else trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(each, EarlyStopping | Timer) or getattr(each, "counts_one_run", False):
                checkpoint["callbacks"].pop(each.state_key, None)
        for each in trackers(trainer):
            each.keep_before(self.resumed["logged_steps"])
        own = checkpoint.get(OWN_WEIGHTS)
        if own and not any(isinstance(each, EMA) for each in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.strategy.load_model_state_dict({"state_dict": own})

    def restore(self, trainer: lightning.Trainer, resumed: dict[str, Any]) -> None:
        """What Lightning has counted and drawn on its way to this batch does not count."""
        trainer.fit_loop.epoch_loop._batches_that_stepped = resumed["logged_steps"]
        states = resumed["random_states"]
        if len(states) == trainer.world_size:
            set_random_state(states[trainer.global_rank])
        self.resumed = None


def refuse_different_starts(starts: list[dict[str, Any]]) -> None:
    """Raises UserError where the ranks have not read the same checkpoint, such as on a disk that is slow to show files."""
    steps = [start["step"] for start in starts]
    if len(set(steps)) > 1:
        raise UserError(
            f"the processes of this run start from different steps, by rank: {steps}",
            "run_dir=FOLDER on a disk where all machines see the same files, or the same command again",
        )


def take_settings(trainer: lightning.Trainer, pl_module: Any) -> None:
    """Gives the optimizer, which has its moments from another run, the settings of this one."""
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
    """Brings the counts of Lightning's loops to the moment after one batch and before the next, where it resumes exactly.

    At the end of training it counts the epoch under way as done, which it is only where `epoch_is_over`.
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
    """The state of Checkpoints, its files by the same names in `folder`."""

    def there(path: str) -> str:
        return str(folder / Path(path).name) if path else path

    names = ("best_model_path", "kth_best_model_path", "last_model_path")
    best = {there(path): score for path, score in state["best_k_models"].items()}
    return {**state, **{name: there(state[name]) for name in names}, "best_k_models": best, "dirpath": str(folder)}
