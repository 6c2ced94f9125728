"""A command line as jobs: one, or several of a sweep. Each job has its own folder and processes."""

import errno
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import hydra
from filelock import FileLock
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from sedtrain import launch
from sedtrain.config.composition import COMPOSITION_ERRORS, composition_error
from sedtrain.config.inherit import inherit_run
from sedtrain.config.overrides import check_command_line
from sedtrain.config.schema import conf_dir, register
from sedtrain.errors import Unfinished, UserError
from sedtrain.imports import imported_task
from sedtrain.launch import is_first
from sedtrain.run_dir import claim, config_of

CANNOT_WORK, INTERRUPTED = 2, 130  # exit status
RUN_DIR = "SEDTRAIN_RUN_DIR"  # tells the other processes of a run its folder, whose name holds the time
FIRST_SPEAKS_SECONDS = 10  # the launcher ends the other processes meanwhile
OF_SWEEPS = ("hydra.mode=", "hydra.sweep.", "hydra.sweeper.", "hydra/sweeper=", "hydra.launcher.", "hydra/launcher=")
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
HALF_WRITTEN = ("PytorchStreamWriter failed", "unexpected pos", "iostream error", "No space left")
"""Messages of torch and safetensors for the same, which raise errors of their own."""
LOST_PEER = ("gloo/transport", "Gloo connect", "NCCL error")
IRRELEVANT = (
    ".*does not have many workers.*",  # small audio is decoded faster than it travels between processes
    ".*Experiment logs directory.*",  # the run's folder is new: open_run_folder made it
    ".*Support for mismatched key_padding_mask.*",  # between WavLM and PyTorch
    ".*smaller than the logging interval.*",  # expected of a small corpus
    ".*LeafSpec.*",  # between Lightning and PyTorch
    ".*your dataloader is not resumable.*",  # the data module resumes it
    ".*callbacks used to create the checkpoint.*",  # another run may start from it; the same may not change them
    ".*Checkpoint directory .* exists and is not empty.*",  # the run is resumed
)
"""Warnings of libraries that do not concern the user."""

logger = logging.getLogger("sedtrain")


class Failed(SystemExit):
    """Ends the command with a status, after its message was printed."""


class JobFailed(Exception):
    """A job of a sweep failed on another machine, or in another process: its name and status."""


def run_command_line(arguments: list[str]) -> None:
    """Checks the command line and runs its jobs; ends with the status of the worst."""
    UserError.on_command_line = True
    register()
    try:
        sys.argv[1:] = check_command_line(arguments)
    except UserError as error:
        fail(str(error))
    failed: dict[str, int] = {}
    launcher, started = os.getpid(), []

    def job(cfg: DictConfig) -> None:
        started.append(cfg)
        register()
        if HydraConfig.get().mode is not RunMode.MULTIRUN:
            run(cfg)
            return
        run_of_sweep(cfg, failed)
        if failed and os.getpid() != launcher:
            raise JobFailed(failed)

    try:
        hydra.main(config_path=str(conf_dir()), config_name="train", version_base="1.3")(job)()
    except JobFailed as error:
        [failed] = error.args
    except Exception as error:
        if not started and isinstance(error, COMPOSITION_ERRORS):  # Hydra makes its folders before the first job
            folder = "hydra.sweep.dir" if "-m" in arguments or "--multirun" in arguments else "hydra.run.dir"
            write = f"write {folder}=FOLDER that you may write to"
            if isinstance(error, OSError):
                fail(str(UserError(folder, error.filename, str(error), write)))
            fail(str(composition_error(error, "hydra", " ".join(arguments))))
        if not type(error).__module__.startswith("submitit.") and 'Could not detect "srun"' not in str(error):
            raise
        fail(f"hydra/launcher: {error}", 1)
    if failed:
        listed = "".join(f"\n  {name}: exit status {status}" for name, status in failed.items())
        fail(f"jobs of the sweep that failed: {len(failed)}{listed}", status=min(failed.values()))


def fail(message: str, status: int = CANNOT_WORK) -> None:
    """Ends the command with a message, which a log file gets too; the first process says what all of them would."""
    if status == CANNOT_WORK and not is_first():
        time.sleep(FIRST_SPEAKS_SECONDS)
    if logger.handlers:
        logger.error(message)
    else:
        print(message, file=sys.stderr)
    raise Failed(status)


# --- a sweep


def run_of_sweep(cfg: DictConfig, failed: dict[str, int]) -> None:
    """Runs one job of several in its own folder. Its failure is noted and stops no other job, unlike Ctrl-C.

    The processes that Lightning starts for the job repeat the command line, and find each other by variables: both are
    the job's own while it runs. Of the sweep's command line it gets the flags and those overrides of Hydra that concern it.
    """
    settings = HydraConfig.get()
    overrides = list(settings.overrides.task)
    if not any(override.lstrip("+").startswith("run_dir=") for override in overrides):
        cfg.run_dir = f"{settings.sweep.dir}/{settings.job.num}"
    name = f"{settings.job.num} ({' '.join(overrides)})"
    arguments, environment = sys.argv[1:], dict(os.environ)
    not_of_job = (*get_args_parser().parse_intermixed_args(arguments).overrides, "-m", "--multirun")
    flags = [each for each in arguments if each not in not_of_job]
    of_hydra = [each for each in settings.overrides.hydra if not each.lstrip("+").startswith(OF_SWEEPS)]
    sys.argv[1:] = [*flags, *of_hydra, *overrides]
    try:
        try:
            run(cfg)
        finally:
            sys.argv[1:] = arguments
            os.environ.clear()
            os.environ.update(environment)
            distributed = sys.modules.get("torch.distributed")
            if distributed and distributed.is_initialized() and not launch.started_side_by_side():
                distributed.destroy_process_group()
    except Failed as end:
        if end.code == INTERRUPTED:
            raise
        if end.code:  # a trial of a search that was pruned has not failed
            failed[name] = int(str(end.code))
    except Exception:
        traceback.print_exc()
        failed[name] = 1


# --- a job


def run(cfg: DictConfig) -> None:
    """Runs one job, whose configuration has passed, and ends with a message where the user can repair what is wrong."""
    open_log()
    try:
        perform(cfg, list(HydraConfig.get().overrides.task))
    except UserError as error:
        fail(str(error))
    except Unfinished as end:
        if end.status == 128 + signal.SIGUSR2:
            logger.info(str(end))
            signal.raise_signal(signal.SIGUSR2)  # the launcher waited for the checkpoint, and has the job requeued
        fail(str(end), end.status)
    except RuntimeError as error:
        if not any(words in str(error) for words in LOST_PEER):
            raise
        peer = "lost the connection to another process of this run, which has printed the reason"
        fail(f"{peer}: {str(error).strip()}", 1)
    finally:
        close_log()


def perform(cfg: DictConfig, overrides: list[str]) -> None:
    """Runs one job in its folder. Raises UserError where the user can repair what is wrong, Unfinished where it was stopped."""
    lock = None
    try:
        inherit_run(cfg, overrides)
        if cfg.task != "train" and not is_first():
            return  # one process does it
        lock = agree_on_folder(cfg)
        run_task(cfg)
    except UserError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) not in CANNOT_WRITE and not any(each in str(error) for each in HALF_WRITTEN):
            raise
        write = "write run_dir=FOLDER on a disk with room"
        raise UserError("run_dir", cfg.run_dir, f"cannot be written to: {error}", write) from error
    finally:
        if lock:
            lock.release()


def agree_on_folder(cfg: DictConfig) -> FileLock | None:
    """Has all processes of a run use one folder, which the first opens, and resume alike where they were restarted.

    Returns the lock of the folder to the first.
    """
    written: Any = OmegaConf.to_container(cfg, resolve=False)
    if launch.has_parent():
        cfg.run_dir = os.environ[RUN_DIR]
    elif launch.started_side_by_side() and "${now:" in written["run_dir"]:
        wrong = "the processes of this run would each take another folder: its name holds the time"
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
    """Has the Trainer use the processes that were started. Raises UserError where others are asked for."""
    if cfg.task == "fit_batches" and num_processes * num_machines > 1:
        wrong = f"one process takes the trial steps, and {num_processes * num_machines} were started"
        write = "start one, with the trainer.devices=NUMBER and trainer.num_nodes=NUMBER that training will have"
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
    """Makes the run's folder and its log file, and locks it for this process. Raises UserError where that cannot be.

    resumes: continue a run that the folder holds; if false, such a run raises UserError
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = claim(folder)
        if config_of(str(folder)).exists() and not resumes:
            write = "write run_dir=ANOTHER_FOLDER, or resume=auto to resume this run"
            raise UserError("run_dir", str(folder), "this folder already holds a run", write)
        to_file = logging.FileHandler(folder / "sedtrain.log")
    except OSError as error:
        write = "write run_dir=FOLDER that you may write to"
        raise UserError("run_dir", str(folder), f"cannot be written to: {error}", write) from error
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(to_file)
    return lock


def open_log() -> None:
    """Shows our own messages plainly on the console."""
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    in_notebook = "ipykernel" in sys.modules  # which shows standard error in red
    to_console = logging.StreamHandler(sys.stdout if in_notebook else sys.stderr)
    to_console.setLevel(logging.INFO if is_first() else logging.WARNING)
    to_console.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(to_console)


def quieten_libraries() -> None:
    """Keeps to themselves what does not concern the user; Lightning speaks up anew when it is imported."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in IRRELEVANT:
        warnings.filterwarnings("ignore", message)


def close_log() -> None:
    """Ends the log of this job; the next of a sweep has its own."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True


def run_task(cfg: DictConfig) -> None:
    """Runs the task of a job that has a folder. Raises UserError and Unfinished."""
    if cfg.task == "compare":
        from sedtrain.compare import compare  # which needs no torch

        return compare(list(cfg.runs), Path(cfg.run_dir))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    task = imported_task(cfg.task)
    quieten_libraries()
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    task(cfg)
