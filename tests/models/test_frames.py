"""Small encoders as functions give the frames of their `forward`."""

import pytest
import torch
from families import ENCODERS, batch_of, tiny_decoder, tiny_encoder
from torch import nn

from sedtrain.models.frames import encode
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.models.steps import KEPT, forget

DRIVEN = {"hubert", "unispeech", "unispeech_sat", "wav2vec2"}


def joined(encoder):
    return SpeechEncoderDecoder(encoder=encoder, decoder=tiny_decoder("bert")).eval()


def frames_of(model, batch):
    """By functions and by `forward`, the real ones of a padded batch."""
    with torch.inference_mode():
        ours = encode(model, batch.inputs, batch.attention_mask)
        theirs = model.encode(batch.inputs, batch.attention_mask)
    assert torch.equal(ours.encoder_mask, theirs.encoder_mask)
    assert torch.equal(ours.attention_mask, theirs.attention_mask)
    return ours.encoder_frames[ours.encoder_mask], theirs.encoder_frames[theirs.encoder_mask]


@pytest.mark.parametrize("name", ENCODERS)
def test_frames_are_those_of_every_family_and_the_functions_compute_those_that_are_named(name):
    model = joined(tiny_encoder(name))
    ours, theirs = frames_of(model, batch_of(model, 0.9, 1.4, 0.3))
    assert torch.allclose(ours, theirs, atol=1e-5 * theirs.abs().max())
    assert (KEPT[model.encoder] is not None) == (name in DRIVEN)


@pytest.mark.parametrize(
    "options",
    [{"do_stable_layer_norm": False}, {"conv_bias": False}, {"num_conv_pos_embeddings": 31}, {"hidden_act": "relu"}],
)
def test_other_shapes_of_a_family_are_driven(options):
    model = joined(tiny_encoder("wav2vec2", options=options))
    ours, theirs = frames_of(model, batch_of(model, 0.9, 1.4))
    assert torch.allclose(ours, theirs, atol=1e-5 * theirs.abs().max())
    assert KEPT[model.encoder] is not None


@pytest.mark.parametrize(
    "options",
    [
        {"feat_extract_norm": "group"},
        {"add_adapter": True},
        {"adapter_attn_dim": 16},
        {"intermediate_size": 2**16},
    ],
)
def test_what_the_functions_do_not_compute_or_is_large_is_left_to_forward(options):
    model = joined(tiny_encoder("wav2vec2", options=options))
    ours, theirs = frames_of(model, batch_of(model, 0.9, 1.4))
    assert torch.equal(ours, theirs)
    assert KEPT[model.encoder] is None


def test_an_utterance_without_a_frame_has_no_influence_and_no_nan():
    model = joined(tiny_encoder("hubert"))
    batch = batch_of(model, 0.9, 0.6)
    batch.attention_mask[1, 100:] = 0
    with torch.inference_mode():
        found = encode(model, batch.inputs, batch.attention_mask).encoder_frames
        alone = encode(model, batch.inputs[:1], None).encoder_frames
    assert torch.isfinite(found).all()
    assert torch.allclose(found[:1], alone, atol=1e-5)


def test_changed_weights_and_modules_are_seen():
    model = joined(tiny_encoder("hubert"))
    batch, layer = batch_of(model, 0.5, 0.9), model.encoder.encoder.layers[1]
    frames_of(model, batch)
    with torch.no_grad():
        layer.feed_forward.output_dense.weight.mul_(-1)
        model.encoder.encoder.pos_conv_embed.conv.parametrizations.weight.original0.mul_(2)
    layer.attention.q_proj = nn.Sequential(layer.attention.q_proj, nn.Tanh())  # as an adapter would
    ours, theirs = frames_of(model, batch)
    assert torch.allclose(ours, theirs, atol=1e-5 * theirs.abs().max())
    forget(model)
    assert model.encoder not in KEPT
