"""This process's place among the processes of a run, read from the variables of torchrun, SLURM or Lightning."""

import os
from pathlib import Path

from sedtrain.run_dir import BEST, LAST, PREVIOUS, checkpoints_of

SHELLS = ("bash", "interactive")  # names of SLURM jobs in which Lightning itself starts the processes
LAUNCHED_BY = ".launched_by"  # file in a run's folder with the names of its launches


def is_first() -> bool:
    """True for global rank 0, which makes the run's folder and reports for all ranks."""
    within_nodes = ("RANK",) if "RANK" in os.environ else ("SLURM_PROCID", "NODE_RANK")
    return all(os.environ.get(name, "0") == "0" for name in (*within_nodes, "LOCAL_RANK"))


def is_first_of_machine() -> bool:
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


def has_parent() -> bool:
    """True if another process of the run started this one, as Lightning does on each machine."""
    return "RANK" not in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"


def started_side_by_side() -> bool:
    """True if torchrun, SLURM, or a person on each machine started this process and others."""
    return by_slurm() or "RANK" in os.environ or "NODE_RANK" in os.environ


def by_slurm() -> bool:
    return int(os.environ.get("SLURM_NTASKS", "1")) > 1 and os.environ.get("SLURM_JOB_NAME") not in SHELLS


def started_processes() -> tuple[int, int] | None:
    """Processes per machine and machines that torchrun or SLURM started; None without either."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    if by_slurm():
        num_machines = int(os.environ.get("SLURM_NNODES", "1"))
        return int(os.environ["SLURM_NTASKS"]) // num_machines, num_machines
    return None


# --- restarts


def launches() -> dict[str, bool]:
    """Names of the launches that this process belongs to; True for a restart."""
    names = {}
    if run_id := os.environ.get("TORCHELASTIC_RUN_ID"):  # `none` by default
        error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # FOLDER_OF_THIS_LAUNCH/attempt_N/RANK/error.json
        name = f"torchrun {Path(error_file).parents[2] if error_file else run_id}"
        names[name] = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if job := os.environ.get("SLURM_JOB_ID"):
        names[f"slurm {job}"] = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    if job := os.environ.get("SUBMITIT_LOCAL_JOB_ID"):
        names[f"submitit {job}"] = True  # submitit runs a job only once, unless it requeues it
    return names


def noted_launches(run: str) -> list[str]:
    mark = Path(run) / LAUNCHED_BY
    return mark.read_text(encoding="utf-8").splitlines() if mark.is_file() else []


def note_launch(run: str) -> None:
    """Adds the launches of this process to the run's folder."""
    new = [f"{name}\n" for name in launches() if name not in noted_launches(run)]
    with (Path(run) / LAUNCHED_BY).open("a", encoding="utf-8") as file:
        file.writelines(new)


def is_restart_of(run: str) -> bool:
    """True if the launcher of this folder's run has restarted this process."""
    return any(is_restart and name in noted_launches(run) for name, is_restart in launches().items())


def resume_of_restart(run: str, resume: str) -> str:
    """The `resume` of a restarted process: the run's own checkpoints, once there are any."""
    has_own = any((checkpoints_of(run) / name).is_file() for name in (LAST, PREVIOUS, BEST))
    return "auto" if resume == "none" or has_own else resume
