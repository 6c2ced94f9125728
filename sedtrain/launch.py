"""Which of a run's processes this one is, from the environment that torchrun, SLURM or Lightning gives it."""

import os
from pathlib import Path

from sedtrain.run_dir import BEST, LAST, PREVIOUS, checkpoints_of

AT_HAND = ("bash", "interactive")  # SLURM jobs that are a shell, in which Lightning starts the processes itself


def is_first() -> bool:
    """Whether this process makes the run's folder and speaks for all; it is that of global rank 0."""
    within_nodes = ("RANK",) if "RANK" in os.environ else ("SLURM_PROCID", "NODE_RANK")
    return all(os.environ.get(name, "0") == "0" for name in (*within_nodes, "LOCAL_RANK"))


def is_first_of_machine() -> bool:
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


def has_parent() -> bool:
    """Whether another process of the run started this one, as Lightning does on each machine, and could tell it things."""
    return "RANK" not in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"


def started_side_by_side() -> bool:
    """Whether others were started along with this process, by torchrun, SLURM, or by hand on each machine."""
    return by_slurm() or "RANK" in os.environ or "NODE_RANK" in os.environ


def by_slurm() -> bool:
    return int(os.environ.get("SLURM_NTASKS", "1")) > 1 and os.environ.get("SLURM_JOB_NAME") not in AT_HAND


def started_processes() -> tuple[int, int] | None:
    """How many processes torchrun or SLURM have started on each machine, and on how many machines."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    if by_slurm():
        num_machines = int(os.environ.get("SLURM_NNODES", "1"))
        return int(os.environ["SLURM_NTASKS"]) // num_machines, num_machines
    return None


# --- restarts


def launches() -> dict[str, bool]:
    """The names of what launched this process, and whether it did so again; the variables are those of the launchers."""
    names = {}
    if run_id := os.environ.get("TORCHELASTIC_RUN_ID"):  # `none` unless someone chose it
        error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # FOLDER_OF_THIS_LAUNCH/attempt_N/RANK/error.json
        name = f"torchrun {Path(error_file).parents[2] if error_file else run_id}"
        names[name] = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if job := os.environ.get("SLURM_JOB_ID"):
        names[f"slurm {job}"] = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    if job := os.environ.get("SUBMITIT_LOCAL_JOB_ID"):
        names[f"submitit {job}"] = True  # which runs one thing, unless it was requeued
    return names


def note_launch(run: str) -> None:
    """Writes into a run's folder who launched it."""
    mark = mark_of(run)
    noted = mark.read_text(encoding="utf-8").splitlines() if mark.is_file() else []
    with mark.open("a", encoding="utf-8") as file:
        file.writelines(f"{name}\n" for name in launches() if name not in noted)


def is_restart_of(run: str) -> bool:
    """Whether this process was started again by what launched the run in this folder."""
    again = {name for name, is_again in launches().items() if is_again}
    mark = mark_of(run)
    return bool(again) and mark.is_file() and not again.isdisjoint(mark.read_text(encoding="utf-8").splitlines())


def mark_of(run: str) -> Path:
    return Path(run) / ".launched_by"


def resume_of_restart(run: str, resume: str) -> str:
    """What `resume` means in a process that was started again: the run's own checkpoints, once there are any."""
    has_own = any((checkpoints_of(run) / name).is_file() for name in (LAST, PREVIOUS, BEST))
    return "auto" if resume == "none" or has_own else resume
