"""No parameter is left without a gradient, and none is trained that no forward uses: several ranks survive neither."""

import pytest
import torch
from families import DECODERS, ENCODERS, TOKENIZER, tiny_decoder, tiny_encoder

from sedtrain.models.adapter import ConvAdapter
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

LABELS = torch.tensor([[5, 6, 2], [7, 2, -100]])


def joined(encoder="hubert", decoder="bert", **options):
    model = SpeechEncoderDecoder(encoder=tiny_encoder(encoder), decoder=tiny_decoder(decoder, **options))
    model.set_special_tokens(1, 2, 0)
    return model.train()


def without_gradient(model, audio=None):
    model.zero_grad()
    loss = model(torch.randn(2, 8000) if audio is None else audio, labels=LABELS).loss
    assert loss.isfinite()
    loss.backward()
    return [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_loaded_model_trains_what_a_new_one_trains(encoder, tmp_path):
    model = joined(encoder)
    model.save_pretrained(tmp_path / "joined")
    model.encoder.save_pretrained(tmp_path / "encoder")
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    loaded = SpeechEncoderDecoder.from_pretrained(tmp_path / "joined")
    assert {name for name, weight in loaded.named_parameters() if weight.requires_grad} == trained
    alone = type(model.encoder).from_pretrained(tmp_path / "encoder")
    names = {f"encoder.{name}" for name, weight in alone.named_parameters() if weight.requires_grad}
    assert names == {name for name in trained if name.startswith("encoder.")}


@pytest.mark.parametrize("decoder", [name for name in DECODERS if name not in ("gpt2", "rembert")])
def test_dropped_layers_of_a_decoder_have_a_gradient_of_zero(decoder):
    config = tiny_decoder(decoder).config
    rates = {name: 0.999 for name in ("layerdrop", "decoder_layerdrop") if hasattr(config, name)}
    model = joined(decoder=decoder, **({"options": rates} if rates else {}))
    assert without_gradient(model) == []
    if rates:
        assert not any(
            weight.grad.any() for name, weight in model.named_parameters() if ".layers.0." in name and "decoder" in name
        )


def test_a_ctc_head_that_the_step_does_not_use_has_a_gradient_of_zero():
    model = joined()
    model.add_ctc_head(len(TOKENIZER))
    assert without_gradient(model) == []
    assert not model.ctc_head.weight.grad.any()


def test_the_ctc_head_grows_with_the_vocabulary_and_keeps_its_rows():
    model = joined()
    head = model.add_ctc_head(len(TOKENIZER))
    model.resize_token_embeddings(len(TOKENIZER) + 4)
    assert model.ctc_head.out_features == model.config.ctc_vocab_size == len(TOKENIZER) + 4
    assert torch.equal(model.ctc_head.weight[: len(TOKENIZER)], head.weight)
    assert torch.equal(model.ctc_head.bias[: len(TOKENIZER)], head.bias)


def test_the_ctc_head_has_the_precision_of_the_model():
    assert joined().to(torch.bfloat16).add_ctc_head(7).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_clip_shorter_than_a_frame_makes_nothing_nan(encoder):
    encoder = tiny_encoder(encoder)
    is_audio = encoder.main_input_name == "input_values"
    shape = (2, 8000) if is_audio else (2, 80, 100) if "whisper" in encoder.config.model_type else (2, 100, 160)
    if encoder.config.model_type in ("parakeet_encoder", "speech_to_text-encoder"):
        shape = (2, 100, 80)
    mask = torch.ones(2, 8000 if is_audio else 100, dtype=torch.long)
    mask[1, 1 if is_audio else 0 :] = 0
    frames = encoder(torch.randn(shape), attention_mask=mask).last_hidden_state
    assert frames.isfinite().all()
    frames.square().mean().backward()
    assert all(weight.grad.isfinite().all() for weight in encoder.parameters() if weight.grad is not None)


@pytest.mark.parametrize("num_items", [0, torch.tensor(0)])
def test_no_items_in_the_batch_give_a_loss_of_zero(num_items):
    loss = joined()(torch.randn(2, 8000), labels=torch.full((2, 3), -100), num_items_in_batch=num_items).loss
    assert loss == 0


def test_an_adapter_given_beside_a_configuration_is_saved(tmp_path):
    parts = joined()
    adapter = ConvAdapter(parts.encoder_output_dim, parts.decoder.config.hidden_size)
    model = SpeechEncoderDecoder(
        config=parts.config, encoder=parts.encoder, decoder=parts.decoder, adapter=adapter
    ).eval()
    model.save_pretrained(tmp_path)
    loaded = SpeechEncoderDecoder.from_pretrained(tmp_path)
    audio, ids = torch.randn(1, 8000), torch.tensor([[1, 5]])
    with torch.no_grad():
        assert torch.equal(loaded(audio, decoder_input_ids=ids).logits, model(audio, decoder_input_ids=ids).logits)
