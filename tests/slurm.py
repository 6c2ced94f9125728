"""Stand-ins for sbatch, srun, scontrol and sacct: one job at a time, its tasks as processes of this machine.

`write_commands(FOLDER)` makes the commands; the variables are those that SLURM gives to jobs and tasks.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

JOB = "4711"
COMMANDS = ("sbatch", "srun", "scontrol", "sacct")


def write_commands(folder):
    for name in COMMANDS:
        path = folder / name
        path.write_text(f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n")
        with path.open("a") as file:
            file.write(f"import slurm\nslurm.{name}({str(folder)!r}, *sys.argv[1:])\n")
        path.chmod(0o755)


def sbatch(folder, script):
    """Starts the job in the background, as often as it is requeued; keeps the script."""
    text = Path(script).read_text()
    (Path(folder) / "job.sh").write_text(text)
    number = int(re.search(r"--ntasks-per-node=(\d+)", text)[1])
    print(f"Submitted batch job {JOB}", flush=True)
    if os.fork():
        return
    os.setsid()
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)  # whoever reads them waits for their end
    wait_until(lambda: any(Path(script).parent.glob("*/*submitted.pkl")), 30)  # until then it is thought of as waiting
    for restart in range(9):
        job = {
            "SLURM_JOB_ID": JOB, "SLURM_JOB_NAME": "sedtrain", "SLURM_NTASKS": number, "SLURM_NTASKS_PER_NODE": number,
            "SLURM_NNODES": 1, "SLURM_JOB_NUM_NODES": 1, "SLURM_NODELIST": "127.0.0.1", "SLURM_RESTART_COUNT": restart,
        }  # fmt: skip
        (Path(folder) / "requeue").unlink(missing_ok=True)
        variables = os.environ | {name: str(value) for name, value in job.items()}
        subprocess.run(["bash", str(Path(folder) / "job.sh")], env=variables)
        if not (Path(folder) / "requeue").exists():
            break
    (Path(folder) / "ended").touch()


def srun(folder, *arguments):
    """Asks `run_tasks` for the tasks of the job, and waits for their end."""
    asked = Path(folder) / "asked"
    (part := asked.with_suffix(".part")).write_text(json.dumps([arguments, dict(os.environ)]))
    part.rename(asked)
    wait_until(lambda: not asked.exists())


def run_tasks(folder, command):
    """Runs what `srun` asks for as copies of this process, until the command that submits the job has ended."""
    asked = folder / "asked"
    try:
        while command.returncode is None:
            wait_until(lambda: asked.exists() or command.poll() is not None)
            if asked.exists():
                run_job(folder, *json.loads(asked.read_text()))
                asked.unlink()
    finally:
        command.kill()


def run_job(folder, arguments, variables):
    from forked import Forked  # imports more than the commands need

    module, *rest = arguments[arguments.index("-m") + 1 :]
    output = arguments[arguments.index("--output") + 1].replace("%j", JOB)
    variables["SLURM_NODEID"] = "0"
    tasks = [
        Forked(folder, *rest, module=module, **variables | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank})
        for rank in map(str, range(int(variables["SLURM_NTASKS"])))
    ]
    for rank, task in enumerate(tasks):
        task.wait()
        with open(output.replace("%t", str(rank)), "a") as out:
            out.write(task.out + task.err)


def wait_until(condition, seconds=250):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def scontrol(folder, command, job):
    assert (command, job) == ("requeue", JOB)
    (Path(folder) / "requeue").touch()


def sacct(folder, *_):
    state = "COMPLETED" if (Path(folder) / "ended").exists() else "RUNNING"
    print(f"JobID|State|NodeList\n{JOB}|{state}|localhost")
