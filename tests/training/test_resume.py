"""`resume` resumes a run, starts one, starts another from its checkpoint, or is refused with a reason."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import cut_corpus
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file

from sedtrain import build
from sedtrain.build import settings_of
from sedtrain.config.schema import conf_dir, register
from sedtrain.errors import UserError
from sedtrain.run_dir import keep_until
from sedtrain.training import checkpoint_files
from sedtrain.training.checkpoint_files import newest_whole, read_checkpoint, write_checkpoint
from sedtrain.training.resume import FREE, decisive, refuse_other_settings

AVERAGED = "callbacks=[default,ema]"
SHORT = ["trainer.log_every_n_steps=1", "decoding.max_new_tokens=5"]


@pytest.fixture
def command(sedtrain, corpus):
    def run(folder, *overrides, steps=3):
        given = ["data=parquet", f"data.path={corpus}", f"trainer.max_steps={steps}", *SHORT, *overrides]
        return sedtrain(*given, f"run_dir={folder}")

    return run


@pytest.fixture
def stopped(trained, tmp_path):
    """The folder of a run that was killed in its middle, as far as this can be seen from its files."""
    folder = tmp_path / "stopped"
    shutil.copytree(trained, folder)
    shutil.rmtree(folder / "model")
    return folder


def decoding(*overrides):
    return ["resume=auto", "decoding.max_new_tokens=12", *overrides]  # as `trained`


def step_of(folder, name="last"):
    return read_checkpoint(folder / f"checkpoints/{name}.ckpt")["global_step"]


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "sedtrain.log"}


# --- auto


def test_a_run_that_has_finished_says_so_and_does_nothing(command, trained):
    before = files(trained)
    ended = command(trained, *decoding())
    assert ended.status == 0
    assert ended.err == f"run_dir={trained}: this run has finished, there is nothing to do\n"
    assert files(trained) == before


@pytest.mark.parametrize("override", ["trainer.max_steps=6", "encoder=wavlm", "data.path=/nowhere", "split=validation"])
def test_a_finished_run_that_is_asked_for_something_else_says_what_differs(command, trained, override):
    before = files(trained)
    ended = command(trained, *decoding(override))
    name, value = override.split("=")
    name = name.replace("encoder", "encoder.model_type")
    assert ended.status == 2
    assert re.search(rf"^ *{name}: .+ then, .*{value}.* now$", ended.err, re.MULTILINE)
    assert f"resume={trained}/checkpoints/last.ckpt run_dir=ANOTHER_FOLDER" in ended.err
    assert files(trained) == before


@pytest.mark.parametrize("override", ["split=validation", "data.max_bad_fraction=0.5", "data.on_bad_utterance=error"])
def test_an_unfinished_run_may_be_scored_on_another_split_and_be_stricter_with_its_data(stopped, override):
    name, value = override.split("=")
    settings = OmegaConf.load(stopped / "config.yaml")
    OmegaConf.update(settings, name, value)
    refuse_other_settings(stopped, OmegaConf.to_container(settings))


def test_a_run_without_its_configuration_is_refused_for_that(stopped):
    settings = OmegaConf.to_container(OmegaConf.load(stopped / "config.yaml"))
    (stopped / "config.yaml").unlink()
    with pytest.raises(
        UserError, match=r"config\.yaml is missing, so the settings of its checkpoints are unknown"
    ) as caught:
        refuse_other_settings(stopped, settings)
    assert f"resume={stopped}/checkpoints/last.ckpt run_dir=ANOTHER_FOLDER" in caught.value.write


def test_a_folder_in_the_place_of_the_last_checkpoint_is_named(stopped):
    last = stopped / "checkpoints" / "last.ckpt"
    last.unlink()
    last.mkdir()
    with pytest.raises(UserError, match=r"its last\.ckpt is a folder, not a checkpoint"):
        newest_whole(stopped / "checkpoints")


def test_a_run_killed_after_training_is_scored_without_training_again(command, trained, stopped):
    before = (stopped / "checkpoints/last.ckpt").read_bytes()
    ended = command(stopped, *decoding())
    assert ended.status == 0, ended.err
    assert f"continuing from {stopped}/checkpoints/last.ckpt, step 3" in ended.err
    assert (stopped / "checkpoints/last.ckpt").read_bytes() == before
    assert (stopped / "metrics.csv").read_text() == (trained / "metrics.csv").read_text()
    again, first = (json.loads((each / "results.json").read_text()) for each in (stopped, trained))
    assert again["metrics"] == first["metrics"]
    assert again["train"] == first["train"]
    log = (stopped / "sedtrain.log").read_text()
    assert log.startswith((trained / "sedtrain.log").read_text().splitlines()[0])


def test_resuming_hashes_and_loads_the_checkpoint_once(command, stopped, monkeypatch):
    hashed, loaded, has_digest, load = [], [], checkpoint_files.has_digest, torch.load

    def counted(path, mmap=False, **options):
        loaded.append((path.name, mmap))
        return load(path, mmap=mmap, **options)

    monkeypatch.setattr(
        checkpoint_files, "has_digest", lambda *given: hashed.append(given[0].name) or has_digest(*given)
    )
    monkeypatch.setattr(checkpoint_files.torch, "load", counted)
    ended = command(stopped, *decoding())
    assert ended.status == 0, ended.err
    assert hashed.count("last.ckpt") == 1 and loaded.count(("last.ckpt", False)) == 1


def test_where_there_is_no_checkpoint_it_starts(command, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 7\n")  # killed before its first checkpoint
    (folder / "metrics.csv").write_text("step,train/loss\n0,1.0\n")
    (folder / "skipped.jsonl").write_text('{"id": "a", "reason": "too long", "detail": ""}\n{"id": "b')
    ended = command(folder, "resume=auto", steps=1)
    assert ended.status == 0, ended.err
    assert json.loads((folder / "results.json").read_text())["skipped"] == {}
    assert "0,1.0" not in (folder / "metrics.csv").read_text()
    assert not (folder / "skipped.jsonl").exists()


def test_other_settings_that_decide_the_weights_are_refused_by_name_and_others_are_free(command, stopped):
    other = ["optimizer.lr=0.1", "data.batch_seconds=12", "logger=none", "data.num_workers=0", "trainer.devices=1"]
    ended = command(stopped, *decoding(), *other, steps=5)
    assert ended.status == 2
    lr = OmegaConf.load(stopped / "config.yaml").optimizer.lr
    listed = (
        f"  run_dir = '{stopped}'\n"
        "    this folder holds a run with other settings:\n"
        "      data.batch_seconds: 24 then, 12 now\n"
        f"      optimizer.lr: {lr} then, 0.1 now\n"
        "      trainer.max_steps: 3 then, 5 now\n"
        "    write the settings of that run, or "
        f"resume={stopped}/checkpoints/last.ckpt run_dir=ANOTHER_FOLDER to start another run from it\n"
    )
    assert listed in ended.err


def test_a_run_goes_on_where_an_option_of_a_later_version_is_false(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\ndata: {path: a}\n")
    now = {"seed": 1, "data": {"path": "a", "cache_features": False}}
    refuse_other_settings(tmp_path, now)
    now["data"]["cache_features"] = True
    with pytest.raises(UserError, match="cache_features: None then, True now"):
        refuse_other_settings(tmp_path, now)


def test_a_precision_of_the_machine_is_refused_on_another_with_another(tmp_path, monkeypatch):
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("train", ["run_dir=run"])
    here = settings_of(config)
    monkeypatch.setattr(build, "precision_of", lambda device: "bf16-mixed")
    there = settings_of(config)
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(there))
    refuse_other_settings(tmp_path, there)
    with pytest.raises(UserError, match=r"settings:\n *trainer.precision: bf16-mixed then, 32-true now\n"):
        refuse_other_settings(tmp_path, here)


def test_a_damaged_last_checkpoint_gives_way_to_the_newest_that_is_whole(command, stopped):
    last = stopped / "checkpoints/last.ckpt"
    damaged = bytearray(last.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    last.write_bytes(damaged)
    ended = command(stopped, *decoding())
    assert ended.status == 0, ended.err
    assert f"{last} is missing or damaged; continuing from best.ckpt" in ended.err
    assert (stopped / "results.json").stat().st_mtime > last.stat().st_mtime


def test_where_all_checkpoints_are_damaged_it_says_so(command, stopped):
    for path in (stopped / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    ended = command(stopped, *decoding())
    assert ended.status == 2
    assert f"run_dir = '{stopped}'\n    every checkpoint of this run is damaged: best.ckpt, last.ckpt" in ended.err
    assert "run_dir=ANOTHER_FOLDER, to train anew" in ended.err


def test_the_lists_of_a_run_hold_what_was_before_its_checkpoint_once(tmp_path):
    file = tmp_path / "bad_steps.jsonl"
    file.write_text('{"step": 3}\n{"step": 5}\n{"id": "x"}\n{"step": 4}\n{"st')
    keep_until(4, file)
    assert file.read_text() == '{"step": 3}\n{"id": "x"}\n{"step": 4}\n'
    keep_until(4, tmp_path / "none.jsonl")


def test_skipped_utterances_are_listed_once_over_restarts(command, stopped, tmp_path):
    corpus = cut_corpus(Path(OmegaConf.load(stopped / "config.yaml").data.path), tmp_path / "data", train=8)
    for split in ("validation", "test"):
        shutil.copy(corpus.parent / "data/train.parquet", corpus / f"{split}.parquet")
    folder, given = tmp_path / "run", ["data.max_seconds=1.85", f"data.path={corpus}", "resume=auto"]
    assert command(folder, *given, steps=1).status == 0
    listed, counted = (
        (folder / "skipped.jsonl").read_text(),
        json.loads((folder / "results.json").read_text())["skipped"],
    )
    assert {json.loads(line)["reason"] for line in listed.splitlines()} == {"too long"}
    assert counted == {"too long": len(listed.splitlines())}
    shutil.rmtree(folder / "model")
    assert command(folder, *given, steps=1).status == 0
    assert (folder / "skipped.jsonl").read_text() == listed
    assert json.loads((folder / "results.json").read_text())["skipped"] == counted


# --- none


def test_a_folder_that_holds_a_run_is_not_gone_on_with_unasked(command, trained):
    ended = command(trained)
    assert ended.status == 2
    assert "this folder already holds a run" in ended.err
    assert "write run_dir=ANOTHER_FOLDER, or resume=auto to resume this run" in ended.err


def test_an_evaluation_never_writes_into_a_run(sedtrain, trained):
    ended = sedtrain("task=evaluate", f"checkpoint={trained}", f"run_dir={trained}", "resume=auto")
    assert ended.status == 2
    assert "this folder already holds a run" in ended.err


# --- a path


def check_starts_from_another_run(command, trained, folder, start, *overrides):
    ended = command(folder, f"resume={start}", *overrides, steps=5)
    assert ended.status == 0, ended.err
    results = json.loads((folder / "results.json").read_text())
    assert results["train"]["steps"] == step_of(folder) == 5
    assert (folder / "metrics.csv").read_text().splitlines()[1:]
    assert step_of(trained) == 3


def test_another_run_starts_from_a_checkpoint(command, trained, tmp_path):
    check_starts_from_another_run(
        command, trained, tmp_path / "run", trained / "checkpoints/last.ckpt", "optimizer.lr=1e-5"
    )


def column(folder, name):
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_another_run_starts_from_a_run_with_its_own_learning_rates_and_weight_decay(command, trained, tmp_path):
    theirs = ["optimizer.lr=1e-5", "optimizer.weight_decay=0.5", "scheduler=constant"]
    check_starts_from_another_run(command, trained, tmp_path / "run", trained, *theirs)
    assert column(tmp_path / "run", "learning_rate/encoder") == pytest.approx([1e-5, 1e-5])
    groups = read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["optimizer_states"][0]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0, 0.5}


def test_another_run_has_its_own_time_patience_and_count_of_bad_steps(command, sedtrain, tmp_path):
    patient = [
        "+callbacks.early._target_=lightning.pytorch.callbacks.EarlyStopping",
        "+callbacks.early.monitor=val/loss",
    ]
    options = [
        *patient,
        "trainer.max_time=00:01:00:00",
        "+callbacks.early.patience=1",
        "+callbacks.early.min_delta=100",
        "trainer.val_check_interval=1",
    ]
    ended = command(tmp_path / "first", *options, steps=9)
    assert ended.status == 0, ended.err
    assert step_of(tmp_path / "first") == 2
    last = tmp_path / "first/checkpoints/last.ckpt"
    content = read_checkpoint(last)
    states = content["callbacks"]
    [timer], [guards] = ([name for name in states if name.startswith(each)] for each in ("Timer", "Guards"))
    states[timer]["time_elapsed"]["train"] = 1e6
    states[guards]["num_bad"] = 3
    write_checkpoint(content, last)
    ended = command(tmp_path / "second", f"resume={last}", *options, steps=9)
    assert ended.status == 0, ended.err
    assert "were left out" not in ended.err
    assert step_of(tmp_path / "second") == 4


def test_weights_alone_are_no_checkpoint_to_start_from(command, trained, tmp_path):
    weights = tmp_path / "average-2.ckpt"
    write_checkpoint({"state_dict": read_checkpoint(trained / "checkpoints/last.ckpt")["state_dict"]}, weights)
    ended = command(tmp_path / "run", f"resume={weights}")
    assert ended.status == 2
    assert f"resume = '{weights}'\n    this checkpoint holds only weights\n    write resume=RUN" in ended.err


def test_a_checkpoint_that_is_not_there_is_refused(command, tmp_path):
    for name in ("atuo", str(tmp_path)):
        ended = command(tmp_path / f"run{len(name)}", f"resume={name}")
        assert ended.status == 2
        assert f"resume = '{name}'\n    there is no such checkpoint" in ended.err
        assert "write resume=auto, resume=none or resume=RUN/checkpoints/last.ckpt" in ended.err


def test_a_damaged_checkpoint_is_refused(command, stopped, tmp_path):
    last = stopped / "checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:-5])
    ended = command(tmp_path / "run", f"resume={last}")
    assert ended.status == 2
    assert (
        f"resume = '{last}'\n    this checkpoint is damaged: the digest in last.ckpt does not match its content"
        in ended.err
    )


def test_a_checkpoint_of_another_model_or_optimizer_is_refused(command, trained, tmp_path):
    last = trained / "checkpoints/last.ckpt"
    ended = command(tmp_path / "wider", f"resume={last}", "encoder.tiny.intermediate_size=96")
    assert ended.status == 2
    assert f"resume = '{last}'\n    this checkpoint is of another model: " in ended.err
    assert "weights differ in name or shape (model." in ended.err
    ended = command(tmp_path / "frozen", f"resume={last}", "optimizer=adafactor")
    assert ended.status == 2
    assert "the run of this checkpoint trained other weights, or with another optimizer" in ended.err


def test_a_checkpoint_that_could_run_code_is_refused(command, tmp_path):
    write_checkpoint({"global_step": 1, "state_dict": Path("x")}, tmp_path / "last.ckpt")
    ended = command(tmp_path / "run", f"resume={tmp_path / 'last.ckpt'}")
    assert ended.status == 2
    assert "could run code, since it holds more than numbers and plain values" in ended.err


# --- averages


@pytest.mark.parametrize(
    ("options", "name"), [("[default,ema]", "callbacks.ema"), ("[default,average]", "callbacks.average")]
)
def test_averages_decide_the_weights_and_may_not_come_or_go(command, stopped, options, name):
    ended = command(stopped, *decoding(f"callbacks={options}"))
    assert ended.status == 2
    assert f"{name}._target_: None then" in ended.err


def test_the_strategy_decides_nothing_and_may_change():
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        of = [
            dict(decisive(settings_of(compose("train", [f"strategy={name}", "run_dir=run"])), FREE))
            for name in ("auto", "ddp", "fsdp")
        ]
    assert of[0] == of[1] == of[2]


@pytest.fixture(scope="module")
def averaged(sedtrain, corpus, tmp_path_factory):
    """The folder of a run like `trained`, whose weights are a moving average."""
    folder = tmp_path_factory.mktemp("runs") / "averaged"
    given = ["data=parquet", f"data.path={corpus}", "trainer.max_steps=3", *SHORT, AVERAGED, f"run_dir={folder}"]
    assert sedtrain(*given).status == 0
    return folder


def test_a_run_killed_after_training_with_an_average_is_scored(command, averaged, tmp_path):
    folder = tmp_path / "killed"
    shutil.copytree(averaged, folder)
    shutil.rmtree(folder / "model")
    ended = command(folder, "resume=auto", AVERAGED)
    assert ended.status == 0, ended.err
    weights, expected = (load_file(each / "model/model.safetensors") for each in (folder, averaged))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_without_the_average_another_run_goes_on_from_the_weights_of_training_themselves(
    command, averaged, trained, tmp_path
):
    for name, start in {"a": averaged, "b": trained}.items():
        ended = command(tmp_path / name, f"resume={start}/checkpoints/last.ckpt", steps=4)
        assert ended.status == 0, ended.err
    a, b = (read_checkpoint(tmp_path / name / "checkpoints/last.ckpt")["state_dict"] for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in b)


# --- the end


def test_damaged_best_weights_give_way_to_the_last(command, stopped):
    damaged = stopped / "checkpoints/best.ckpt"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    ended = command(stopped, *decoding())
    assert ended.status == 0, ended.err
    assert f"{damaged} is missing or damaged, so it is left out of the final weights" in ended.err


@pytest.mark.parametrize("start", [[], ["resume={trained}"]])
def test_a_training_without_a_step_says_so(command, trained, tmp_path, start):
    steps = 3 if start else 0
    ended = command(tmp_path / "run", *(each.format(trained=trained) for each in start), steps=steps)
    assert ended.status == 2
    assert ended.err.endswith(
        f"  trainer.max_steps = {steps}\n"
        "    training made no step: it starts at the step where it ends\n"
        "    write trainer.max_steps=MORE, or trainer.max_epochs=MORE\n"
    )


def test_a_line_that_says_no_step_stays_in_its_list(tmp_path):
    file = tmp_path / "skipped.jsonl"
    file.write_text('no JSON\n{"id": "a"}\n[1]\n{"step": 9}\n')
    keep_until(5, file)
    assert file.read_text() == 'no JSON\n{"id": "a"}\n[1]\n'
