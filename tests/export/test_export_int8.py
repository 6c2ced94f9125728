"""The folder in 8 bits: plain transformers loads it, sedtrain computes with its values in float32."""

import json
import re
import subprocess
import sys

import pytest
import soundfile
import torch
import transformers
from families import TOKENIZER, tiny_decoder, tiny_encoder
from safetensors.torch import load_file
from whispers import whisper_folder

from sedtrain.errors import UserError
from sedtrain.export import int8
from sedtrain.export.card_facts import CardFacts
from sedtrain.export.folder import ExportOptions, write_folder
from sedtrain.models.lora import adapt
from sedtrain.models.saved import join, load

EXTRA = {"reason": "an extra that few machines have"}
SHORT = {"max_new_tokens": 8}
WITHOUT_SEDTRAIN = """
import sys
sys.modules["sedtrain"] = None
import soundfile
audio, _ = soundfile.read({wav!r}, dtype="float32")
"""


def small(encoder="hubert", decoder="bert"):
    saved = join(tiny_encoder(encoder), tiny_decoder(decoder), lambda *widths: None, TOKENIZER)
    saved.model.eval()
    torch.nn.init.normal_(saved.model.decoder.get_output_embeddings().weight, std=2.0)  # texts that vary
    return saved


def written(folder, saved, **options):
    write_folder(folder, saved, ExportOptions(**options), SHORT, None, CardFacts("noise"), "transcription")
    return folder


def weights_of(model):
    return {name: weight for name, weight in model.named_parameters() if "torchao" in type(weight).__module__}


@pytest.mark.parametrize("encoder", ["hubert", "wavlm", "w2v_bert"])
def test_a_folder_in_8_bits_has_weights_within_half_a_step_and_writes_the_texts_that_sedtrain_writes(
    tmp_path, wav, encoder
):
    pytest.importorskip("torchao", **EXTRA)
    folder = written(tmp_path / "small", saved := small(encoder), dtype="int8")
    stock = transformers.SpeechEncoderDecoderModel.from_pretrained(folder)
    rounded = weights_of(stock)
    for name, weight in rounded.items():
        whole = saved.model.get_parameter(name)
        step = whole.abs().amax(1, keepdim=True) / 127
        assert ((weight.dequantize() - whole).abs() <= 0.51 * step).all(), name
    linear = {f"{name}.weight" for name, each in stock.named_modules() if type(each) is torch.nn.Linear}
    left = linear - rounded.keys() - {"decoder.cls.predictions.decoder.weight"}
    assert all(".attention." in name for name in left) and bool(left) is (encoder == "wavlm")
    loaded = load(folder).model
    assert weights_of(loaded) == {} and {each.dtype for each in loaded.parameters()} == {torch.float32}
    samples, rate = soundfile.read(wav, dtype="float32")
    inputs = saved.feature_extractor(samples, sampling_rate=rate, return_tensors="pt")
    name = stock.encoder.main_input_name
    ids = [model.generate(**{name: inputs[name]}, **SHORT) for model in (stock, loaded)]
    assert torch.equal(*ids) and len(ids[0][0]) > 2


def test_the_code_of_the_card_runs_in_a_process_without_sedtrain(tmp_path, wav):
    pytest.importorskip("torchao", **EXTRA)
    folder = written(tmp_path / "small", small(), dtype="int8")
    card = (folder / "README.md").read_text()
    assert "pip install 'torchao>=0.18'" in card and re.search(r"[0-6] of 6 utterances of the embedded corpus", card)
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    program = WITHOUT_SEDTRAIN.format(wav=str(wav)) + code
    ended = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == load(folder).tokenizer.decode(greedy(load(folder), wav), skip_special_tokens=True)


def greedy(saved, wav):
    samples, rate = soundfile.read(wav, dtype="float32")
    return saved.model.generate(**saved.feature_extractor(samples, sampling_rate=rate, return_tensors="pt"))[0]


def test_a_folder_in_8_bits_is_smaller_and_is_the_same_but_for_its_weights(tmp_path):
    pytest.importorskip("torchao", **EXTRA)
    whole, folder = (written(tmp_path / dtype, small(), dtype=dtype) for dtype in ("float32", "int8"))
    sizes = [(each / "model.safetensors").stat().st_size for each in (whole, folder)]
    assert sizes[1] < 0.5 * sizes[0]
    names = [sorted(path.name for path in each.iterdir()) for each in (whole, folder)]
    assert names[0] == names[1]
    configs = [json.loads((each / "config.json").read_text()) for each in (whole, folder)]
    assert configs[1].pop("quantization_config")["quant_method"] == "torchao"
    assert configs[1].pop("architectures") == ["SpeechEncoderDecoderModel"] and configs[0].pop("architectures")
    for part in ("encoder", "decoder"):
        assert configs[1][part].pop("dtype") == "float32"
    assert configs[0] == configs[1]
    stored = load_file(folder / "model.safetensors")
    assert stored["decoder.bert.embeddings.position_embeddings.weight"].dtype == torch.bfloat16
    again = written(tmp_path / "again", load(folder))
    assert "quantization_config" not in json.loads((again / "config.json").read_text())


def test_a_whole_whisper_in_8_bits_is_loaded_by_transformers_and_by_sedtrain(tmp_path):
    pytest.importorskip("torchao", **EXTRA)
    whisper_folder(tmp_path / "whisper")
    folder = written(tmp_path / "small", load(tmp_path / "whisper"), dtype="int8")
    stock = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    assert len(weights_of(stock)) == 16  # 6 of the encoder's layer, 10 of the decoder's
    inputs = {"input_features": torch.randn(1, 8, 400), "decoder_input_ids": torch.tensor([[1, 5, 6]])}
    with torch.no_grad():
        expected, found = stock(**inputs).logits, load(folder).model(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def with_lora():
    saved = small()
    adapt(saved.model, ["decoder_self_attention"], rank=2, alpha=4.0, dropout=0.0)
    return saved


@pytest.mark.parametrize(
    ("make", "lora", "words"),
    [
        (lambda: small("whisper"), "merged", "unlike this whisper-encoder + bert"),
        (lambda: small("hubert", "t5"), "merged", "unlike this hubert + t5-decoder"),
        (with_lora, "apart", "matrices of LoRA that stay apart belong to weights in float32"),
    ],
)
def test_what_cannot_be_in_8_bits_is_refused_and_leaves_nothing(tmp_path, make, lora, words):
    with pytest.raises(UserError) as caught:
        written(tmp_path / "out", make(), dtype="int8", lora=lora)
    assert (caught.value.option, caught.value.write) == ("export.dtype", "write export.dtype=bfloat16")
    assert caught.value.wrong.endswith(words) and list(tmp_path.iterdir()) == []


def test_the_missing_extra_is_named_when_a_folder_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError) as caught:
        written(tmp_path / "out", small(), dtype="int8")
    assert caught.value.wrong.startswith("it needs torchao: ")
    assert caught.value.write == "pip install 'sedtrain[int8]'" and list(tmp_path.iterdir()) == []


def test_the_missing_extra_is_named_when_a_folder_is_read(tmp_path, monkeypatch):
    folder = written(tmp_path / "out", small())
    config = json.loads((folder / "config.json").read_text())
    weights = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": weights}))
    for name in ("torchao", "torchao.core", "torchao.core.config"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError) as caught:
        load(folder)
    assert caught.value.wrong == "its weights are in 8 bits by torchao, which is not installed"
    assert caught.value.write == "pip install 'sedtrain[int8]'"


def test_layers_that_torchao_cannot_run_are_refused_with_its_reason(tmp_path, monkeypatch):
    pytest.importorskip("torchao", **EXTRA)
    monkeypatch.setattr(int8, "READ_AS_WEIGHTS", ())
    with pytest.raises(UserError, match="torchao cannot run this model: Int8Tensor dispatch"):
        written(tmp_path / "out", small("wavlm"), dtype="int8")
    assert list(tmp_path.iterdir()) == []
