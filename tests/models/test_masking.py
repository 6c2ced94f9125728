"""Every encoder family under every mask: alone, in a padded batch, with garbage in the padding."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from sedtrain.models.encoder import encoder_from_config, frame_mask
from sedtrain.models.encoder_families import UPSTREAM
from sedtrain.models.mixins import MaskedConv1d, MaskedGroupNorm, length_mask, output_lengths

AUDIO = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "conv_dim": [8, 8, 8], "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2], "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "mask_time_prob": 0.0,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0,
}  # fmt: skip
CONFORMER = {**AUDIO, "conv_depthwise_kernel_size": 5, "conformer_conv_dropout": 0.0}
LAYER = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
GROUP = {"feat_extract_norm": "group"}
ADAPTER = {"add_adapter": True, "num_adapter_layers": 2, "output_hidden_size": 12}
FEATURES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "layerdrop": 0.0,
    "feature_projection_input_dim": 12, "conv_depthwise_kernel_size": 5, "mask_time_prob": 0.0,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0,
    "conformer_conv_dropout": 0.0,
}  # fmt: skip
SEAMLESS = {
    "hidden_size": 16, "speech_encoder_layers": 2, "speech_encoder_attention_heads": 2,
    "speech_encoder_intermediate_size": 24, "feature_projection_input_dim": 12, "conv_depthwise_kernel_size": 5,
    "speech_encoder_layerdrop": 0.0, "speech_encoder_dropout": 0.0, "adaptor_dropout": 0.0, "vocab_size": 20,
}  # fmt: skip
SEQ2SEQ = {
    "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "dropout": 0.0,
    "encoder_layerdrop": 0.0, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "vocab_size": 20,
    "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24,
}  # fmt: skip
VARIANTS = {
    "wav2vec2 group": ("wav2vec2", {**AUDIO, **GROUP}),
    "wav2vec2 layer": ("wav2vec2", {**AUDIO, **LAYER}),
    "wav2vec2 adapter": ("wav2vec2", {**AUDIO, **LAYER, **ADAPTER}),
    "wav2vec2 group adapter": ("wav2vec2", {**AUDIO, **GROUP, **ADAPTER, "adapter_kernel_size": 5}),
    "hubert group": ("hubert", {**AUDIO, **GROUP}),
    "hubert layer": ("hubert", {**AUDIO, **LAYER}),
    "hubert batch norm": ("hubert", {**AUDIO, **LAYER, "conv_pos_batch_norm": True}),
    "wavlm group": ("wavlm", {**AUDIO, **GROUP}),
    "wavlm layer": ("wavlm", {**AUDIO, **LAYER}),
    "wavlm adapter": ("wavlm", {**AUDIO, **LAYER, **ADAPTER}),
    "unispeech group": ("unispeech", {**AUDIO, **GROUP}),
    "unispeech layer": ("unispeech", {**AUDIO, **LAYER}),
    "unispeech-sat group": ("unispeech-sat", {**AUDIO, **GROUP}),
    "unispeech-sat layer": ("unispeech-sat", {**AUDIO, **LAYER}),
    "data2vec": ("data2vec-audio", {**AUDIO, "num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5}),
    "data2vec adapter": ("data2vec-audio", {**AUDIO, **ADAPTER, "num_conv_pos_embeddings": 3}),
    "sew group": ("sew", {**AUDIO, **GROUP, "squeeze_factor": 2}),
    "sew layer": ("sew", {**AUDIO, **LAYER, "squeeze_factor": 2}),
    "sew threes": ("sew", {**AUDIO, **LAYER, "squeeze_factor": 3, "num_conv_pos_embeddings": 9}),
    "sew-d group": ("sew-d", {**AUDIO, **GROUP, "squeeze_factor": 2}),
    "sew-d layer": ("sew-d", {**AUDIO, **LAYER, "squeeze_factor": 2}),
    "conformer relative": ("wav2vec2-conformer", {**CONFORMER, **LAYER}),
    "conformer rotary": ("wav2vec2-conformer", {**CONFORMER, **LAYER, "position_embeddings_type": "rotary"}),
    "conformer group adapter": ("wav2vec2-conformer", {**CONFORMER, **GROUP, **ADAPTER}),
    "w2v-bert": ("wav2vec2-bert", FEATURES),
    "w2v-bert relative": ("wav2vec2-bert", {**FEATURES, "position_embeddings_type": "relative"}),
    "w2v-bert adapter": ("wav2vec2-bert", {**FEATURES, **ADAPTER}),
    "w2v-bert wide adapter": ("wav2vec2-bert", {**FEATURES, **ADAPTER, "adapter_kernel_size": 5}),
    "parakeet": ("parakeet_encoder", {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
        "num_mel_bins": 12, "subsampling_factor": 4, "subsampling_conv_channels": 8, "conv_kernel_size": 5,
        "layerdrop": 0.0, "dropout": 0.0, "dropout_positions": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0,
    }),
    "whisper": ("whisper", {**SEQ2SEQ, "num_mel_bins": 12, "max_source_positions": 400, "begin_suppress_tokens": None}),
    "speech_to_text": ("speech_to_text", {**SEQ2SEQ, "input_feat_per_channel": 12, "conv_channels": 8}),
    "moonshine": ("moonshine", {
        "hidden_size": 16, "encoder_num_hidden_layers": 2, "encoder_num_attention_heads": 2, "intermediate_size": 24,
        "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "vocab_size": 20,
    }),
    "seamless": ("seamless_m4t", {**SEAMLESS, "adaptor_kernel_size": 3, "adaptor_stride": 2}),
    "seamless two adapters": ("seamless_m4t", {
        **SEAMLESS, "adaptor_kernel_size": 3, "adaptor_stride": 2, "num_adapter_layers": 2,
    }),
    "seamless even adapter": ("seamless_m4t", {**SEAMLESS, "adaptor_kernel_size": 4, "adaptor_stride": 4}),
    "seamless bare": ("seamless_m4t", {**SEAMLESS, "add_adapter": False}),
    "seamless v2": ("seamless_m4t_v2", {**SEAMLESS, "adaptor_kernel_size": 3, "adaptor_stride": 2}),
    "seamless v2 chunks": ("seamless_m4t_v2", {
        **SEAMLESS, "add_adapter": False, "speech_encoder_chunk_size": 7, "speech_encoder_left_chunk_num": 1,
    }),
    "speecht5 group": ("speecht5", {**AUDIO, **GROUP, **SEQ2SEQ, "positional_dropout": 0.0}),
    "speecht5 layer": ("speecht5", {**AUDIO, **LAYER, **SEQ2SEQ, "positional_dropout": 0.0}),
}  # fmt: skip
SAMPLES = {"input_values": (3000, 1900, 1901, 1940, 2999), "input_features": (100, 59, 60, 61, 99)}


def built(name, train=False, **options):
    """A variant's encoder with weights all random, biases too."""
    model_type, values = VARIANTS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**values, **options})
    encoder = encoder_from_config(config)
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return encoder.train(train)


def noise(encoder, length, seed):
    """(1, S) audio, or (1, S, F) or (1, F, S) features, of `length` real inputs."""
    generator = torch.Generator().manual_seed(seed)
    if encoder.main_input_name == "input_values":
        scale = 384 // 20 if encoder.config.model_type == "moonshine-encoder" else 1
        return torch.randn(1, length * scale, generator=generator)
    features = torch.randn(1, length, 12, generator=generator)
    return features.mT if encoder.config.model_type == "whisper-encoder" else features


def padded(encoder, rows, garbage=0.0):
    """One batch of utterances, behind each of them padding, and its mask."""
    time = -1 if encoder.config.model_type == "whisper-encoder" else 1
    lengths = torch.tensor([row.shape[time] for row in rows])
    mask = length_mask(lengths, int(lengths.max()))
    shape = [len(rows), *rows[0].shape[1:]]
    shape[time] = int(lengths.max())
    batch = garbage * torch.randn(shape, generator=torch.Generator().manual_seed(9))
    for row, length, place in zip(rows, lengths, batch, strict=True):
        (place[..., :length] if time == -1 else place[:length]).copy_(row[0])
    return batch, mask.long()


def utterances(encoder):
    return [noise(encoder, length, seed) for seed, length in enumerate(SAMPLES[encoder.main_input_name])]


@pytest.fixture(scope="module", params=VARIANTS)
def encoder(request):
    return built(request.param)


@torch.inference_mode()
def test_padding_and_garbage_in_it_change_no_frame(encoder):
    rows = utterances(encoder)
    for garbage in (0.0, 1e3):
        batch, mask = padded(encoder, rows, garbage)
        together = encoder(batch, attention_mask=mask).last_hidden_state
        real = frame_mask(encoder, together.shape[1], mask)
        for row, output, valid in zip(rows, together, real, strict=True):
            alone = encoder(row).last_hidden_state[0]
            assert valid.tolist() == [True] * len(alone) + [False] * (len(output) - len(alone))
            torch.testing.assert_close(output[valid], alone, rtol=0, atol=2e-5)


@torch.inference_mode()
def test_unpadded_it_is_the_encoder_of_transformers(encoder):
    kind = UPSTREAM[type(encoder)]
    if kind.__name__ == "WhisperEncoder":
        pytest.skip("upstream takes 30 seconds only: tested in test_encoder.py")
    upstream = kind(encoder.config).eval().double()
    upstream.load_state_dict(encoder.state_dict())
    ours = copy.deepcopy(encoder).double()
    batch = torch.cat([noise(encoder, SAMPLES[encoder.main_input_name][0], seed) for seed in (1, 2)]).double()
    expected = upstream(batch).last_hidden_state
    ones = padded(encoder, list(batch[:, None]))[1]
    for mask in (None, ones):
        torch.testing.assert_close(ours(batch, attention_mask=mask).last_hidden_state, expected, rtol=0, atol=1e-6)


@torch.inference_mode()
def test_an_utterance_of_one_sample_has_no_frame_or_the_one_it_has_alone(encoder):
    rows = [noise(encoder, SAMPLES[encoder.main_input_name][0], 1), noise(encoder, 1, 2)]
    if encoder.main_input_name == "input_values":
        rows[1] = rows[1][:, :1]
    batch, mask = padded(encoder, rows)
    output = encoder(batch, attention_mask=mask).last_hidden_state
    expected = 0 if encoder.main_input_name == "input_values" else 1
    assert frame_mask(encoder, output.shape[1], mask)[1].sum() <= expected
    assert output[0].isfinite().all()


def test_a_copy_has_weights_of_its_own_and_masks_of_its_own(encoder):
    batch, mask = padded(encoder, utterances(encoder), 1e3)
    copied = copy.deepcopy(encoder)
    with torch.inference_mode():
        expected = encoder(batch, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(copied(batch, attention_mask=mask).last_hidden_state, expected)
        for weight in copied.parameters():
            weight.zero_()
        torch.testing.assert_close(encoder(batch, attention_mask=mask).last_hidden_state, expected)
        assert not torch.allclose(copied(batch, attention_mask=mask).last_hidden_state, expected)


def test_an_encoder_can_be_sent_to_another_process():
    encoder = built("w2v-bert adapter")  # of those without weight norm, which torch cannot pickle
    copied = pickle.loads(pickle.dumps(encoder))
    batch, mask = padded(encoder, utterances(encoder), 1e3)
    with torch.inference_mode():
        expected = encoder(batch, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(copied(batch, attention_mask=mask).last_hidden_state, expected)


STEPS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=3)


@given(STEPS, st.integers(1, 60))
def test_lengths_are_those_that_convolutions_make(steps, length):
    frames = torch.zeros(1, 1, length)
    for kernel, stride, padding in steps:
        if frames.shape[-1] + 2 * padding < kernel:
            frames = frames[..., :0]
            break
        frames = torch.nn.functional.max_pool1d(torch.nn.functional.pad(frames, (padding, padding)), kernel, stride)
    if frames.shape[-1] > 0:
        assert output_lengths(torch.tensor([length]), tuple(steps)).tolist() == [frames.shape[-1]]
    assert length_mask(torch.tensor([length]), 70).sum() == length


def test_lengths_below_a_kernel_are_zero():
    assert output_lengths(torch.tensor([0, 1, 9, 10]), ((10, 5, 0), (3, 2, 0))).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("num_groups", [1, 2, 6])
def test_a_masked_group_norm_is_that_of_each_utterance_alone(num_groups):
    norm = torch.nn.GroupNorm(num_groups, 6)
    torch.nn.init.normal_(norm.weight)
    masked = copy.deepcopy(norm)
    masked.__class__ = MaskedGroupNorm
    masked.lengths = torch.tensor([9, 4, 1, 0])
    frames = 100 + torch.randn(4, 6, 9)
    output = masked(frames)
    assert output.isfinite().all()
    for row, normalized, length in zip(frames, output, masked.lengths.tolist()[:2], strict=False):
        torch.testing.assert_close(normalized[:, :length], norm(row[None, :, :length])[0], rtol=1e-3, atol=1e-3)
    assert masked(frames.bfloat16()).dtype == torch.bfloat16


def test_a_masked_convolution_sees_zeros_behind_an_utterance():
    convolution = MaskedConv1d(2, 3, 5, padding=2)
    frames = torch.full((1, 2, 8), torch.nan)
    frames[..., :4] = torch.randn(2, 4)
    convolution.lengths = torch.tensor([4])
    output = convolution(frames)[..., :4]
    convolution.lengths = None
    torch.testing.assert_close(output, convolution(frames[..., :4]))
