"""Every recipe: what its page says, and one step of its experiment, on a very small model and data in the same columns."""

import json
import re
import shlex

import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from corpora import wav
from test_documents import ROOT
from whispers import whisper_folder

from sedtrain.config.overrides import check_command_line

RECIPES = sorted(path.parent.name for path in (ROOT / "recipes").glob("*/README.md"))
EXPERIMENTS = {path.stem for path in (ROOT / "conf/experiment").glob("*.yaml")}
COMMAND = re.compile(r"^(?:python|torchrun .+?) -m sedtrain ((?:.*\\\n)*.+)", re.MULTILINE)
LENGTHS = [0.5, 0.6, 0.7, 0.8]
TEXTS = ["good day", "two words", "three of them", "and four"]
SMALL = [
    "trainer.max_steps=1", "trainer.precision=32-true", "trainer.accelerator=cpu", "trainer.devices=1",
    "strategy=auto", "trainer.accumulate_grad_batches=1", "data.batch_seconds=4", "data.num_workers=0",
    "vocabulary_texts=0", "decoding.max_new_tokens=3",
]  # fmt: skip
ONE_LAYER = ["encoder.tiny.num_hidden_layers=1", "encoder.tiny.hidden_size=32", "encoder.tiny.intermediate_size=32"]
WHISPER_LAYER = ["encoder.tiny.encoder_layers=1", "encoder.checkpoint=null"]
CHANGES = {
    "librispeech_100h": ONE_LAYER,
    "two_gpus": ONE_LAYER,
    "librispeech_960h": [*ONE_LAYER, "data.train_split=train.clean.100"],
    "slurm": [*ONE_LAYER, "data.train_split=train.clean.100"],
    "covost2_en_de": ONE_LAYER,
    "covost2_x_en": ONE_LAYER,
    "fleurs": [*ONE_LAYER, *(f"data.mix.{language}.path=FOLDER" for language in ("en", "de", "fr", "pl", "bn"))],
    "common_voice": ["checkpoint=WHISPER", "data.train_split=train"],
    "whisper_finetune": ["checkpoint=WHISPER", "data.language=en"],
    "your_own_folder": ["checkpoint=WHISPER", "data.language=en"],
    "artikulate": WHISPER_LAYER,
    "speech_llm": WHISPER_LAYER,
    "connected_digits": ONE_LAYER,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny dataset with the columns and splits of all datasets of the recipes, also as audio files, and a tiny Whisper."""
    folder = tmp_path_factory.mktemp("recipes")
    cells = dict.fromkeys(("text", "translation", "sentence", "transcription"), TEXTS)
    ids = {name: [f"{name}-{i}" for i in range(4)] for name in ("id", "utt_id")}
    speakers = {name: ["a", "a", "b", "b"] for name in ("speaker", "speaker_id", "client_id")}
    table = pa.table({
        "audio": [wav(each, i) for i, each in enumerate(LENGTHS)], "duration": LENGTHS, "seconds": LENGTHS,
        "locale": ["hi"] * 4, **cells, **ids, **speakers,
    })  # fmt: skip
    for split in ("train", "train.100", "train.clean.100", "validation", "validation.clean", "test", "test.clean"):
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
    (folder / "audio").mkdir()
    for i, text in enumerate(TEXTS * 3):
        (folder / f"audio/{i}.wav").write_bytes(wav(0.5, i))
        (folder / f"audio/{i}.txt").write_text(text)
    whisper_folder(folder / "whisper", languages=("en", "de", "hi"))
    return folder


def test_every_recipe_has_an_experiment_of_its_name_and_a_test():
    assert len(RECIPES) >= 13
    assert set(RECIPES) == EXPERIMENTS - {"translate_digits"} == set(CHANGES)


@pytest.mark.parametrize("name", RECIPES)
def test_the_page_of_a_recipe_ends_with_scores_and_a_comparison(name):
    page = (ROOT / "recipes" / name / "README.md").read_text(encoding="utf-8")
    assert f"experiment={name}" in page
    assert page.find("task=evaluate") < page.find("task=compare runs=[") != -1
    assert [heading for heading in ("## Published", "## Measured here") if heading not in page] == []


@pytest.mark.parametrize("name", RECIPES)
def test_the_commands_of_a_recipe_compose(name, monkeypatch):
    page = (ROOT / "recipes" / name / "README.md").read_text(encoding="utf-8")
    found = [command.group(1) for command in COMMAND.finditer(page)]
    assert found
    for command in found:
        arguments = shlex.split(command.replace("\\\n", " ").split(" #")[0])
        if not {"-m", "hydra/launcher=slurm"} & set(arguments):
            assert check_command_line(arguments)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_on_the_tiny_size(name, folder, sedtrain, tmp_path):
    path = folder / "audio" if name == "your_own_folder" else folder
    changes = [each.replace("WHISPER", f"{folder}/whisper").replace("FOLDER", str(folder)) for each in CHANGES[name]]
    size = [] if any(each.startswith("checkpoint=") for each in changes) else ["size=tiny"]
    ended = sedtrain(f"experiment={name}", *size, *SMALL, *changes, f"data.path={path}", f"run_dir={tmp_path}/run")
    assert ended.status == 0, ended.err
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["metrics"]
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]["path"] == str(path)
