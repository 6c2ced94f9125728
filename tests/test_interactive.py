"""The command line from Python: `sedtrain.run` and `sedtrain.compose`."""

import json
import logging
import sys
import types

import pytest

import sedtrain
from sedtrain import console
from sedtrain.errors import UserError


def test_a_task_runs_in_its_folder_and_leaves_no_log_open(tmp_path, capsys):
    folder = sedtrain.run("task=inspect", "inspect_utterances=5", f"run_dir={tmp_path / 'run'}", "data.num_workers=0")
    assert folder == tmp_path / "run"
    assert json.loads((folder / "inspect.json").read_text(encoding="utf-8"))
    assert "inspect.html" in capsys.readouterr().out
    assert logging.getLogger("sedtrain").handlers == []


@pytest.mark.parametrize("in_notebook", [True, False])
def test_a_notebook_shows_the_log_as_output_and_not_as_errors(in_notebook, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if in_notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    console.open_log()
    logging.getLogger("sedtrain").info("step 3 of 20")
    console.close_log()
    assert tuple(capsys.readouterr()) == (("step 3 of 20\n", "") if in_notebook else ("", "step 3 of 20\n"))


def test_a_composed_run_is_connected_and_not_trained(capsys):
    run = sedtrain.compose("encoder=hubert", "decoder=bert", "logger=none", "data.num_workers=0", "run_dir=nowhere")
    assert run.saved.model.config.encoder.model_type == "hubert"
    assert run.trainer.global_step == 0
    assert not run.folder.exists()


def test_mistakes_are_one_error_in_the_words_of_the_options(monkeypatch):
    monkeypatch.setattr(UserError, "on_command_line", False)
    with pytest.raises(UserError) as caught:
        sedtrain.compose("decoder=bret", "encoder.size=3")
    text = str(caught.value)
    assert text.startswith("2 problems:\n")
    assert "decoder = 'bret'" in text and "encoder.size = 3" in text


@pytest.mark.parametrize("option", ["-m", "--cfg", "decoder", 3, ["decoder=bert"]])
def test_flags_are_refused(option):
    with pytest.raises(UserError) as caught:
        sedtrain.run(option, "decoder=bert")
    assert (caught.value.option, caught.value.value) == ("options", option)


def test_what_a_task_refuses_is_raised_and_not_an_exit(tmp_path):
    with pytest.raises(UserError) as caught:
        sedtrain.run("task=evaluate", f"checkpoint={tmp_path}", f"run_dir={tmp_path / 'run'}")
    assert caught.value.option == "checkpoint"


def test_options_of_a_run_that_is_used_are_read_as_on_the_command_line(trained, tmp_path):
    slices = "data.test_split=test[:50%]"  # which Hydra reads in quotes alone
    folder = sedtrain.run("task=evaluate", f"checkpoint={trained}", slices, f"run_dir={tmp_path / 'run'}")
    assert json.loads((folder / "results.json").read_text(encoding="utf-8"))["num_utterances"] == 3
