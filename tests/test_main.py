"""The command in a shell: mistakes end with status 2, one message, no traceback and before torch is imported."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TELL_OF_IMPORTS = """
import atexit, sys
HEAVY = {"torch", "transformers", "lightning", "datasets"}
atexit.register(lambda: print(*(f"imported {name}" for name in sorted(HEAVY & set(sys.modules))), file=sys.stderr))
"""


@pytest.fixture
def shell(tmp_path):
    """`python -m sedtrain ARGUMENTS` in an empty folder; at its end it tells which heavy packages it imported."""
    (tmp_path / "sitecustomize.py").write_text(TELL_OF_IMPORTS)
    (tmp_path / "here").mkdir()

    def run(*arguments):
        ended = subprocess.run(
            [sys.executable, "-m", "sedtrain", *arguments],
            cwd=tmp_path / "here",
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "COLUMNS": "120"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "Traceback" not in ended.stderr
        return ended

    return run


def test_the_help_names_the_groups_and_their_options_without_importing_torch(shell):
    ended = shell("--help")
    assert ended.returncode == 0, ended.stderr
    assert "imported" not in ended.stderr
    groups = sorted({path.parent for path in (ROOT / "conf").glob("*/*.yaml")})
    assert groups
    for group in groups:
        options = ", ".join(sorted(option.stem for option in group.glob("*.yaml")))
        assert f"{group.name}: {options}" in ended.stdout
    assert "python -m sedtrain encoder=hubert decoder=bert" in ended.stdout


def test_the_configuration_is_printed_without_importing_torch(shell):
    ended = shell("--cfg", "job", "encoder=wavlm")
    assert ended.returncode == 0, ended.stderr
    assert "imported" not in ended.stderr
    assert "model_type: wavlm" in ended.stdout


def test_every_mistake_is_named_in_one_message_without_importing_torch(shell):
    ended = shell(
        "encoder=hubrt", "trainer.max_stps=5", "trainer.max_steps=many", "seed=abc", "optimizer.lr=fast", "sise=base"
    )
    assert ended.returncode == 2
    assert "imported" not in ended.stderr
    assert "6 problems in the configuration:" in ended.stderr
    for words in (
        "encoder has no option 'hubrt'",
        "did you mean 'hubert'?",
        "Trainer has no option 'max_stps'",
        "did you mean 'max_steps'?",
        "trainer.max_steps = 'many'",
        "write a whole number",
        "seed = 'abc'",
        "optimizer.lr = 'fast'",
        "there is no group or option 'sise'",
        "did you mean 'size'?",
    ):
        assert words in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["task=trian"], "did you mean 'train'?"),
        (["task=evaluate"], "task=evaluate needs a trained model"),
        (["task=transcribe", "checkpoint=a"], "task=transcribe needs audio"),
        (["data=parquet"], "write data.path=VALUE"),
        (["pretrained=maybe"], "write pretrained=true or pretrained=false"),
    ],
)
def test_a_mistake_ends_with_status_2_and_what_to_write(shell, arguments, words):
    ended = shell(*arguments)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "imported" not in ended.stderr


def test_a_mistake_makes_no_folder(shell, tmp_path):
    shell("encoder=hubrt")
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["task=evaluate", "checkpoint=./nowhere"], "  checkpoint = './nowhere'\n    there is no such folder"),
        (["encoder.checkpoint=./nowhere"], "  encoder.checkpoint = './nowhere'\n    there is no such folder"),
        (["data=parquet", "data.path=./nowhere"], "data.path=./nowhere: there is no such file or folder"),
        (["size=base"], "size=tiny (random weights, needs no network)"),
    ],
)
def test_what_is_not_there_ends_with_status_2_and_the_alternatives(sedtrain, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    ended = sedtrain(*arguments, "run_dir=run")
    assert ended.status == 2
    assert words in ended.err
    assert "write" in ended.err


def test_what_is_not_there_is_told_in_a_shell_without_a_traceback(shell):
    ended = shell("data=parquet", "data.path=./nowhere", "run_dir=run")
    assert ended.returncode == 2
    assert "data.path=./nowhere: there is no such file or folder" in ended.stderr
    assert "imported torch" in ended.stderr, "the other tests here rely on being told"


def test_the_package_and_its_configuration_do_not_import_torch(tmp_path):
    code = TELL_OF_IMPORTS + "import sedtrain, sedtrain.config.schema, sedtrain.config.overrides, sedtrain.cli"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "imported" not in ended.stderr


SIGUSR1_BEFORE_ANYTHING = """
import os, signal
from sedtrain import cli
from sedtrain.__main__ import main
cli.run_command_line = lambda arguments: os.kill(os.getpid(), signal.SIGUSR1)
main()
"""


def test_sigusr1_before_a_training_starts_does_nothing():
    ended = subprocess.run([sys.executable, "-c", SIGUSR1_BEFORE_ANYTHING], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, f"ended by {signal.Signals(-ended.returncode).name}: {ended.stderr}"
