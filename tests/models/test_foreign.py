"""Saved models that ask for code, and each place of the package where something is loaded."""

import ast
import json
from pathlib import Path

import pytest
from transformers import BertConfig, HubertConfig, SpeechEncoderDecoderConfig

import sedtrain
from sedtrain import SpeechEncoderDecoder
from sedtrain.errors import UserError
from sedtrain.models import foreign
from sedtrain.models.decoder import load_decoder
from sedtrain.models.encoder import load_encoder
from sedtrain.models.foreign import refuse_code
from sedtrain.models.loading import load_tokenizer

PACKAGE = Path(sedtrain.__file__).parent
MAP = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
CODE = "it asks for Python code from elsewhere, and sedtrain runs no code of a model"
INDEX = "model.safetensors.index.json"
WRITE = "FOLDER of a model that transformers knows without other code"


def refusal(option, folder, load):
    with pytest.raises(UserError) as caught:
        load()
    assert (caught.value.option, caught.value.value) == (option, str(folder))
    return caught.value.wrong, caught.value.write


def change(folder, file, **values):
    path = folder / file
    stored = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**stored, **values}))


def test_a_part_with_code_of_its_own_is_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    change(tmp_path, "config.json", auto_map=MAP)
    told = (f"config.json has auto_map: {CODE}", f"write encoder.checkpoint={WRITE}")
    assert refusal("encoder.checkpoint", tmp_path, lambda: load_encoder("hubert", {}, checkpoint=str(tmp_path))) == told
    for model_type in ("bert", "never-heard-of"):
        change(tmp_path, "config.json", model_type=model_type)
        load = lambda: load_decoder(None, "bert", {}, checkpoint=str(tmp_path))  # noqa: E731
        assert refusal("decoder.checkpoint", tmp_path, load)[0] == told[0]
        assert refusal("decoder.checkpoint", tmp_path, lambda: load_tokenizer("decoder.checkpoint", str(tmp_path)))


@pytest.mark.parametrize(
    ("file", "values", "wrong"),
    [
        ("config.json", {"attn_implementation": "evil/kernel"}, f"config.json has attn_implementation: {CODE}"),
        ("config.json", {"attn_implementation": {"": "evil/kernel"}}, f"config.json has attn_implementation: {CODE}"),
        ("config.json", {"_experts_implementation": "evil/kernel"}, f"config.json has _experts_implementation: {CODE}"),
        ("config.json", {"encoder": {"list": [{"auto_map": MAP}]}}, f"config.json has auto_map: {CODE}"),
        ("tokenizer_config.json", {"auto_map": MAP}, f"tokenizer_config.json has auto_map: {CODE}"),
        ("preprocessor_config.json", {"auto_map": MAP}, f"preprocessor_config.json has auto_map: {CODE}"),
        ("processor_config.json", {"auto_map": MAP}, f"processor_config.json has auto_map: {CODE}"),
        ("config.json", {"decoder": {"num_hidden_layers": 10**9}},
         "config.json has num_hidden_layers=1000000000, which would take hours to build; no model has 10,000"),
        ("adapter_config.json", {"base_model_name_or_path": "evil/base"},
         "adapter_config.json makes it an adapter of peft, whose base model would be fetched"),
        (INDEX, {"metadata": {}, "weight_map": {"a": "b.safetensors", "c": "../d.safetensors"}},
         f"{INDEX} names '../d.safetensors', which is no file of weights beside it"),
        (INDEX, {"metadata": {}, "weight_map": {"a": 3}}, f"{INDEX} names '3', which is no file of weights beside it"),
        (INDEX, {"metadata": {}, "weight_map": {}}, f"{INDEX} names no files of weights"),
        (INDEX, {"weight_map": {"a": "b.safetensors"}}, f"{INDEX} names no files of weights"),
    ],
)  # fmt: skip
def test_each_file_is_searched_in_a_folder_and_in_the_cache_of_the_hub(tmp_path, file, values, wrong):
    snapshot = tmp_path / "models--some--model/snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--model/refs").mkdir()
    (tmp_path / "models--some--model/refs/main").write_text("0" * 40)
    change(snapshot, "config.json", model_type="bert")
    refuse_code("checkpoint", str(snapshot))
    refuse_code("checkpoint", "some/model", cache_dir=str(tmp_path))
    change(snapshot, file, **values)
    assert refusal("checkpoint", snapshot, lambda: refuse_code("checkpoint", str(snapshot)))[0] == wrong
    load = lambda: refuse_code("checkpoint", "some/model", cache_dir=str(tmp_path))  # noqa: E731
    assert refusal("checkpoint", "some/model", load)[0] == wrong


def test_from_python_neither_a_folder_nor_a_configuration_brings_code(tmp_path, monkeypatch):
    def asked(*_):
        raise AssertionError("a prompt")

    monkeypatch.setattr("builtins.input", asked)
    joined = SpeechEncoderDecoderConfig.from_encoder_decoder_configs(HubertConfig(), HubertConfig())
    joined.decoder.auto_map = MAP
    joined.save_pretrained(tmp_path)
    load = lambda: SpeechEncoderDecoder.from_pretrained(tmp_path, trust_remote_code=True)  # noqa: E731
    assert refusal("checkpoint", tmp_path, load)[0] == f"config.json has auto_map: {CODE}"
    with pytest.raises(UserError, match="contains custom code"):
        SpeechEncoderDecoder(joined)


def test_a_giant_configuration_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "names": "n" * 10_000_000}))
    wrong, _ = refusal("checkpoint", tmp_path, lambda: refuse_code("checkpoint", str(tmp_path)))
    assert wrong == "config.json is no JSON of plain values: it is larger than 10,000,000 bytes"


def loading_calls():
    """Each call of the package that loads by a class that transformers chooses: (file, text of the call)."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                caller = ast.unparse(node.func.value)
                if node.func.attr in ("from_pretrained", "from_config") and caller not in (
                    "super()",
                    "SpeechEncoderDecoder",
                    "GenerationConfig",  # numbers alone
                ):
                    yield path.name, ast.unparse(node)


def test_each_loading_of_the_package_says_that_remote_code_is_not_trusted():
    calls = list(loading_calls())
    assert len(calls) >= 10
    assert [call for call in calls if "trust_remote_code=False" not in call[1]] == []


def test_the_hub_is_asked_once_for_an_id_and_its_cache_each_time(tmp_path, monkeypatch):
    online = []
    config = tmp_path / "config.json"
    config.write_text("{}")

    def cached_files(name, files, local_files_only=False, **_):
        online.append(not local_files_only)
        return [str(config)]

    monkeypatch.setattr(foreign, "ASKED", set())
    monkeypatch.setattr(foreign, "cached_files", cached_files)
    for revision in ("main", "main", "other"):
        refuse_code("encoder.checkpoint", "some/model", revision=revision)
    assert online == [True, False, True]
    config.write_text(json.dumps({"auto_map": MAP}))
    load = lambda: refuse_code("checkpoint", "some/model", revision="main")  # noqa: E731
    assert refusal("checkpoint", "some/model", load)
