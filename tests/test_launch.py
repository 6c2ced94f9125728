"""A training that torchrun or SLURM launched: who speaks, in which folder, and how it goes on when a process was killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kill_and_resume import differences, whole_checkpoints

from sedtrain import ranks
from sedtrain.batch import UserError
from sedtrain.checkpoints import refuse_different_starts

ROOT = Path(__file__).parents[1]
SHORT = [
    "data=parquet", "data.batch_seconds=6", "vocabulary_texts=0", "trainer.accelerator=cpu", "trainer.devices=2",
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
    refuse_different_starts([{"step": 4}, {"step": 4}])
    with pytest.raises(UserError, match=r"start from different steps, by rank: \[4, 2\]"):
        refuse_different_starts([{"step": 4}, {"step": 2}])


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
    assert "the processes of this run would each take another folder: its name holds the time" in ended.err
    assert "write run_dir=FOLDER" in ended.err


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


# --- torchrun


def torchrun(folder, *command):
    """Exit status and words of two gloo processes."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHED_BY)}
    with (folder / "out").open("w") as out:  # a pipe would stay open as long as any process lives
        launch = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *map(str, command)],
            cwd=ROOT, env=env | {"PYTHONPATH": path}, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
        try:
            status = launch.wait(200)
        finally:
            launch.kill()
    return status, (folder / "out").read_text()


def test_a_killed_rank_brings_the_run_back_to_the_same_weights(corpus, tmp_path):
    """One of two gloo processes, with a data worker each, in the middle of an epoch."""
    script = ROOT / "tests/struck.py"
    arguments = [*SHORT, f"data.path={corpus}", "data.num_workers=1"]
    status, words = torchrun(tmp_path, "--max-restarts=3", "--master-port=29641", script, tmp_path, *arguments)
    assert status == 0, words
    assert (tmp_path / "struck").read_text().splitlines() == ["killed, restarts 0", "ended, restarts 1"]
    assert words.count("lost the connection to another process of this run") == 1
    assert f"continuing from {tmp_path}/killed/checkpoints/last.ckpt, step 4" in words
    assert "Traceback" not in words
    assert whole_checkpoints(tmp_path / "killed")
    assert list(differences(tmp_path / "killed", tmp_path / "never")) == []


def test_a_run_of_another_launch_is_refused_at_each_attempt_in_one_message(corpus, trained, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    arguments = [*SHORT, f"data.path={corpus}", f"run_dir={trained}"]
    status, words = torchrun(tmp_path, "--max-restarts=1", "--master-port=29642", "-m", "sedtrain", *arguments)
    assert status == 1
    assert words.count("1 problem in the configuration:") == words.count("this folder already holds a run") == 2
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before
