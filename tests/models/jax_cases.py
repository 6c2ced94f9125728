"""The model under JAX beside the model in PyTorch: logits, ids, compilations and files."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pairs import END, IDS, PAD, joined, two_utterances

from sedtrain import SpeechEncoderDecoder
from sedtrain.errors import UserError

jax = pytest.importorskip("jax")
under = pytest.importorskip("sedtrain.models.jax", exc_type=UserError)  # torchax is absent, or older than torch
Flax = under.FlaxSpeechEncoderDecoderModel

AUDIO, MASK = (each.numpy() for each in two_utterances().values())


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Compiles in half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def model():
    """Has the group norm of base sizes, and hears more than random weights do, so that the two texts differ."""
    base = {"feat_extract_norm": "group", "do_stable_layer_norm": False}
    model = joined("wav2vec2", "bart", num_hidden_layers=1, decoder_layers=1, seed=49, **base)
    for name, weight in model.named_parameters():
        if any(part in name for part in ("embed_positions", "encoder_attn.out", "encoder_attn.v")):
            weight.data *= 40
    return model


@pytest.fixture(scope="module")
def under_jax(model):
    return Flax(model)


@pytest.fixture(scope="module")
def traces(model):
    """Grows by one each time that the decoder is traced, and where PyTorch calls it."""
    found = []
    model.decoder.register_forward_pre_hook(lambda *_: found.append(1))
    return found


def logits(model):
    with torch.no_grad():
        return model(**two_utterances(), decoder_input_ids=IDS).logits


def test_logits_are_those_of_pytorch_compiled_once_for_a_shape(model, under_jax, traces):
    traces.clear()
    under_jax(AUDIO[::-1], MASK[::-1], decoder_input_ids=IDS.numpy())
    output = under_jax(
        AUDIO, MASK, decoder_input_ids=under_jax.shift_right(np.concatenate([IDS[:, 1:], IDS[:, 1:2]], 1))
    )
    assert len(traces) == 1
    assert isinstance(output.logits, jax.Array) and output[0] is output.logits
    np.testing.assert_allclose(output.logits, logits(model), atol=1e-4, rtol=0)
    plain = under_jax(AUDIO, MASK, decoder_input_ids=IDS.numpy(), return_dict=False)
    np.testing.assert_array_equal(plain[0], output.logits)


def test_greedy_decoding_writes_the_ids_of_pytorch_compiled_once_for_a_shape(model, under_jax, traces):
    def expected(**options):
        return model.generate(**two_utterances(), num_beams=1, do_sample=False, **options).tolist()

    traces.clear()
    first = [under_jax.generate(AUDIO, MASK, max_new_tokens=12).sequences.tolist() for _ in range(2)]
    assert len(traces) == 1
    assert first == [expected(max_new_tokens=12)] * 2
    texts = np.array(first[0])
    [end, *_] = [token for token in texts[0, 1:-1] if token not in texts[1]]  # ends the first text alone
    options = {"eos_token_id": int(end), "min_length": 3, "max_length": 9, "forced_eos_token_id": None}
    again = under_jax.generate(AUDIO, MASK, **options).sequences.tolist()
    assert again == expected(**options)
    assert (END in again[0], PAD in again[0], PAD in again[1]) == (False, True, False)


def test_other_weights_are_taken_by_a_call_and_saved_for_pytorch(tmp_path, under_jax):
    halved = {name: weight / 2 for name, weight in under_jax.params.items()}
    under_jax.save_pretrained(tmp_path / "halved", params=halved)
    found = under_jax(AUDIO, MASK, decoder_input_ids=IDS.numpy(), params=halved).logits
    np.testing.assert_allclose(found, logits(SpeechEncoderDecoder.from_pretrained(tmp_path / "halved")), atol=1e-4)
    under_jax.save_pretrained(tmp_path / "own")
    for name, weight in Flax.from_pretrained(tmp_path / "own").params.items():
        np.testing.assert_array_equal(weight, under_jax.params[name])


def test_encoder_and_decoder_are_joined_as_the_reference_does(tmp_path, model):
    model.encoder.save_pretrained(tmp_path / "encoder")
    model.decoder.save_pretrained(tmp_path / "decoder")
    joint = Flax.from_encoder_decoder_pretrained(
        tmp_path / "encoder", tmp_path / "decoder", encoder_from_pt=True, decoder_from_pt=True, decoder_dropout=0.3
    )
    assert joint.config.decoder.dropout == 0.3
    for name, weight in model.named_parameters():
        np.testing.assert_array_equal(joint.params[name], weight.detach())


def test_the_code_of_the_page_runs(tmp_path, model, under_jax, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/jax.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(import jax.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model.encoder.save_pretrained("ENCODER")
    model.decoder.save_pretrained("DECODER")
    monkeypatch.setattr(Flax, "from_pretrained", lambda folder: under_jax)  # which is compiled for these shapes
    names = {"inputs": AUDIO, "attention_mask": MASK, "labels": IDS.numpy()}
    exec(code.replace("max_new_tokens=50", "max_new_tokens=12"), names)
    assert names["ids"].shape[0] == len(AUDIO) and names["model"].config.decoder.model_type == "bart"


# --- mistakes

SEARCH = "under JAX the search is greedy, and does not change scores"
PYTORCH = "or generate with PyTorch: model.model.generate(...)"


@pytest.mark.parametrize(
    ("options", "wrong", "write"),
    [
        ({"num_beams": 4}, SEARCH, f"write num_beams=1, {PYTORCH}"),
        ({"repetition_penalty": 1.2}, SEARCH, f"write repetition_penalty=1.0, {PYTORCH}"),
        ({"num_beems": 1}, "generation has no such option", "write an option of GenerationConfig"),
    ],
    ids=["search", "scores", "name"],
)  # fmt: skip
def test_another_search_is_refused(under_jax, options, wrong, write):
    with pytest.raises(UserError) as caught:
        under_jax.generate(AUDIO, **options)
    assert {caught.value.option: caught.value.value} == options
    assert (caught.value.wrong, caught.value.write) == (wrong, write)


@pytest.mark.parametrize("name", ["train", "freeze_feature_encoder"])
def test_training_is_refused(under_jax, name):
    with pytest.raises(UserError) as caught:
        under_jax(AUDIO, decoder_input_ids=IDS.numpy(), **{name: True})
    assert caught.value.wrong == "there is no dropout and no freezing under JAX"
    assert caught.value.write == f"leave {name} out, and train with PyTorch"


def test_a_call_without_decoder_inputs_says_how_labels_become_them(under_jax):
    with pytest.raises(ValueError, match=r"^give decoder_input_ids, such as model\.shift_right\(labels\)$"):
        under_jax(AUDIO)


def test_a_model_that_branches_on_values_is_refused(under_jax):
    branching = jax.jit(
        lambda params: under_jax.applied(params, lambda model: bool(model.decoder.lm_head.weight.any()), {})
    )
    with pytest.raises(UserError) as caught:
        branching(under_jax.params)
    assert (caught.value.option, caught.value.value) == ("model", "wav2vec2 and bart")
    assert caught.value.wrong.startswith("JAX cannot trace it: ")
    assert caught.value.write == "write other families, or run it with PyTorch"


def test_an_absent_package_is_told_with_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "sedtrain.models.jax")
    monkeypatch.setitem(sys.modules, "torchax", None)
    with pytest.raises(UserError) as caught:
        importlib.import_module("sedtrain.models.jax")
    assert caught.value.wrong.startswith(f"it needs jax and a torchax that knows torch {torch.__version__}: ")
    assert caught.value.write == "pip install 'sedtrain[jax]'"


@pytest.mark.parametrize("page", ["with_flax.md", "zh.md"])
def test_what_a_page_of_the_documents_lists_of_the_class_is_there(page, shared):
    text = (shared / f"reference/speech_encoder_decoder_{page}").read_text(encoding="utf-8")
    [listed] = re.findall(r"\[\[autodoc\]\] FlaxSpeechEncoderDecoderModel((?:\s+- \w+)*)", text)
    members = re.findall(r"\w+", listed)
    assert members
    assert all(callable(getattr(Flax, member)) for member in members)
