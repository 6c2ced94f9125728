"""A command line as jobs: one, or several of a sweep, each with its own folder and processes."""

import os
import sys
import traceback

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sedtrain import launch
from sedtrain.config.hydra_calls import COMPOSITION_ERRORS, composition_error
from sedtrain.config.overrides import check_command_line
from sedtrain.config.schema import conf_dir, register
from sedtrain.console import INTERRUPTED, Failed, fail
from sedtrain.errors import UserError
from sedtrain.job import run

ONLY_SWEEPS = ("hydra.mode=", "hydra.sweep.", "hydra.sweeper.", "hydra/sweeper=", "hydra.launcher.", "hydra/launcher=")
"""Overrides of Hydra that a single job does not need."""


class JobFailed(Exception):
    """Jobs of a sweep failed in another process, maybe on another machine. Holds their names and statuses."""


def run_command_line(arguments: list[str]) -> None:
    """Checks the command line and runs its jobs. Exits with the lowest status of failed jobs: 1, a bug, before 2."""
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
        run_job_of_sweep(cfg, failed)
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


def run_job_of_sweep(cfg: DictConfig, failed: dict[str, int]) -> None:
    """Runs one job of several in its own folder. A failure is noted in `failed` and stops no other job; Ctrl-C does.

    While the job runs, sys.argv and the environment are its own: the processes that Lightning starts for it repeat the
    command line, and find each other by environment variables. The job's command line has the sweep's flags, and only
    those overrides of Hydra that concern a single job.
    """
    settings = HydraConfig.get()
    overrides = list(settings.overrides.task)
    if not any(override.lstrip("+").startswith("run_dir=") for override in overrides):
        cfg.run_dir = f"{settings.sweep.dir}/{settings.job.num}"
    name = f"{settings.job.num} ({' '.join(overrides)})"
    arguments, environment = sys.argv[1:], dict(os.environ)
    no_flags = (*get_args_parser().parse_intermixed_args(arguments).overrides, "-m", "--multirun")
    flags = [argument for argument in arguments if argument not in no_flags]
    hydras = [override for override in settings.overrides.hydra if not override.lstrip("+").startswith(ONLY_SWEEPS)]
    sys.argv[1:] = [*flags, *hydras, *overrides]
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
        if end.code:  # a pruned trial ends with status 0: it has not failed
            failed[name] = int(str(end.code))
    except Exception:
        traceback.print_exc()
        failed[name] = 1
