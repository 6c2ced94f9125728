"""A training that torchrun or SLURM launched: who speaks, in which folder, and how it goes on when a process was killed."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import slurm
from forked import Forked
from hydra.core.config_store import ConfigStore
from kill_and_resume import differences, whole_checkpoints
from omegaconf import OmegaConf

from sedtrain import launch as ranks
from sedtrain.config.overrides import check_command_line
from sedtrain.errors import UserError
from sedtrain.job import use_started
from sedtrain.training.checkpoint_files import read_checkpoint
from sedtrain.training.checkpoints import refuse_different_starts

ROOT = Path(__file__).parents[1]
SHORT = [
    "data=parquet", "data.batch_seconds=6", "vocabulary_texts=0", "trainer.accelerator=cpu",
    "trainer.max_time=null", "trainer.max_steps=8", "trainer.val_check_interval=4", "trainer.log_every_n_steps=1",
    "decoding.max_new_tokens=3", "callbacks.checkpoints.every_steps=3", "encoder.tiny.num_hidden_layers=1",
    "decoder.tiny.num_hidden_layers=1", "encoder.tiny.hidden_dropout=0.1",
]  # fmt: skip
LAUNCHED_BY = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "SLURM", "TORCHELASTIC", "SUBMITIT", "SEDTRAIN")


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables that a launcher would; there are no others."""
    for name in [each for each in os.environ if each.startswith(LAUNCHED_BY)]:
        monkeypatch.delenv(name)

    def launched(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return launched


# --- who speaks


@pytest.mark.parametrize(
    ("variables", "first", "first_of_machine"),
    [
        ({}, True, True),
        ({"RANK": 0, "LOCAL_RANK": 0, "GROUP_RANK": 0}, True, True),
        ({"RANK": 1, "LOCAL_RANK": 1}, False, False),
        ({"RANK": 8, "LOCAL_RANK": 0, "GROUP_RANK": 1}, False, True),
        ({"RANK": 0, "LOCAL_RANK": 0, "SLURM_PROCID": 1}, True, True),  # torchrun, once on each node of SLURM
        ({"SLURM_PROCID": 0, "SLURM_LOCALID": 0}, True, True),
        ({"SLURM_PROCID": 8, "SLURM_LOCALID": 0}, False, True),
        ({"SLURM_PROCID": 3, "SLURM_LOCALID": 3}, False, False),
        ({"NODE_RANK": 0, "LOCAL_RANK": 0}, True, True),  # Lightning's own
        ({"NODE_RANK": 0, "LOCAL_RANK": 1}, False, False),
        ({"NODE_RANK": 1, "LOCAL_RANK": 0}, False, True),
        ({"NODE_RANK": 1}, False, True),
        ({"SLURM_PROCID": 0, "LOCAL_RANK": 1}, False, False),  # Lightning's own, in a shell of SLURM
    ],
)
def test_one_process_of_all_is_the_first_and_one_of_each_machine(environment, variables, first, first_of_machine):
    environment(**variables)
    assert (ranks.is_first(), ranks.is_first_of_machine()) == (first, first_of_machine)


def test_what_is_not_trained_is_done_by_one_process(environment, sedtrain, tmp_path, corpus):
    environment(RANK=1, LOCAL_RANK=1, WORLD_SIZE=2)
    ended = sedtrain("task=inspect", "data=parquet", f"data.path={corpus}", f"run_dir={tmp_path / 'run'}")
    assert (ended.status, ended.out, ended.err) == (0, "", "")
    assert not (tmp_path / "run").exists()


def test_ranks_that_start_from_different_steps_are_refused():
    refuse_different_starts([4, 4], "run/checkpoints")
    with pytest.raises(UserError, match=r"start from different steps, by rank: \[4, 2\]"):
        refuse_different_starts([4, 2], "run/checkpoints")


# --- the folder


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2},
        {"SLURM_NTASKS": 2, "SLURM_PROCID": 0, "SLURM_JOB_NAME": "train"},
        {"NODE_RANK": 0},
    ],
)
def test_a_folder_that_each_process_would_name_otherwise_is_refused(environment, sedtrain, variables):
    environment(**variables)
    ended = sedtrain("encoder=hubert")
    assert ended.status == 2
    assert "each process of this run would take another folder, since the name holds the time" in ended.err
    assert "write run_dir=FOLDER" in ended.err


@pytest.mark.parametrize(
    ("variables", "started"),
    [
        ({}, None),
        ({"LOCAL_WORLD_SIZE": 2, "WORLD_SIZE": 2}, (2, 1)),
        ({"LOCAL_WORLD_SIZE": 8, "GROUP_WORLD_SIZE": 8, "SLURM_NTASKS": 8, "SLURM_NNODES": 8}, (8, 8)),
        ({"SLURM_NTASKS": 64, "SLURM_NNODES": 8}, (8, 8)),
        ({"SLURM_NTASKS": 1}, None),
    ],
)
def test_the_trainer_uses_the_processes_that_were_started(environment, variables, started):
    environment(**variables)
    assert ranks.started_processes() == started
    if started:
        cfg = OmegaConf.create({"task": "train", "trainer": {"devices": "auto"}})
        use_started(cfg, *started)
        assert (cfg.trainer.devices, cfg.trainer.num_nodes) == started


def test_other_processes_than_were_started_are_refused(environment, sedtrain, tmp_path):
    environment(RANK=0, LOCAL_RANK=0, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2)
    ended = sedtrain(f"run_dir={tmp_path}", "trainer.devices=4")
    assert ended.status == 2
    assert "trainer.devices = 4\n    2 were started\n    leave trainer.devices out" in ended.err


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2},
        {"SLURM_NTASKS": 2, "SLURM_NNODES": 2, "SLURM_PROCID": 0, "SLURM_JOB_NAME": "fit"},
    ],
)
def test_batches_are_fitted_by_one_process(environment, sedtrain, tmp_path, variables):
    environment(**variables)
    ended = sedtrain("task=fit_batches", "memory_gb=1.5", f"run_dir={tmp_path / 'run'}")
    assert ended.status == 2
    assert "task = 'fit_batches'\n    trial steps need one process, and 2 were started" in ended.err
    assert "start one, with the trainer.devices=NUMBER and trainer.num_nodes=NUMBER" in ended.err
    assert not (tmp_path / "run").exists()


def test_a_shell_of_slurm_is_no_launch(environment):
    environment(SLURM_NTASKS=4, SLURM_PROCID=0, SLURM_JOB_NAME="interactive")
    assert not ranks.started_side_by_side()


def test_a_run_is_gone_on_with_by_the_launch_that_began_it_and_by_no_other(environment, tmp_path):
    def agent(name, restarts):
        file = f"/tmp/{name}/attempt_{restarts}/0/error.json"
        environment(TORCHELASTIC_RUN_ID="none", TORCHELASTIC_ERROR_FILE=file, TORCHELASTIC_RESTART_COUNT=restarts)
        return ranks.is_restart_of(str(tmp_path))

    assert not agent("a", 1), "nothing says who began it"
    assert not agent("a", 0)
    ranks.note_launch(str(tmp_path))
    assert not agent("a", 0)
    assert agent("a", 1)
    assert not agent("b", 0)
    assert not agent("b", 1), "another torchrun, started by hand, whose first attempt was refused"


def test_a_job_that_slurm_has_requeued_goes_on(environment, tmp_path):
    environment(SLURM_JOB_ID=71)
    ranks.note_launch(str(tmp_path))
    assert not ranks.is_restart_of(str(tmp_path))
    environment(SLURM_RESTART_COUNT=1)
    assert ranks.is_restart_of(str(tmp_path))
    environment(SLURM_JOB_ID=72)
    assert not ranks.is_restart_of(str(tmp_path))


def test_a_restart_takes_its_own_checkpoints_before_those_it_began_from(tmp_path):
    assert ranks.resume_of_restart(str(tmp_path), "none") == "auto"
    assert ranks.resume_of_restart(str(tmp_path), "other.ckpt") == "other.ckpt"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/previous.ckpt").touch()
    assert ranks.resume_of_restart(str(tmp_path), "other.ckpt") == "auto"


# --- Lightning's own


def test_where_a_training_fails_the_processes_that_were_started_beside_it_end(sedtrain, corpus, tmp_path, monkeypatch):
    beside = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    launcher = SimpleNamespace(procs=[beside])

    def fit(trainer, *_, **__):
        trainer.strategy._launcher = launcher
        raise UserError("run_dir", "run", "what is wrong", "write something else")

    monkeypatch.setattr("lightning.Trainer.fit", fit)
    ended = sedtrain("data=parquet", f"data.path={corpus}", f"run_dir={tmp_path / 'run'}")
    assert ended.status == 2
    assert launcher.procs == [], "Lightning would end this process too"
    assert beside.wait(10) == -signal.SIGKILL


# --- torchrun


def torchrun(folder, *command):
    """Exit status and words of two gloo processes, copies of the one that launches them."""
    launch = Forked(folder, "--nproc-per-node=2", "--start-method=fork", *command, module="torch.distributed.run")
    status = launch.wait()
    launch.kill()
    return status, launch.out + launch.err


def test_a_killed_rank_brings_the_run_back_to_the_same_weights(environment, corpus, tmp_path):
    """One of two gloo processes, with a data worker each, in the middle of an epoch."""
    script = ROOT / "tests/struck.py"
    arguments = [*SHORT, f"data.path={corpus}", "data.num_workers=1"]
    options = ["--max-restarts=3", "--master-port=29641", "--run-path"]
    status, words = torchrun(tmp_path, *options, script, tmp_path, *arguments)
    assert status == 0, words
    assert (tmp_path / "struck").read_text().splitlines() == ["struck, restarts 0", "ended, restarts 1"]
    assert words.count("lost the connection to another process of this run") == 1
    assert f"continuing from {tmp_path}/killed/checkpoints/last.ckpt, step 4" in words
    assert "Traceback" not in words
    assert whole_checkpoints(tmp_path / "killed")
    assert list(differences(tmp_path / "killed", tmp_path / "never")) == []
    killed, never = (
        json.loads((tmp_path / name / "results.json").read_text())["train"] for name in ("killed", "never")
    )
    assert killed["utterances"] == never["utterances"] > 0


def test_a_mistake_is_told_once(environment, tmp_path):
    status, words = torchrun(tmp_path, "--max-restarts=0", "--master-port=29642", "-m", "sedtrain", "encoder=hubrt")
    assert status == 1
    assert words.count("encoder has no option 'hubrt'") == 1


# --- SLURM


def test_a_job_of_slurm_with_two_processes_is_requeued_and_goes_on_in_its_folder(environment, corpus, tmp_path):
    """What submitit and Hydra do is theirs; the commands of SLURM are stand-ins."""
    slurm.write_commands(tmp_path)
    struck = ["_target_=struck.Struck", "file=${run_dir}/struck", "rank=1", "step=2", f"number={int(signal.SIGUSR2)}"]
    arguments = [*SHORT, f"data.path={corpus}", "adapter=linear", *(f"+callbacks.struck.{each}" for each in struck)]
    launcher = ["hydra/launcher=slurm", "hydra.launcher.gpus_per_node=2", "hydra.launcher.partition=gpu"]
    with contextlib.chdir(tmp_path):
        ended = Forked(tmp_path, "-m", *launcher, *arguments, PATH=f"{tmp_path}:{os.environ['PATH']}")
        slurm.run_tasks(tmp_path, ended)
    assert ended.returncode == 0, ended.err
    [sweep] = (tmp_path / "runs").iterdir()
    asked = set(re.findall("#SBATCH --(.*)", (tmp_path / "job.sh").read_text()))
    assert asked >= {"partition=gpu", "gpus-per-node=2", "ntasks-per-node=2", "signal=USR2@300", "time=1440"}
    words = (sweep / ".submitit" / slurm.JOB / f"{slurm.JOB}_0_log.out").read_text()
    assert "Requeued job 4711 (100 remaining timeouts)" in words
    assert f"continuing from {sweep.relative_to(tmp_path)}/0/checkpoints/last.ckpt, step 3" in words
    assert (sweep / "0/struck").read_text() == "struck, restarts 0\nended, restarts 0\n"
    assert read_checkpoint(sweep / "0/checkpoints/last.ckpt")["global_step"] == 8
    assert json.loads((sweep / "0/results.json").read_text())["num_utterances"] == 6


def test_a_job_that_fails_in_another_process_is_told_of(sedtrain, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    ended = sedtrain(
        "-m", "hydra/launcher=submitit_local", f"hydra.sweep.dir={tmp_path}", "adapter=linear", f"run_dir={run}"
    )
    assert ended.status == 2
    told = f"jobs of the sweep that failed: 1\n  0 (adapter=linear run_dir={run}): exit status 2\n"
    assert ended.err.endswith(told)
    [log] = tmp_path.glob(".submitit/*/*.err")
    assert "this folder already holds a run" in log.read_text()


def test_without_slurm_the_launcher_says_so(sedtrain, tmp_path):
    ended = sedtrain("-m", "hydra/launcher=slurm", f"hydra.sweep.dir={tmp_path}")
    assert (ended.status, ended.err.count("\n")) == (1, 1)
    assert 'Could not detect "srun"' in ended.err


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("hydra.launcher.partitoin=gpu", "did you mean 'partition'?"),
        ("hydra.launcher.timeout_min=long", "Value 'long' of type 'str' could not be converted to Integer"),
    ],
)
def test_mistakes_in_options_of_the_launcher_are_told(option, words):
    assert check_command_line(["-m", "hydra/launcher=slurm", "hydra.launcher.partition=gpu", "seed=1,2"])
    with pytest.raises(UserError, match="1 problem") as raised:
        check_command_line(["-m", "hydra/launcher=slurm", option])
    assert words in str(raised.value)


def test_without_its_packages_the_launcher_names_the_extra(monkeypatch):
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], "submitit_slurm.yaml")
    with pytest.raises(UserError) as raised:
        check_command_line(["-m", "hydra/launcher=slurm", "hydra.launcher.partition=gpu"])
    wrong = "hydra/launcher=slurm needs packages that are not installed"
    assert raised.value.args == ("hydra/launcher", "slurm", wrong, "pip install 'sedtrain[slurm]'")
