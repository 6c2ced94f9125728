"""The front end as matrix products, against the convolutions of torch and transformers."""

import copy
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import Wav2Vec2Config
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder

from sedtrain.models import convolution as kernels
from sedtrain.models import products
from sedtrain.models.convolution import strided_convolution
from sedtrain.models.encoder import encoder_from_config
from sedtrain.models.masking import MatrixProductFeatureEncoder
from sedtrain.models.mixins import MaskedGroupNorm


@st.composite
def convolutions(draw):
    """kernel, stride, and a number of frames that at least one kernel fits into."""
    kernel, stride = draw(st.integers(1, 21)), draw(st.integers(1, 12))
    return kernel, stride, kernel + draw(st.integers(0, 60))


@given(convolutions(), st.booleans(), st.integers(1, 3), st.integers(1, 70))
def test_a_strided_convolution_is_that_of_torch(shape, bias, input_dim, rows):
    kernel, stride, num_frames = shape
    torch.manual_seed(kernel)
    with mock.patch.object(kernels, "AT_ONCE", 4 * rows):
        convolution = nn.Conv1d(input_dim, 4, kernel, stride, bias=bias).double()
        frames = torch.randn(2, num_frames, input_dim, dtype=torch.float64)
        frames.requires_grad_()
        expected = convolution(frames.transpose(1, 2)).transpose(1, 2)
        found = strided_convolution(frames, convolution)
        with torch.inference_mode():
            without_gradients = strided_convolution(frames, convolution)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(without_gradients, expected)
        inputs, weights = [frames, *convolution.parameters()], torch.randn_like(expected)
        gradients = [torch.autograd.grad((each * weights).sum(), inputs) for each in (found, expected)]
        torch.testing.assert_close(*gradients)
        strides = [each.stride() for each in convolution.parameters()]
        assert [each.stride() for each in gradients[0][1:]] == strides  # DDP warns of others, and copies them


@pytest.mark.parametrize("by_onednn", [False, True])
@settings(max_examples=20)
@given(st.sampled_from(["layer", "group"]), st.lists(st.integers(400, 4_000), min_size=1, max_size=3))
def test_in_32_bits_either_matrix_product_is_as_exact_as_transformers(by_onednn, norm, lengths):
    torch.manual_seed(sum(lengths))
    front_end = tiny_encoder(norm).feature_extractor
    audio = torch.nn.utils.rnn.pad_sequence([torch.randn(length) for length in lengths], batch_first=True)
    with (
        mock.patch.object(products, "multiplies_by_onednn", lambda: by_onednn),
        mock.patch.object(kernels, "AT_ONCE", 500),
    ):
        results = frames_and_gradients(front_end, front_end(audio))
    upstream = frames_and_gradients(front_end, Wav2Vec2FeatureEncoder.forward(front_end, audio))
    front_end = copy.deepcopy(front_end).double()
    exact = frames_and_gradients(front_end, Wav2Vec2FeatureEncoder.forward(front_end, audio.double()))
    for found, stock, expected in zip(results, upstream, exact, strict=True):
        assert (found - expected).norm() <= 5e-5 * expected.norm() + 4 * (stock - expected).norm()


def frames_and_gradients(front_end, frames):
    weights = torch.linspace(-1, 1, frames.numel()).view_as(frames) / frames.shape[-1]
    gradients = torch.autograd.grad((frames * weights).sum(), list(front_end.parameters()))
    return frames, torch.cat([each.flatten() for each in gradients])


def test_frozen_convolutions_pass_the_gradient_on():
    convolution = nn.Conv1d(3, 4, 3, 2).requires_grad_(False)
    frames = torch.randn(2, 9, 3, requires_grad=True)
    strided_convolution(frames, convolution).sum().backward()
    assert frames.grad.abs().sum() > 0 and convolution.weight.grad is None


def test_under_autocast_the_front_end_computes_in_16_bits():
    convolution = nn.Conv1d(3, 4, 3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        output = strided_convolution(torch.randn(2, 9, 3), convolution)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert convolution.weight.grad.dtype == torch.float32


@given(
    st.sampled_from(["layer", "group"]),
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), min_size=1, max_size=4),
    st.integers(0, 400),
)
def test_the_front_end_and_its_gradients_are_those_of_transformers(norm, layers, more_samples):
    front_end = double_front_end(norm, *zip(*layers, strict=True))
    receptive_field = 1
    for kernel, stride in reversed(layers):
        receptive_field = (receptive_field - 1) * stride + kernel
    more_samples += 8 if norm == "group" else 0  # torch normalizes more than one frame only
    audio = torch.randn(2, receptive_field + more_samples, dtype=torch.float64)
    expected = front_end(audio)
    front_end.__class__ = MatrixProductFeatureEncoder
    if norm == "group":
        front_end.conv_layers[0].layer_norm.__class__ = MaskedGroupNorm
    by_products = front_end(audio)
    torch.testing.assert_close(by_products, expected)
    weights = torch.randn_like(expected)
    parameters = list(front_end.parameters())
    torch.testing.assert_close(
        torch.autograd.grad((by_products * weights).sum(), parameters),
        torch.autograd.grad((expected * weights).sum(), parameters),
    )


def double_front_end(norm, sizes, strides):
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        conv_dim=[3, 4, 5, 6][: len(sizes)],
        conv_kernel=sizes,
        conv_stride=strides,
        num_feat_extract_layers=len(sizes),
        feat_extract_norm=norm,
        conv_bias=True,
    )
    front_end = Wav2Vec2FeatureEncoder(config).double()
    front_end._requires_grad = False  # upstream sets requires_grad on its input, which matters to checkpointing only
    return front_end


def tiny_encoder(norm):
    return encoder_from_config(
        Wav2Vec2Config(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, feat_extract_norm=norm,
            conv_dim=[8, 8], conv_kernel=[10, 4], conv_stride=[5, 2], num_feat_extract_layers=2,
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        )
    )  # fmt: skip


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_the_front_end_of_an_encoder_is_that_of_transformers(norm):
    front_end = tiny_encoder(norm).eval().feature_extractor
    audio = torch.randn(2, 800)
    assert isinstance(front_end, MatrixProductFeatureEncoder)
    torch.testing.assert_close(front_end(audio), Wav2Vec2FeatureEncoder.forward(front_end, audio), rtol=1e-4, atol=1e-5)


def test_a_copy_computes_with_its_own_weights():
    encoder = tiny_encoder("layer").eval()
    copied = copy.deepcopy(encoder)
    torch.nn.init.zeros_(copied.feature_extractor.conv_layers[-1].layer_norm.weight)
    audio = torch.randn(2, 800)
    assert copied.feature_extractor(audio).abs().max() == 0
    assert encoder.feature_extractor(audio).abs().max() > 0


def test_a_checkpointed_front_end_is_recomputed_as_transformers_does():
    encoder = tiny_encoder("layer").train()
    front_end = encoder.feature_extractor
    assert not front_end.is_checkpointed()
    encoder.activation_checkpointing_enable()
    assert front_end.is_checkpointed()
    assert not front_end.eval().is_checkpointed()
