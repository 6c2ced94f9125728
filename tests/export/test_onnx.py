"""The ONNX graphs: the modules that become them, the check, and the loop of the card."""

import contextlib
import io
import logging
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import TOKENIZER, tiny_decoder, tiny_encoder
from pairs import PAD, START, joined

from sedtrain.decoding.hypotheses import until_end
from sedtrain.errors import UserError
from sedtrain.export import onnx
from sedtrain.export.card_facts import CardFacts
from sedtrain.export.checks import compared, refuse_other_ids
from sedtrain.export.folder import ExportOptions, write_folder
from sedtrain.export.onnx import Decoder, Encoder, write_onnx
from sedtrain.models.saved import join
from sedtrain.models.steps import decoder_steps

ONE_LAYER = {"num_hidden_layers": 1, "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2}


def small(encoder="hubert", decoder="bert", **options):
    sizes = {**ONE_LAYER, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    parts = tiny_encoder(encoder, options=options or sizes), tiny_decoder(decoder, options=ONE_LAYER)
    return join(*parts, lambda *widths: None, TOKENIZER)


@pytest.mark.parametrize("decoder", ["bert", "gpt2", "bart"])
def test_the_modules_write_the_logits_of_the_model_however_the_tokens_are_cut(decoder):
    model = joined("wav2vec2", decoder).requires_grad_(False)
    steps = decoder_steps(model)
    audio, mask = torch.randn(2, 4000), torch.ones(2, 4000, dtype=torch.long)
    audio[1, 2000:], mask[1, 2000:] = 0.0, 0
    ids = torch.tensor([[START, 7, 8, 9, 10], [START, 11, 12, 13, 14]])
    expected = model(audio, attention_mask=mask, decoder_input_ids=ids, use_cache=False).logits
    frames, *heard = Encoder(model, steps)(audio, mask)
    for cuts in ([5], [1, 1, 1, 1, 1], [2, 3]):
        past, found = [each.new_zeros(2, each.shape[1], 0, each.shape[3]) for each in heard], []
        for new in ids.split(cuts, 1):
            logits, *past = Decoder(model, steps)(new, frames, heard, past)
            found.append(logits)
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)


def test_onnxruntime_writes_the_ids_of_transformers_and_the_card_s_loop_their_text(tmp_path, caplog):
    caplog.set_level(logging.ERROR, "torch.__trace")  # records without number that pytest would keep
    pytest.importorskip("onnxruntime")
    saved, folder = small(), tmp_path / "out"
    torch.nn.init.normal_(saved.model.decoder.get_output_embeddings().weight, std=2.0)  # texts that vary
    options = ExportOptions(onnx=True, onnx_int8=True)
    write_folder(folder, saved, options, {"max_new_tokens": 8}, None, CardFacts("noise"), "transcription")
    sizes = {path.name: path.stat().st_size for path in (folder / "onnx").iterdir()}
    assert all(sizes[f"{name}_int8.onnx.data"] < sizes[f"{name}.onnx.data"] for name in ("encoder", "decoder"))
    assert re.search(r"In 8 bits, \d+ of 50 utterances .* words differ\.\n", (folder / "README.md").read_text())
    _, code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    samples = np.random.default_rng(0).standard_normal(12345).astype("float32")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {"audio": samples})
    inputs = saved.feature_extractor(samples, sampling_rate=16000, return_tensors="pt")
    ids = saved.model.generate(**inputs, max_new_tokens=8)[0]
    assert len(ids) > 2
    assert printed.getvalue().strip() == TOKENIZER.decode(ids, skip_special_tokens=True).strip()


def test_words_that_differ_in_8_bits_are_counted():
    found = compared(["one two", "three four five", ""], ["one two", "three six", ""])
    assert found == "In 8 bits, 2 of 3 utterances of the embedded corpus have the text of float32; 2 of 5 words differ"


def test_graphs_in_8_bits_need_those_in_float32():
    with pytest.raises(UserError, match=r"write export=onnx export\.onnx_int8=true"):
        ExportOptions(onnx_int8=True)


def test_graphs_that_onnxruntime_cannot_run_are_refused_with_its_reason(tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")

    def fail(*_):
        raise onnxruntime.capi.onnxruntime_pybind11_state.Fail("Add node: 14 by 11")

    monkeypatch.setattr(onnx, "trace", lambda *_: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path: path)
    monkeypatch.setattr(onnx, "refuse_other_ids", fail)
    with pytest.raises(UserError, match="onnxruntime cannot run its graphs: Add node: 14 by 11"):
        write_onnx(small(), tmp_path / "onnx")


def test_what_torch_cannot_trace_is_refused_with_the_cause(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")

    def fail(*_):
        raise torch.onnx.OnnxExporterError("\x1b[96mThis is step 1/3") from ValueError("\x1b[96mno pairs\x1b[0m\nhere")

    monkeypatch.setattr(onnx, "trace", fail)
    with pytest.raises(UserError, match="torch cannot export this model: no pairs here"):
        write_onnx(small(), tmp_path / "onnx")


class InTorch:
    """A module with the interface of a session of onnxruntime."""

    def __init__(self, module, heads, width):
        self.module, self.shape = module, ["batch", heads, "past", width]

    def get_inputs(self):
        number = 2 + 4 * len(self.module.steps.layers)
        return [SimpleNamespace(name=str(place), shape=self.shape) for place in range(number)]

    def run(self, outputs, values):
        tensors = [torch.from_numpy(each) for each in values.values()]
        half = 2 + 2 * len(self.module.steps.layers)
        grouped = tensors if len(tensors) == 2 else [*tensors[:2], tensors[2:half], tensors[half:]]
        return [each.numpy() for each in self.module(*grouped)]


@pytest.mark.parametrize("decoder", ["bert", "gpt2", "bart"])
def test_the_check_passes_for_the_modules_and_fails_for_those_of_other_weights(decoder):
    saved = join(tiny_encoder("wav2vec2"), tiny_decoder(decoder), lambda *widths: None, TOKENIZER)
    model = saved.model.eval().requires_grad_(False)
    torch.nn.init.normal_(model.decoder.get_output_embeddings().weight, std=2.0)  # texts that vary
    steps = decoder_steps(model)
    sizes = steps.layers[0].num_heads, steps.layers[0].head_width
    sessions = [InTorch(kind(model, steps), *sizes) for kind in (Encoder, Decoder)]
    refuse_other_ids(saved, *sessions)
    model.decoder.get_output_embeddings().weight.neg_()
    with pytest.raises(UserError, match="onnxruntime writes other tokens than transformers for 6 of 6 utterances"):
        refuse_other_ids(saved, *sessions)


@pytest.mark.parametrize(("encoder", "decoder"), [("w2v_bert", "bert"), ("hubert", "t5"), ("hubert", "llama")])
def test_other_families_are_refused_by_name(tmp_path, encoder, decoder):
    pytest.importorskip("onnxruntime")
    saved = join(tiny_encoder(encoder), tiny_decoder(decoder), lambda *widths: None, TOKENIZER)
    with pytest.raises(UserError) as caught:
        write_onnx(saved, tmp_path / "onnx")
    config = saved.model.config
    assert caught.value.wrong.endswith(f"not of {config.encoder.model_type} + {config.decoder.model_type}")
    assert not (tmp_path / "onnx").exists()


def test_the_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError) as caught:
        write_onnx(small(), tmp_path / "onnx")
    assert caught.value.write == "pip install 'sedtrain[onnx]'"


def test_ids_are_compared_up_to_their_end():
    assert until_end([7, 8, PAD, 9], [PAD]) == [7, 8]
    assert until_end([7, 8], [PAD]) == [7, 8]
