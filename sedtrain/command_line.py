"""A command line becomes jobs: one, or those of a sweep, each of which has a folder and processes of its own."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sedtrain.config import ConfigError, conf_dir, register
from sedtrain.jobs import INTERRUPTED, Failed, fail, run
from sedtrain.overrides import check_command_line
from sedtrain.ranks import started_side_by_side

OF_SWEEPS = ("hydra.mode=", "hydra.sweep.", "hydra.sweeper.", "hydra/sweeper=", "hydra.launcher.", "hydra/launcher=")


def run_command_line(arguments: list[str]) -> None:
    """Checks the command line and runs its jobs; ends with the status of the worst."""
    register()
    try:
        sys.argv[1:] = check_command_line(arguments)
    except ConfigError as error:
        fail(str(error))
    failed: dict[str, int] = {}
    launcher = os.getpid()

    def job(cfg: DictConfig) -> None:
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
        if not type(error).__module__.startswith("submitit.") and 'Could not detect "srun"' not in str(error):
            raise
        fail(f"hydra/launcher: {error}", status=1)
    if failed:
        fail(in_words(failed), status=min(failed.values()))


class JobFailed(Exception):
    """A job of a sweep failed on another machine, or in another process: its name and status."""


def in_words(failed: dict[str, int]) -> str:
    listed = "".join(f"\n  {name}: exit status {status}" for name, status in failed.items())
    return f"jobs of the sweep that failed: {len(failed)}{listed}"


def run_of_sweep(cfg: DictConfig, failed: dict[str, int]) -> None:
    """One job of several, in a folder of its own; that it fails is noted and stops no other job, unlike Ctrl-C."""
    settings = HydraConfig.get()
    overrides = list(settings.overrides.task)
    if not any(each.lstrip("+").startswith("run_dir=") for each in overrides):
        cfg.run_dir = f"{settings.sweep.dir}/{settings.job.num}"
    name = f"{settings.job.num} ({' '.join(overrides)})"
    try:
        with alone(overrides):
            run(cfg)
    except Failed as end:
        if end.code == INTERRUPTED:
            raise
        if end.code:  # a trial of a search that was pruned has not failed
            failed[name] = int(str(end.code))
    except Exception:
        traceback.print_exc()
        failed[name] = 1


def own_arguments(overrides: list[str]) -> list[str]:
    """The command line of one job of a sweep: flags, what says where Hydra searches, and the overrides of this job."""
    flags = get_args_parser().parse_intermixed_args(sys.argv[1:])
    kept = [each for each in sys.argv[1:] if each not in (*flags.overrides, "-m", "--multirun")]
    of_hydra = [each for each in HydraConfig.get().overrides.hydra if not each.lstrip("+").startswith(OF_SWEEPS)]
    return [*kept, *of_hydra, *overrides]


@contextlib.contextmanager
def alone(overrides: list[str]) -> Iterator[None]:
    """Has the processes that Lightning starts for a job of a sweep run this job and no other, and parts with them at its end.

    They repeat the command line, and find each other by variables: both would be those of the whole sweep.
    """
    arguments, environment = sys.argv[1:], dict(os.environ)
    sys.argv[1:] = own_arguments(overrides)
    try:
        yield
    finally:
        sys.argv[1:] = arguments
        os.environ.clear()
        os.environ.update(environment)
        distributed = sys.modules.get("torch.distributed")
        if distributed and distributed.is_initialized() and not started_side_by_side():
            distributed.destroy_process_group()
