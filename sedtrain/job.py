"""One job of the command: its folder, its processes, its task, and the errors that become messages."""

import errno
import logging
import os
import signal
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from sedtrain import launch
from sedtrain.config.inherit import inherit_run
from sedtrain.console import close_log, fail, log_to_file, open_log, quieten_libraries
from sedtrain.errors import Unfinished, UserError
from sedtrain.imports import imported_task
from sedtrain.launch import is_first
from sedtrain.run_dir import claim, config_of

RUN_DIR = "SEDTRAIN_RUN_DIR"
"""Variable that tells the other processes of a run its folder, since its name may hold the time."""
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
HALF_WRITTEN = ("PytorchStreamWriter failed", "unexpected pos", "iostream error", "No space left")
"""Messages of torch and safetensors for a failed write, for which they raise errors of their own."""
LOST_PEER = ("gloo/transport", "Gloo connect", "NCCL error")
"""Messages for a lost connection to another process."""

logger = logging.getLogger("sedtrain")


def run(cfg: DictConfig) -> None:
    """Runs one job with its checked configuration. A mistake that the user can repair ends the command with a message."""
    open_log()
    try:
        perform(cfg, list(HydraConfig.get().overrides.task))
    except UserError as error:
        fail(str(error))
    except Unfinished as end:
        if end.status == 128 + signal.SIGUSR2:
            logger.info(str(end))
            # Tells the launcher, which waited for the checkpoint, to requeue the job.
            signal.raise_signal(signal.SIGUSR2)
        fail(str(end), end.status)
    except RuntimeError as error:
        if not any(words in str(error) for words in LOST_PEER):
            raise
        peer = "lost the connection to another process of this run, which has printed the reason"
        fail(f"{peer}: {str(error).strip()}", 1)
    finally:
        close_log()


def perform(cfg: DictConfig, overrides: list[str]) -> None:
    """Runs one job in its folder. Raises UserError for a mistake that the user can repair, Unfinished if it was stopped."""
    lock = None
    try:
        inherit_run(cfg, overrides)
        if cfg.task != "train" and not is_first():
            return  # one process is enough
        lock = agree_on_folder(cfg)
        run_task(cfg)
    except UserError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) not in CANNOT_WRITE and not any(words in str(error) for words in HALF_WRITTEN):
            raise
        write = "write run_dir=FOLDER on a disk with room"
        raise UserError("run_dir", cfg.run_dir, f"cannot be written to: {error}", write) from error
    finally:
        if lock:
            lock.release()


def agree_on_folder(cfg: DictConfig) -> FileLock | None:
    """Gives all processes of a run the same folder, and the same `resume` after a restart.

    The first process opens the folder, and gets its lock.
    """
    written: Any = OmegaConf.to_container(cfg, resolve=False)
    if launch.has_parent():
        cfg.run_dir = os.environ[RUN_DIR]
    elif launch.started_side_by_side() and "${now:" in written["run_dir"]:
        wrong = "each process of this run would take another folder, since the name holds the time"
        raise UserError("run_dir", cfg.run_dir, wrong, "write run_dir=FOLDER")
    if processes := launch.started_processes():
        use_started(cfg, *processes)
    restarted = cfg.task == "train" and launch.is_restart_of(cfg.run_dir)
    if restarted:
        cfg.resume = launch.resume_of_restart(cfg.run_dir, cfg.resume)
    lock = None
    if is_first() and cfg.task not in ("transcribe", "serve", "export"):
        lock = open_run_folder(Path(cfg.run_dir), resumes=restarted or (cfg.task == "train" and cfg.resume == "auto"))
        launch.note_launch(cfg.run_dir)
    os.environ[RUN_DIR] = cfg.run_dir
    return lock


def use_started(cfg: DictConfig, num_processes: int, num_machines: int) -> None:
    """Tells the Trainer how many processes were started. Raises UserError if the options ask for other numbers."""
    if cfg.task == "fit_batches" and num_processes * num_machines > 1:
        wrong = f"trial steps need one process, and {num_processes * num_machines} were started"
        write = "start one, with the trainer.devices=NUMBER and trainer.num_nodes=NUMBER of the training"
        raise UserError("task", cfg.task, wrong, write)
    started = {"devices": num_processes, "num_nodes": num_machines}
    errors = [
        UserError(f"trainer.{name}", asked, f"{number} were started", f"leave trainer.{name} out")
        for name, number in started.items()
        if (asked := cfg.trainer.get(name)) not in (None, "auto", -1, "-1", number, str(number))
    ]
    if errors:
        raise UserError.all_of(errors)
    with open_dict(cfg.trainer):
        cfg.trainer.update(started)


def open_run_folder(folder: Path, resumes: bool) -> FileLock:
    """Makes the run's folder and log file, and locks the folder for this process. Raises UserError if that fails.

    resumes: True continues a run that the folder holds; False raises UserError for it
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = claim(folder)
        if config_of(str(folder)).exists() and not resumes:
            write = "write run_dir=ANOTHER_FOLDER, or resume=auto to resume this run"
            raise UserError("run_dir", str(folder), "this folder already holds a run", write)
        log_to_file(folder / "sedtrain.log")
    except OSError as error:
        write = "write run_dir=FOLDER that you may write to"
        raise UserError("run_dir", str(folder), f"cannot be written to: {error}", write) from error
    return lock


def run_task(cfg: DictConfig) -> None:
    """Runs the task, once its folder is open. Raises UserError and Unfinished."""
    if cfg.task == "compare":
        from sedtrain.compare import compare  # needs no torch

        return compare(list(cfg.runs), Path(cfg.run_dir))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    task = imported_task(cfg.task)
    quieten_libraries()
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    task(cfg)
