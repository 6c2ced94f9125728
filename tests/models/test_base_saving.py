"""Built, saved and loaded in every way of the base class, in every precision."""

import os
from types import SimpleNamespace

import pytest
import torch
from pairs import END, IDS, LABELS, PAD, PARTS, START, WAVE_ENCODER, assert_close, joined, part, two_utterances
from safetensors.torch import load_file
from transformers import AutoModelForSpeechSeq2Seq, SpeechEncoderDecoderConfig, SpeechEncoderDecoderModel

from sedtrain.models.speech_encoder_decoder import CTC_FILE, SpeechEncoderDecoder

BOTH = pytest.mark.parametrize("kind", [SpeechEncoderDecoder, SpeechEncoderDecoderModel])


@pytest.fixture
def inputs():
    return {**two_utterances(), "decoder_input_ids": IDS}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder for each part, with random weights."""
    root = tmp_path_factory.mktemp("parts")
    for name in PARTS:
        torch.manual_seed(0)
        part(name).save_pretrained(root / name)
    return root


def both(folders, encoder="hubert", decoder="bert", **options):
    """From two checkpoints: ours, and the base class's with the same cross-attention and projection."""
    paths = folders / encoder, folders / decoder
    ours, base = (
        kind.from_encoder_decoder_pretrained(*paths, **options)
        for kind in (SpeechEncoderDecoder, SpeechEncoderDecoderModel)
    )
    base.load_state_dict(ours.state_dict())
    return ours, base


# --- two checkpoints


@torch.inference_mode()
@pytest.mark.parametrize("decoder", ["bert", "gpt2", "bart"])
def test_two_checkpoints_join_in_evaluation_mode_to_the_model_of_the_base_class(folders, inputs, decoder):
    ours, base = both(folders, decoder=decoder)
    assert not ours.training
    for name, weight in part("hubert").state_dict().items():
        assert ours.encoder.state_dict()[name].shape == weight.shape
    assert_close(ours(**inputs).logits, base(**inputs).logits)


def values(config, *names):
    return [getattr(config, name) for name in names]


def test_keywords_reach_the_encoder_the_decoder_or_the_joined_configuration(folders):
    options = {
        "encoder_hidden_dropout": 0.3,
        "decoder_hidden_dropout_prob": 0.4,
        "pad_token_id": 7,
        "decoder_pad_token_id": 8,
    }
    for model in both(folders, **options):
        assert values(model.config.encoder, "hidden_dropout") == [0.3]
        assert values(model.config.decoder, "hidden_dropout_prob", "pad_token_id") == [0.4, 8]
        assert model.config.pad_token_id == 7
        dropout = next(module for name, module in model.decoder.named_modules() if name.endswith("embeddings.dropout"))
        assert dropout.p == 0.4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_and_precision_without_a_prefix_reach_every_part(folders, inputs, attention):
    model = SpeechEncoderDecoder.from_encoder_decoder_pretrained(
        folders / "hubert", folders / "bert", attn_implementation=attention, dtype=torch.bfloat16
    )
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {
        attention
    }
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.enc_to_dec_proj.weight.dtype == torch.bfloat16
    inputs = {**inputs, "input_values": inputs["input_values"].bfloat16()}
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_precision_may_be_named(folders, dtype, expected, tmp_path):
    model = SpeechEncoderDecoder.from_encoder_decoder_pretrained(folders / "hubert", folders / "bert", dtype=dtype)
    assert {weight.dtype for part in (model.encoder, model.decoder) for weight in part.parameters()} == {expected}
    model.save_pretrained(tmp_path)
    assert SpeechEncoderDecoder.from_pretrained(tmp_path, dtype="auto").encoder.dtype == expected


def test_configurations_and_modules_may_be_given_instead_of_checkpoints(folders, inputs):
    encoder, decoder = part("hubert"), part("bert")
    model = SpeechEncoderDecoder.from_encoder_decoder_pretrained(encoder_model=encoder, decoder_model=decoder)
    assert model.decoder is decoder
    assert model.encoder is encoder
    config = part("hubert").config
    config.layerdrop = 0.25
    model = SpeechEncoderDecoder.from_encoder_decoder_pretrained(
        folders / "hubert", folders / "bert", encoder_config=config, decoder_config=part("bert").config
    )
    assert model.config.encoder.layerdrop == 0.25
    assert model(**inputs).logits.isfinite().all()


@BOTH
def test_without_a_checkpoint_or_a_module_of_a_part_it_is_refused(folders, kind):
    with pytest.raises(ValueError, match="encoder_pretrained_model_name_or_path"):
        kind.from_encoder_decoder_pretrained(decoder_pretrained_model_name_or_path=folders / "bert")
    with pytest.raises(ValueError, match="decoder_pretrained_model_name_or_path"):
        kind.from_encoder_decoder_pretrained(folders / "hubert")
    with pytest.raises(ValueError, match="Either a configuration or an encoder and a decoder"):
        kind()


# --- a folder


@torch.inference_mode()
@pytest.mark.parametrize("decoder", ["bert", "gpt2", "bart"])
def test_a_folder_saved_by_either_class_is_loaded_by_both(inputs, decoder, tmp_path):
    for saving in (SpeechEncoderDecoder, SpeechEncoderDecoderModel):
        model = joined("hubert", decoder, kind=saving)
        model.save_pretrained(tmp_path)
        for loading in (SpeechEncoderDecoder, SpeechEncoderDecoderModel, AutoModelForSpeechSeq2Seq):
            loaded, told = loading.from_pretrained(tmp_path, output_loading_info=True)
            assert not any(told.values())
            assert_close(loaded(**inputs).logits, model(**inputs).logits)
            assert values(loaded.generation_config, "decoder_start_token_id", "eos_token_id", "pad_token_id") == [
                START,
                END,
                PAD,
            ]


@BOTH
def test_keywords_of_from_pretrained_change_the_configuration(kind, tmp_path):
    joined("hubert", "bert").save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path, output_hidden_states=True, pad_token_id=9)
    assert loaded.config.output_hidden_states
    assert loaded.config.pad_token_id == 9


@BOTH
def test_a_configuration_may_be_given_to_from_pretrained_as_object_and_as_folder(kind, tmp_path):
    joined("hubert", "bert").save_pretrained(tmp_path)
    config = SpeechEncoderDecoderConfig.from_pretrained(tmp_path)
    config.pad_token_id = 9
    assert kind.from_pretrained(tmp_path, config=config).config.pad_token_id == 9
    assert kind.from_pretrained(tmp_path, config=str(tmp_path)).config.pad_token_id == PAD


# --- precision


@torch.inference_mode()
@pytest.mark.parametrize("decoder", ["bert", "gpt2", "bart"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_are_loaded_run_and_generate(inputs, decoder, dtype, tmp_path):
    model = joined("hubert", decoder)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    inputs["input_values"] = inputs["input_values"].to(dtype)
    for lower in (SpeechEncoderDecoder.from_pretrained(tmp_path, dtype=dtype), model.to(dtype)):
        assert {weight.dtype for weight in lower.parameters()} == {dtype}
        output = lower(**inputs, labels=LABELS)
        torch.testing.assert_close(output.logits.float(), expected, rtol=0, atol=0.05)
        assert output.loss.isfinite()
        assert (
            lower.generate(**two_utterances() | {"input_values": inputs["input_values"]}, max_new_tokens=3).shape[0]
            == 2
        )
    model.save_pretrained(tmp_path / "lower")
    assert SpeechEncoderDecoder.from_pretrained(tmp_path / "lower", dtype="auto").dtype == dtype
    assert SpeechEncoderDecoder.from_pretrained(tmp_path / "lower", dtype=torch.float32).dtype == torch.float32


# --- the head for CTC


@pytest.fixture
def with_head(tmp_path):
    model = joined("hubert", "bert")
    model.add_ctc_head(11)
    model.save_pretrained(tmp_path)
    return model


@torch.inference_mode()
def test_the_ctc_head_is_saved_and_loaded_with_the_model(with_head, inputs, tmp_path):
    assert set(load_file(tmp_path / CTC_FILE)) == {"weight", "bias"}
    loaded, told = SpeechEncoderDecoder.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    assert torch.equal(loaded.ctc_head.weight, with_head.ctc_head.weight)
    assert SpeechEncoderDecoder.from_pretrained(tmp_path, dtype=torch.float16).ctc_head.bias.dtype == torch.float16
    assert loaded.ctc_head(loaded.encode(inputs["input_values"]).encoder_frames).shape[-1] == 11


@torch.inference_mode()
def test_stock_transformers_does_not_notice_the_ctc_head(with_head, inputs, tmp_path, capfd, caplog):
    base, told = SpeechEncoderDecoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    assert "ctc_head" not in capfd.readouterr().err + caplog.text
    assert_close(base(**inputs).logits, with_head(**inputs).logits)


def test_the_ctc_head_goes_to_the_hub_with_the_model(with_head, monkeypatch):
    class Hub:
        def create_repo(self, name, **options):
            return SimpleNamespace(repo_id=name)

    uploaded = []
    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr(
        "transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: SimpleNamespace(save=lambda _: None)
    )
    monkeypatch.setattr(
        SpeechEncoderDecoder,
        "_upload_modified_files",
        lambda self, folder, *_, **__: uploaded.extend(os.listdir(folder)),
    )
    with_head.push_to_hub("me/model")
    assert {"config.json", "model.safetensors", CTC_FILE} <= set(uploaded)


# --- widths


@torch.inference_mode()
@pytest.mark.parametrize("output_width", [16, 24, 20])
def test_an_adapter_of_the_encoder_s_own_may_have_any_width(inputs, output_width, tmp_path):
    torch.manual_seed(0)
    encoder = part("wav2vec2", add_adapter=True, num_adapter_layers=1, output_hidden_size=output_width)
    model = SpeechEncoderDecoder(encoder=encoder, decoder=part("bert")).eval()
    assert hasattr(model, "enc_to_dec_proj") == (output_width != 16)
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path)
    assert_close(SpeechEncoderDecoder.from_pretrained(tmp_path)(**inputs).logits, logits)


@torch.inference_mode()
def test_a_decoder_that_states_the_width_of_cross_attention_works(inputs):
    decoder = part("bert", cross_attention_hidden_size=WAVE_ENCODER["hidden_size"])
    output = SpeechEncoderDecoder(encoder=part("hubert"), decoder=decoder).eval()(**inputs)
    assert output.logits.isfinite().all()
