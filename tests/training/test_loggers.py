"""Loggers hold a run, also one that resumes, and never stop it."""

import csv
import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from wandb.proto.wandb_internal_pb2 import Record

from sedtrain.build import loggers
from sedtrain.config.schema import conf_dir, register
from sedtrain.errors import UserError
from sedtrain.evaluation.results import Hypothesis, installed_versions
from sedtrain.training.loggers import MetricsFile, TensorBoard
from sedtrain.training.tracking import Tracker, commit

SHORT = [
    "encoder.tiny.num_hidden_layers=1", "decoder.tiny.num_hidden_layers=1", "decoding.max_new_tokens=5",
    "trainer.max_steps=4", "trainer.val_check_interval=1", "trainer.log_every_n_steps=1", "data.batch_seconds=8",
    "callbacks.checkpoints.every_steps=1", "finetune.learning_rates.encoder=0.5",
]  # fmt: skip
MINE = """
import lightning
from lightning.pytorch.loggers import Logger

class Crash(lightning.Callback):
    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_step == 3:
            raise RuntimeError("the power is cut")

class Raising(Logger):
    name = version = None

    def __init__(self, where):
        if where == "constructor":
            raise RuntimeError("no constructor")
        super().__init__()
        self.where = where

    def __getattribute__(self, name):
        if name != "where" and name == self.where:
            raise RuntimeError(f"no {name}")
        return super().__getattribute__(name)

    def log_metrics(self, metrics, step=None): pass
    def log_hyperparams(self, params, *args, **kwargs): pass
    def log_samples(self, samples, step): pass
    def keep_before(self, step): pass
"""
METHODS = [
    "constructor", "log_metrics", "log_hyperparams", "log_samples", "log_graph", "after_save_checkpoint", "keep_before",
    "save", "finalize",
]  # fmt: skip


@pytest.fixture(scope="module")
def command(sedtrain, corpus, tmp_path_factory):
    """A short training in a folder of that name, with overrides; returns how it ended, and the folder."""
    place = tmp_path_factory.mktemp("runs")
    (place / "failing.py").write_text(MINE)

    def run(name, *overrides):
        folder = place / name
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(place)
            ended = sedtrain("data=parquet", f"data.path={corpus}", f"run_dir={folder}", *SHORT, *overrides)
        return ended, folder

    return run


@pytest.fixture(scope="module")
def plain(command):
    """A run that is never cut, with metrics.csv alone."""
    ended, folder = command("plain")
    assert ended.status == 0, ended.err
    return folder


@pytest.fixture(scope="module")
def resumed(command):
    """A run of three loggers, cut in its fourth step, right after the checkpoint of its second, and taken up again."""
    several = ["logger=[csv,tensorboard,wandb]", "resume=auto", "callbacks.checkpoints.every_steps=null"]
    with pytest.raises(RuntimeError, match="the power is cut"):
        command("resumed", *several, "+callbacks.crash._target_=failing.Crash")
    folder = command("resumed")[1]
    # as if it had been killed in the middle of writing the newest checkpoint
    (folder / "checkpoints/previous.ckpt").replace(folder / "checkpoints/last.ckpt")
    ended, _ = command("resumed", *several)
    assert ended.status == 0, ended.err
    assert re.search("continuing from .*, step 2", ended.err)
    return folder


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def curves(folder):
    """(step, value) of each column of metrics.csv, rounded as TensorBoard does."""
    found = {}
    for row in rows(folder):
        for name in row.keys() - {"step"}:
            if row[name]:
                found.setdefault(name, []).append((int(row["step"]), pytest.approx(float(row[name]), rel=1e-6)))
    return found


@pytest.fixture(scope="module")
def events(resumed):
    accumulator = EventAccumulator(str(resumed / "tensorboard"))
    accumulator.Reload()
    return accumulator


# --- what loggers hold


def test_metrics_csv_is_that_of_a_run_never_cut_and_of_fewer_loggers(plain, resumed):
    assert rows(plain) == rows(resumed)
    assert (plain / "samples.jsonl").read_text() == (resumed / "samples.jsonl").read_text()
    weights = [(each / "model/model.safetensors").read_bytes() for each in (plain, resumed)]
    assert weights[0] == weights[1]


def test_tensorboard_shows_every_curve_with_each_step_once(plain, events):
    expected = curves(plain)
    assert {"train/loss", "val/loss", "val/wer", "learning_rate/encoder", "gradient_norm/decoder"} <= expected.keys()
    assert set(events.Tags()["scalars"]) == expected.keys()
    for name, curve in expected.items():
        assert [(each.step, each.value) for each in events.Scalars(name)] == curve, name


def test_the_scores_of_the_test_split_are_logged_with_their_intervals(resumed, events):
    for name, interval in json.loads((resumed / "results.json").read_text())["metrics"].items():
        for suffix, key in (("", "value"), ("_low", "low"), ("_high", "high")):
            [scalar] = events.Scalars(f"test/{name}{suffix}")
            assert (scalar.step, scalar.value) == (4, pytest.approx(interval[key]))


def text(events, name):
    """The last text of a name that TensorBoard shows, and its step."""
    last = events.Tensors(f"{name}/text_summary")[-1]
    return make_ndarray(last.tensor_proto)[0].decode(), last.step


def test_configuration_commit_and_versions_are_logged(resumed, events):
    stored = OmegaConf.to_container(OmegaConf.load(resumed / "config.yaml"))
    shown = OmegaConf.to_container(OmegaConf.create(text(events, "config")[0].strip("`").removeprefix("yaml")))
    assert shown["optimizer"] == stored["optimizer"]
    assert shown.keys() == stored.keys()
    assert f"torch: {installed_versions()['torch']}" in text(events, "versions")[0]
    environment = json.loads((resumed / "environment.json").read_text())
    assert environment == {"commit": commit(), "versions": installed_versions()}
    if environment["commit"]:
        assert environment["commit"]["id"] in text(events, "commit")[0]


def test_the_same_utterances_are_shown_at_every_validation(plain, events):
    lines = [json.loads(line) for line in (plain / "samples.jsonl").read_text().splitlines()]
    assert Counter(line["step"] for line in lines) == dict.fromkeys(range(4), 6)
    assert len({line["id"] for line in lines}) == 6
    shown, step = text(events, "samples")
    last = [line for line in lines if line["step"] == step]
    assert step == 3
    assert shown.splitlines()[2:] == [f"| {each['id']} | {each['reference']} | {each['hypothesis']} |" for each in last]


def test_learning_rates_are_logged_of_each_part(plain):
    """A cosine over four steps; the encoder at half the rate."""
    peak = float(OmegaConf.load(plain / "config.yaml").optimizer.lr)
    for part, scale in (("encoder", 0.5), ("decoder", 1.0)):
        logged = [float(row[f"learning_rate/{part}"]) for row in rows(plain) if row[f"learning_rate/{part}"]]
        assert logged == pytest.approx([peak * scale * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)])


def records(file):
    """The records of a file of wandb, whose frame is that of LevelDB's logs."""
    content, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        room = 32768 - place % 32768
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        if room < 7 or kind == 0:
            place += room
            continue
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b""


def test_wandb_works_offline_and_a_run_that_goes_on_is_the_same_run(resumed):
    files = sorted(resumed.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    runs = [list(records(file)) for file in files]
    ids = {each.run.run_id for run in runs for each in run if each.WhichOneof("record_type") == "run"}
    assert ids == {(resumed / "wandb/id.txt").read_text()}
    keys = {item.key or item.nested_key[0] for each in runs[1] for item in each.history.item}
    assert {"train/loss", "val/wer", "learning_rate/encoder", "samples", "test/wer", "test/wer_low"} <= keys
    assert [each.exit.exit_code for run in runs for each in run if each.WhichOneof("record_type") == "exit"] == [1, 0]
    config = {item.key: item.value_json for run in runs for each in run for item in each.run.config.update}
    config |= {item.key: item.value_json for run in runs for each in run for item in each.config.update}
    assert {"config", "commit", "versions"} <= config.keys()


# --- loggers never stop a run


def test_loggers_that_raise_anywhere_are_told_once_and_change_nothing(command, plain):
    raising = [f"+logger.{each}={{_target_: failing.Raising, where: {each}}}" for each in METHODS]
    ended, folder = command("raising", *raising)
    assert ended.status == 0, ended.err
    told = re.findall(r"^logger=(\w+) failed in ([\w ]+) and is left out; .*: RuntimeError: (.*)$", ended.err, re.M)
    expected = {each: (each.replace("constructor", "its constructor"), f"no {each}") for each in METHODS}
    del expected["keep_before"]  # of runs that go on
    assert {name: rest for name, *rest in map(list, told)} == {name: list(rest) for name, rest in expected.items()}
    assert len(told) == len(expected)
    assert rows(folder) == rows(plain)
    assert (folder / "model/model.safetensors").read_bytes() == (plain / "model/model.safetensors").read_bytes()


class Raises:
    def __getattr__(self, name):
        raise OSError(f"no {name}")


@pytest.mark.parametrize("method", ["keep_before", "log_samples", "save_dir", "close"])
def test_a_logger_that_raised_is_not_asked_again(method, caplog):
    tracker = Tracker("mine", Raises)
    for _ in range(2):
        attribute = getattr(tracker, method)
        if callable(attribute):
            attribute(*{"keep_before": [3], "log_samples": [[], 3]}.get(method, []))
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("logger=mine failed in ")


class ExitsOrEmpties:
    def save(self):
        sys.exit(3)

    def log_metrics(self, metrics, step):
        metrics.clear()


def test_a_logger_that_ends_the_process_is_left_out(caplog):
    Tracker("mine", ExitsOrEmpties).save()
    assert caplog.messages == [
        "logger=mine failed in save and is left out; training continues without it: SystemExit: 3"
    ]


def test_what_a_logger_does_with_what_it_is_given_does_not_reach_the_others():
    metrics = {"loss": 1.0}
    Tracker("mine", ExitsOrEmpties).log_metrics(metrics, 0)
    assert metrics == {"loss": 1.0}


def test_a_disk_that_is_full_takes_the_metrics_away_and_not_the_run(tmp_path, caplog, monkeypatch):
    tracker = Tracker("csv", lambda: MetricsFile(tmp_path))
    tracker.log_metrics({"loss": 1.0}, 0)
    monkeypatch.setattr(Path, "open", full)
    tracker.log_samples([Hypothesis("a", "b", "c")], 0)
    tracker.log_metrics({"loss": 1.0}, 1)
    assert caplog.messages == [
        "logger=csv failed in log_samples and is left out; training continues without it: OSError: [Errno 28] no space"
    ]


def full(*_, **__):
    raise OSError(28, "no space")


def test_other_ranks_than_the_first_make_and_tell_no_logger(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    made = []
    tracker = Tracker("mine", lambda: made.append("one"))
    tracker.log_metrics({"loss": 1.0}, 0)
    assert made == []


# --- which there are


@pytest.fixture
def made(tmp_path):
    """The loggers of a command line."""

    def run(*overrides):
        register()
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return loggers(compose("train", [*overrides, f"run_dir={tmp_path}"]))

    return run


def test_loggers_are_chosen_by_name_one_or_several(made):
    assert [each.label for each in made()] == ["csv"]
    assert [each.label for each in made("logger=[csv,tensorboard]")] == ["csv", "tensorboard"]
    assert made("logger=none") == []
    assert made("logger=[csv,tensorboard]", "logger.csv=null")[0].label == "tensorboard"


def test_a_missing_package_is_told_with_the_extra(made, monkeypatch):
    name = "tensorboard"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError) as error:
        made(f"logger={name}")
    assert (error.value.option, error.value.value) == ("logger", name)
    assert error.value.wrong.startswith(f"this logger needs {name}: ")
    assert error.value.write == f"pip install 'sedtrain[{name}]', or write logger=csv"


def test_a_package_that_a_user_s_own_logger_lacks_is_told(made, tmp_path, monkeypatch):
    (tmp_path / "lacking.py").write_text("def make():\n    import nowhere_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="No module named 'nowhere_at_all'"):
        made("+logger.mine._target_=lacking.make")


def test_texts_stay_in_their_cells(tmp_path):
    board = TensorBoard(str(tmp_path))
    board.log_samples([Hypothesis("a", "one | two", "three\nfour")], 0)
    board.finalize("success")
    shown = EventAccumulator(str(tmp_path))
    shown.Reload()
    assert text(shown, "samples")[0].splitlines()[2] == "| a | one \\| two | three four |"


# --- the commit


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    ended = subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return ended.stdout.strip()


def test_the_commit_is_that_of_the_working_directory_and_whether_it_has_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() is None
    git(tmp_path, "init")
    assert commit() is None
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    git(tmp_path, "tag", "v1")
    assert commit() == {"id": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("two")
    assert commit() == {"id": git(tmp_path, "rev-parse", "HEAD"), "dirty": True}


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit() is None
