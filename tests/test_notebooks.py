"""Every notebook runs from its first cell to its last, with two steps of training and few utterances; none keeps outputs."""

import json
from pathlib import Path

import pytest

from sedtrain import interactive

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SHORT = ("decoding.max_new_tokens=10", "data.num_workers=0")
TRAINS = ("trainer.max_steps=2", "logger=none")
FEW = (
    "tokenizer.vocab_size=40",
    "data.train_split=train[:80]",
    "data.validation_split=validation[:10]",
    "data.test_split=test[:20]",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notebooks")


def shortened(call, whisper):
    """`sedtrain.run` or `sedtrain.compose` with less to do."""

    def shorter(*options):
        given = [option.replace("openai/whisper-tiny.en", str(whisper)) for option in options]
        task = next((option for option in given if option.startswith("task=")), "task=train")
        more = {"task=train": (*TRAINS, *SHORT), "task=evaluate": SHORT}.get(task, ())
        few = FEW if task == "task=train" and not any(each.startswith("data=") for each in given) else ()
        return call(*given, *more, *few)

    return shorter


def test_there_are_notebooks_and_none_keeps_outputs():
    assert len(NOTEBOOKS) == 6
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code"), path.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, folder, monkeypatch):
    from whispers import whisper_folder

    monkeypatch.chdir(folder)
    whisper = folder / "whisper"
    if path.stem.startswith("4_") and not whisper.exists():
        whisper_folder(whisper, languages=())
    for name in ("run", "compose"):
        monkeypatch.setattr(interactive, name, shortened(getattr(interactive, name), whisper))
    names: dict[str, object] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), path.name, "exec"), names)
