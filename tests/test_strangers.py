"""Folders that a stranger made: nothing of them is imported, called or written, whatever they name."""

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml
from corpora import wav
from families import TOKENIZER, option_file
from pairs import part
from test_comparison import write_run
from whispers import whisper_folder

import sedtrain as package
from sedtrain.compare import compare
from sedtrain.decoding.fusion import language_model
from sedtrain.errors import UserError
from sedtrain.evaluation.results import commit
from sedtrain.models.decoder import load_decoder
from sedtrain.models.family_settings import feature_extractor_of
from sedtrain.models.loading import load_tokenizer
from sedtrain.models.saved import SavedModel, to_finetune
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.models.speech_to_text_2 import Speech2Text2Config, Speech2Text2ForCausalLM
from sedtrain.training.checkpoint_files import MARK

CANARY = Path("canary")
BESIDE = f"""
from pathlib import Path
from transformers import AutoModel as Evil
def strike(*_, **__):
    Path({str(CANARY)!r}).touch()
strike()
"""
MAP = {"AutoConfig": "beside.Evil", "AutoModel": "beside.Evil", "AutoModelForCausalLM": "beside.Evil",
       "AutoTokenizer": ["beside.Evil", "beside.Evil"], "AutoFeatureExtractor": "beside.Evil"}  # fmt: skip
DATA = {"_target_": "sedtrain.data.datamodule.SpeechTextDataModule", "path": "data",
        "columns": {"audio": "audio", "transcription": "text"}}  # fmt: skip
DECODING = {"_target_": "sedtrain.decoding.options.DecodingOptions", "max_new_tokens": 3}
LORA = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 2,
    "lora_dropout": 0.0,
    "fan_in_fan_out": False,
    "target_modules": ["query"],
}


class Pickled:
    def __reduce__(self):
        return CANARY.touch, ()


@pytest.fixture(scope="module")
def harmless(tmp_path_factory):
    """A run with a saved model and its data; beside it a module that touches the canary when it is imported."""
    folder = tmp_path_factory.mktemp("harmless")
    torch.manual_seed(0)
    model = SpeechEncoderDecoder(encoder=part("hubert"), decoder=part("bert", vocab_size=len(TOKENIZER)))
    model.set_special_tokens(1, 2, 0)
    SavedModel(model, TOKENIZER, feature_extractor_of(model.encoder)).save(folder / "model", {"max_new_tokens": 3})
    (folder / "data").mkdir()
    rows = pa.table({"audio": [wav(0.5)] * 2, "text": ["one", "two"]})
    pyarrow.parquet.write_table(rows, folder / "data/test.parquet")
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": DATA, "decoding": DECODING}))
    (folder / "a.wav").write_bytes(wav(0.5))
    for inside in ("", "model", "data"):
        (folder / inside / "beside.py").write_text(BESIDE)
    return folder


def merge(file, **values):
    read, write = (yaml.safe_load, yaml.safe_dump) if file.suffix == ".yaml" else (json.loads, json.dumps)
    before = read(file.read_text()) if file.is_file() else {}
    file.parent.mkdir(exist_ok=True)
    file.write_text(write({**before, **values}))


def stored(**values):
    return lambda run: merge(run / "config.yaml", **values)


def in_model(name, **values):
    return lambda run: merge(run / "model" / name, **values)


def nested(part, **values):
    def change(run):
        config = json.loads((run / "model/config.json").read_text())
        merge(run / "model/config.json", **{part: {**config[part], **values}})

    return change


def tagged(run):
    (run / "config.yaml").write_text("decoding: !!python/object/apply:beside.strike []\n")


def bombed(run):
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)), "data: *a11"]
    (run / "config.yaml").write_text("\n".join(lines))


def pickled_weights(run):
    (run / "model/model.safetensors").unlink()
    torch.save({"encoder": Pickled()}, run / "model/pytorch_model.bin")


def pickled_data(run):
    (run / "data/test.parquet").unlink()
    (run / "data/test.pkl").write_bytes(pickle.dumps(Pickled()))
    (run / "data/data.py").write_text(BESIDE)


HOSTILE = {
    "data that are called": stored(data={**DATA, "_target_": "beside.strike"}),
    "data that unpickle": stored(data={"_target_": "pandas.read_pickle", "filepath_or_buffer": "data/x.pkl"}),
    "data with a class inside": stored(data={**DATA, "mix": {"a": {"path": {"_target_": "beside.strike"}}}}),
    "decoding that writes": stored(decoding={"_target_": "pathlib.Path.touch", "self": str(CANARY)}),
    "decoding by another class of ours": stored(
        decoding={"_target_": "sedtrain.run_dir.write_whole", "path": "canary"}
    ),
    "an adapter beside": stored(adapter={"_target_": "beside.Evil", "_partial_": True}),
    "a normalizer that is looked up": stored(normalizer="${oc.env:HOME}"),
    "a tag of Python": tagged,
    "aliases": bombed,
    "pickled data and a script": pickled_data,
    "code of the model": in_model("config.json", auto_map=MAP),
    "code of an unknown model": in_model("config.json", auto_map=MAP, model_type="evil"),
    "code of the decoder": nested("decoder", auto_map=MAP, model_type="wav2vec2"),
    "code of the tokenizer": in_model("tokenizer_config.json", auto_map=MAP, tokenizer_class="Evil"),
    "code of the features": in_model("preprocessor_config.json", auto_map=MAP, feature_extractor_type="Evil"),
    "kernels": nested("encoder", attn_implementation="evil/kernel"),
    "another base": in_model("adapter_config.json", base_model_name_or_path="evil/base", peft_type="LORA"),
    "a module of an adapter": in_model(
        "adapter/adapter_config.json", **LORA, megatron_config={"a": 1}, megatron_core="beside"
    ),
    "a class of an adapter": in_model("adapter/adapter_config.json", **LORA, auto_mapping={"parent_library": "beside"}),
    "pickled weights": pickled_weights,
}
OF_MODEL = [name for at, name in enumerate(HOSTILE) if at >= 10]


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.fixture
def run(harmless, tmp_path, monkeypatch):
    """A copy of the harmless run. After the test nothing in it has changed, and nothing has been imported."""

    def asked(*_):
        raise AssertionError("a prompt")

    run = Path(shutil.copytree(harmless, tmp_path / "run"))
    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.chdir(run)
    yield run
    assert "beside" not in sys.modules
    assert not list(tmp_path.rglob(CANARY.name))
    assert not list(tmp_path.rglob("beside*.pyc"))


def commands(run, out):
    yield "task=transcribe", "checkpoint=.", "audio=a.wav"
    yield "task=evaluate", "checkpoint=.", f"run_dir={out}"


def test_the_harmless_run_is_used(sedtrain, run, tmp_path):
    for command in commands(run, tmp_path / "out"):
        ended = sedtrain(*command)
        assert ended.status == 0, ended.err


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_of_a_hostile_folder_is_imported_called_or_written(sedtrain, run, tmp_path, name):
    HOSTILE[name](run)
    before = contents(run)
    for command in list(commands(run, tmp_path / "out"))[name not in OF_MODEL :][:1]:
        ended = sedtrain(*command)
        assert ended.status == 2, (ended.out, ended.err)
        assert "Traceback" not in ended.err
        assert "1 problem:" in ended.err
    assert contents(run) == before
    assert not (tmp_path / "out/config.yaml").exists()
    if name in OF_MODEL:
        with pytest.raises(UserError):
            package.load(".")


def test_a_checkpoint_of_pickled_calls_is_refused(sedtrain, run):
    (run / "checkpoints").mkdir()
    torch.save({"resume": Pickled()}, run / "checkpoints/last.ckpt")
    content = (run / "checkpoints/last.ckpt").read_bytes()
    (run / "checkpoints/last.ckpt").write_bytes(content + MARK + hashlib.sha256(content).hexdigest().encode())
    before = contents(run)
    ended = sedtrain(
        "resume=.", "run_dir=../out", "data.path=data", "data.train_split=test", "data.validation_split=test"
    )
    assert ended.status == 2
    assert "this checkpoint could run code, since it holds more than numbers and plain values" in ended.err
    assert contents(run) == before


def test_a_model_that_somebody_else_saved_needs_no_module_of_theirs(run):
    assert isinstance(package.load(".").transcribe("a.wav", max_new_tokens=3), str)


# --- models of other kinds: whole, behind a prefix, with a tokenizer of their own, beside the decoder


def speech_to_text_2(folder):
    config = Speech2Text2Config(vocab_size=8, d_model=8, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8)
    Speech2Text2ForCausalLM(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(
        json.dumps({token: id for id, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "a", "b"])})
    )
    (folder / "merges.txt").write_text("a b</w>\n")


def joined_with_a_prefix(folder):
    model = SpeechEncoderDecoder(encoder=part("hubert"), decoder=part("llama", vocab_size=len(TOKENIZER)))
    model.set_special_tokens(1, 2, 0)
    SavedModel(model, TOKENIZER, feature_extractor_of(model.encoder)).save(folder, {"max_new_tokens": 3})


def causal(folder):
    part("llama", vocab_size=len(TOKENIZER)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)


def decoder_of(folder):
    option = "llama" if "llama" in (folder / "config.json").read_text() else "speech_to_text_2"
    values = {**option_file("decoder", option), "size": "base", "checkpoint": str(folder)}
    return load_decoder(load_tokenizer("decoder.checkpoint", str(folder)), **values)


KINDS = {
    "whole": (whisper_folder, [package.load, lambda folder: to_finetune(str(folder), {}, None)]),
    "prefix": (joined_with_a_prefix, [package.load]),
    "language model": (causal, [lambda folder: language_model(str(folder)), decoder_of]),
    "speech_to_text_2": (speech_to_text_2, [decoder_of]),
}


def without_weights(model):
    (model / "model.safetensors").unlink()


def pickled(model):
    without_weights(model)
    torch.save({"encoder": Pickled()}, model / "pytorch_model.bin")


def pickled_as_flax(model):
    without_weights(model)
    (model / "flax_model.msgpack").write_bytes(pickle.dumps(Pickled()))


def flax_elsewhere(model):
    without_weights(model)
    merge(model / "flax_model.msgpack.index.json", metadata={}, weight_map={"a": "../beside.py"})


def own_generation(model):
    (model / "custom_generate").mkdir()
    (model / "custom_generate/generate.py").write_text(BESIDE)
    merge(model / "generation_config.json", custom_generate="beside")


def in_file(name, **values):
    return lambda model: merge(model / name, **values)


REFUSED = {
    "code of the model": in_file("config.json", auto_map=MAP),
    "code of the tokenizer": in_file("tokenizer_config.json", auto_map=MAP, tokenizer_class="Evil"),
    "code of the processor": in_file("processor_config.json", auto_map=MAP, processor_class="Evil"),
    "kernels": in_file("config.json", attn_implementation="evil/kernel"),
    "another base": in_file("adapter_config.json", base_model_name_or_path="evil/base", peft_type="LORA"),
    "pickled weights": pickled,
    "pickled weights of Flax": pickled_as_flax,
    "weights of Flax elsewhere": flax_elsewhere,
}
UNUSED = {
    "generation of its own": own_generation,
    "a class of the tokenizer": in_file("tokenizer_config.json", tokenizer_class="beside.Evil", backend="custom"),
    "architectures": in_file("config.json", architectures=["beside.Evil"]),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of each kind; beside its files a module that touches the canary when it is imported."""
    folders = {kind: tmp_path_factory.mktemp("model") for kind in KINDS}
    for kind, folder in folders.items():
        KINDS[kind][0](folder)
        (folder / "beside.py").write_text(BESIDE)
    return folders


@pytest.mark.parametrize("name", [*REFUSED, *UNUSED])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_hostile_model_of_another_kind_is_imported_called_or_written(models, kind, name, run):
    for number, use in enumerate(KINDS[kind][1]):
        model = Path(shutil.copytree(models[kind], run / f"model {number}"))
        {**REFUSED, **UNUSED}[name](model)
        before = contents(model)
        language_model.cache_clear()
        with pytest.raises(UserError) if name in REFUSED else suppress(UserError):
            use(model)
        assert contents(model) == before


def test_nothing_of_hostile_runs_is_imported_called_or_written_to_compare_them(run, tmp_path):
    folders = [write_run(run / name, rate, number=6) for name, rate in (("a", 0.1), ("b", 0.5))]
    for folder in map(Path, folders):
        (folder / "beside.py").write_text(BESIDE)
        merge(folder / "config.yaml", metrics={"own": {"_target_": "beside.strike"}})
        metrics = json.loads((folder / "results.json").read_text())["metrics"]
        merge(folder / "results.json", metrics={**metrics, "beside.strike": {"_target_": "beside.strike"}})
    before = contents(run)
    compare(folders, tmp_path)
    assert contents(run) == before


def git(*arguments):
    own = ("user.name=a", "user.email=a@b", "commit.gpgsign=false", "protocol.file.allow=always")
    options = [word for each in own for word in ("-c", each)]
    return subprocess.run(["git", *options, *arguments], capture_output=True, text=True, check=True).stdout.strip()


def test_no_command_of_a_checkout_s_own_configuration_is_run_to_read_its_commit(tmp_path, monkeypatch):
    for name in ("inner", "checkout"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        git("init", "-q")
        Path("a.txt").write_text("one")
        Path(".gitattributes").write_text("a.txt filter=evil diff=evil\n")
        git("add", ".")
        if name == "checkout":
            git("submodule", "add", "-q", "../inner")
        git("commit", "-q", "-m", "first")
    strike = f"sh -c 'touch {tmp_path / CANARY}; cat'"
    hook = Path("hooks/post-index-change")
    hook.parent.mkdir()
    hook.write_text(f"#!/bin/sh\n{strike}\n")
    hook.chmod(0o755)
    for folder in (".", "inner"):
        names = ("filter.evil.clean", "filter.evil.smudge", "core.fsmonitor", "core.sshCommand", "core.pager")
        for name in (*names, "diff.evil.textconv", "diff.evil.command", "diff.external"):
            git("-C", folder, "config", name, strike)
        git("-C", folder, "config", "core.hooksPath", str(hook.parent.absolute()))
        Path(folder, "a.txt").touch()  # so that its content is compared
    index = Path(".git/index").read_bytes()
    assert commit() == {"id": git("rev-parse", "HEAD"), "dirty": False}
    Path("inner/a.txt").write_text("two")
    Path("a.txt").write_text("two")
    assert commit()["dirty"]
    assert not (tmp_path / CANARY).exists()
    assert Path(".git/index").read_bytes() == index
