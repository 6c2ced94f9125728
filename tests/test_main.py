"""The command in a shell: mistakes end with status 2, one message, no traceback and before torch is imported."""

import os
import resource
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


def test_every_mistake_is_named_in_one_message_without_importing_torch_or_making_a_folder(shell, tmp_path):
    ended = shell(
        "encoder=hubrt", "trainer.max_stps=5", "trainer.max_steps=many", "seed=abc", "optimizer.lr=fast", "sise=base"
    )
    assert ended.returncode == 2
    assert "imported" not in ended.stderr
    assert "6 problems:" in ended.stderr
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
    assert list((tmp_path / "here").iterdir()) == []


def test_values_out_of_range_are_told_in_about_a_second_beside_all_other_mistakes(shell):
    mistakes = [
        "seed=-1", "memory_gb=0", "inspect_utterances=0", "vocabulary_texts=-4", "trainer.accumulate_grad_batches=0",
        "trainer.max_time=5", "encoder=hubrt", "optimizer.lr=fast",
    ]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = shell(*mistakes)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.returncode == 2
    assert "imported" not in ended.stderr
    assert ended.stderr.startswith("9 problems:\n")
    assert all(f"  {each.partition('=')[0]} = " in ended.stderr for each in mistakes)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


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
def test_a_mistake_ends_with_status_2_and_what_to_write(sedtrain, arguments, words):
    ended = sedtrain(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert words in ended.err


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["task=evaluate", "checkpoint=./nowhere"], {"checkpoint": "there is no such folder"}),
        (
            ["encoder.checkpoint=./nowhere", "data=parquet", "data.path=./nowhere"],
            {"encoder.checkpoint": "there is no such folder", "data.path": "there is no such file or folder"},
        ),
    ],
)
def test_what_is_not_there_ends_with_status_2_and_the_alternatives(sedtrain, tmp_path, monkeypatch, arguments, missing):
    monkeypatch.chdir(tmp_path)
    ended = sedtrain(*arguments, "run_dir=run")
    assert ended.status == 2
    for option, wrong in missing.items():
        assert f"  {option} = './nowhere'\n    {wrong}\n    write {option}=" in ended.err


def test_published_weights_that_are_out_of_reach_are_all_named_with_what_needs_none(shell):
    ended = shell("size=base", "run_dir=run")
    assert ended.returncode == 2
    assert "2 problems:\n\n  decoder.checkpoint = 'google-bert/bert-base-uncased'\n" in ended.stderr
    assert "\n  encoder.checkpoint = '" in ended.stderr
    assert ended.stderr.count("size=tiny (random weights, needs no network)") == 2
    assert "imported torch" in ended.stderr, "the other tests here rely on being told"


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


def test_a_file_of_the_working_folder_hides_no_package_from_the_console_script(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sedtrain.script").write_text("from sedtrain.__main__ import main\nmain()\n")
    for name in ("yaml", "omegaconf", "filelock"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the folder was imported')")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    script = [sys.executable, str(tmp_path / "bin/sedtrain.script"), "--cfg", "job", "seed=3"]
    ended = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "seed: 3" in ended.stdout


@pytest.mark.parametrize(("flags", "folder"), [([], "hydra.run.dir"), (["-m"], "hydra.sweep.dir")])
def test_a_folder_that_hydra_cannot_make_is_named(shell, flags, folder):
    ended = shell(*flags, "task=inspect", f"{folder}=/dev/null/x")
    assert ended.returncode == 2
    assert f"{folder} = '/dev/null" in ended.stderr
    assert f"    write {folder}=FOLDER that you may write to" in ended.stderr
