"""Low-rank matrices in every family: trained alone, merged or saved apart, and read by stock transformers."""

import json
import sys

import pytest
import torch
import transformers
from test_finetune import PAIRS, finetuning, joined, moving, parts_of
from test_trained_parameters import LABELS
from torch import nn

from sedtrain.errors import UserError
from sedtrain.models.lora import base_weights, load_adapter, lora_layers
from sedtrain.models.parts import part_of
from sedtrain.models.saved import SavedModel, load


def inputs_of(model):
    """Half a second of what the encoder takes."""
    config = model.encoder.config
    if model.encoder.main_input_name == "input_values":
        return torch.randn(2, 8000)
    mels = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", None)
    shape = (2, mels, 100) if "whisper" in config.model_type else (2, 100, mels or config.feature_projection_input_dim)
    return torch.randn(shape)


def adapted(encoder="hubert", decoder="bert", *overrides):
    model = joined(encoder, decoder)
    model.set_special_tokens(1, 2, 0)
    callback = finetuning("lora", *overrides)
    callback.prepare(model)
    return model, callback


def stirred(model):
    """The model with matrices as after training; the second of each pair starts as zeros."""
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return model.eval()


def logits(model, inputs):
    with torch.no_grad():
        return model(inputs, decoder_input_ids=torch.tensor([[1, 5, 6], [1, 7, 8]])).logits


TESTED = [*(pair for pair in PAIRS if pair[0] != "wavlm"), ("hubert", "llama")]


@pytest.mark.parametrize(("encoder", "decoder"), TESTED, ids=map("-".join, TESTED))
def test_every_matrix_has_a_gradient_and_merges_without_a_change_of_the_logits(encoder, decoder):
    model, callback = adapted(encoder, decoder)
    trained = moving(model)
    assert parts_of(name for name in trained if ".lora_" not in name) <= {"cross_attention", "adapter"}
    assert {part_of(name) for name in trained if ".lora_" in name} == {"encoder", "decoder"}
    inputs = inputs_of(model)
    model(inputs, labels=LABELS).loss.backward()
    assert [name for name in trained if model.get_parameter(name).grad is None] == []
    untouched = logits(model.eval(), inputs)
    said = logits(stirred(model), inputs)
    assert (said - untouched).abs().max() > 1e-3
    callback.finish(model)
    assert lora_layers(model) == {}
    torch.testing.assert_close(logits(model, inputs), said, rtol=1e-4, atol=1e-4)
    assert model.state_dict().keys() == joined(encoder, decoder).state_dict().keys()


def test_only_the_attention_is_adapted_and_little_moves():
    model, _ = adapted()
    before = sum(weight.numel() for weight in joined().parameters())
    assert sum(model.get_parameter(name).numel() for name in moving(model)) < 0.2 * before
    assert all("attention" in name for name in lora_layers(model))
    assert len(lora_layers(model)) == 4 * 4 + 2 * 4


def test_wavlm_whose_attention_goes_past_its_layers_is_adapted_elsewhere_or_refused():
    with pytest.raises(UserError) as caught:
        adapted("wavlm", "bert", "finetune.targets=[encoder_self_attention]")
    assert str(caught.value) == (
        "1 problem:\n\n  finetune.targets = ['encoder_self_attention']\n"
        "    these have no linear layer that can be adapted\n"
        "    write finetune.targets=[encoder,decoder], or other parts with linear layers"
    )
    model, _ = adapted("wavlm", "bert", "finetune.targets=[encoder]")
    model(inputs_of(model), labels=LABELS).loss.backward()
    assert [name for name in moving(model) if model.get_parameter(name).grad is None] == []


def test_a_target_without_adaptable_layers_is_reported(caplog):
    with caplog.at_level("WARNING", "sedtrain"):
        adapted("wavlm", "bert")
    assert [record.getMessage() for record in caplog.records] == [
        "finetune.targets: encoder_self_attention has no linear layer that can be adapted, and stays as it is"
    ]


def test_without_peft_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError) as caught:
        adapted()
    assert (caught.value.option, caught.value.value) == ("finetune", "lora")
    assert caught.value.wrong.startswith("it needs peft: ")
    assert caught.value.write == "pip install 'sedtrain[lora]'"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers by an old name
@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")  # and finds out how the layers of GPT-2 lie
@pytest.mark.parametrize("decoder", ["bert", "gpt2", "bart"])
def test_kept_apart_it_is_an_adapter_that_stock_transformers_and_peft_load(decoder, tmp_path, own_tokenizer):
    import peft

    model, callback = adapted("hubert", decoder, "finetune.merge=false")
    callback.finish(stirred(model))
    assert lora_layers(model)
    inputs = inputs_of(model)
    said = logits(model, inputs)
    saved = SavedModel(model, *own_tokenizer)
    saved.save(tmp_path, {})
    stock = transformers.SpeechEncoderDecoderModel.from_pretrained(tmp_path).eval()
    assert set(stock.state_dict()) == set(base_weights(model))
    assert (logits(stock, inputs) - said).abs().max() > 1e-3
    stock.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(stock, inputs), said, rtol=1e-4, atol=1e-4)
    by_peft = transformers.SpeechEncoderDecoderModel.from_pretrained(tmp_path).eval()
    by_peft = peft.PeftModel.from_pretrained(by_peft, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(by_peft.base_model.model, inputs), said, rtol=1e-4, atol=1e-4)
    own = load(str(tmp_path))
    torch.testing.assert_close(logits(own.model, inputs), said, rtol=1e-4, atol=1e-4)


def test_a_language_model_and_its_matrices_are_saved_apart(tmp_path, own_tokenizer):
    model, callback = adapted("hubert", "llama", "finetune.merge=false", "finetune.targets=[decoder_self_attention]")
    callback.finish(stirred(model))
    inputs = inputs_of(model)
    SavedModel(model, *own_tokenizer).save(tmp_path, {})
    loaded = load(str(tmp_path)).model
    assert lora_layers(loaded).keys() == lora_layers(model).keys()
    assert all(name.startswith("decoder.model.layers.") for name in lora_layers(model))
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=1e-4, atol=1e-4)


HOSTILE = {
    "auto_mapping": {"base_model_class": "Evil", "parent_library": "beside"},
    "peft_type": "PREFIX_TUNING",
    "megatron_config": {"fp16": True},
    "megatron_core": "beside.evil",
    "init_lora_weights": "pissa",
    "target_modules": "(a+)+$",
    "lora_alpha": None,
}


@pytest.mark.parametrize(("name", "value"), HOSTILE.items())
def test_of_an_adapter_s_configuration_no_more_is_taken_than_lora_needs(name, value, tmp_path):
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "https://fetch.me", "r": 2, "lora_alpha": 4,
              "lora_dropout": 0.0, "fan_in_fan_out": False, "target_modules": ["q"], name: value}  # fmt: skip
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        load_adapter(joined(), str(tmp_path))
    wrong = f"adapter/adapter_config.json has {name}={value!r}, which is no adapter that sedtrain saves"
    assert (caught.value.option, caught.value.value, caught.value.wrong) == ("checkpoint", str(tmp_path), wrong)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_without_its_weights_is_refused(tmp_path, own_tokenizer):
    model, callback = adapted("hubert", "bert", "finetune.merge=false")
    callback.finish(model)
    SavedModel(model, *own_tokenizer).save(tmp_path, {})
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="lacks the matrices of its adapter_config"):
        load(tmp_path)


@pytest.fixture
def own_tokenizer():
    from families import TOKENIZER

    from sedtrain.models.family_settings import feature_extractor_of

    return TOKENIZER, feature_extractor_of(joined().encoder)
