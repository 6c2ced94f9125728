"""Every encoder family in a training step: gradients, checkpointing, SpecAugment, frozen front ends, compilation."""

import numpy as np
import pytest
import torch
from families import tiny_encoder
from test_masking import GROUP, SAMPLES, VARIANTS, built, noise, padded, utterances
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sedtrain.errors import UserError
from sedtrain.models.encoder import frame_mask, freeze_front_end, standalone
from sedtrain.models.mixins import length_mask

LAYERDROP = {"seamless_m4t": "speech_encoder_layerdrop", "seamless_m4t_v2": "speech_encoder_layerdrop"} | dict.fromkeys(
    ["whisper", "speech_to_text", "speecht5"], "encoder_layerdrop"
)
SPEC_AUGMENT = [name for name, (_, values) in VARIANTS.items() if "mask_time_prob" in values]
FRONT_ENDS = {
    "wav2vec2 layer": "feature_extractor", "data2vec": "feature_extractor", "sew-d group": "feature_extractor",
    "conformer relative": "feature_extractor", "w2v-bert": "feature_projection", "seamless": "feature_projection",
    "seamless v2": "feature_projection", "parakeet": "subsampling", "whisper": "conv", "speech_to_text": "conv",
    "moonshine": ("conv", "groupnorm"), "speecht5 group": "prenet.feature_encoder",
}  # fmt: skip


def gradients(encoder, batch, mask, before_backward=None):
    """Of a weighted sum of the real frames, by the parameter's name; None where there is none."""
    encoder.zero_grad()
    output = encoder(batch, attention_mask=mask).last_hidden_state
    real = frame_mask(encoder, output.shape[1], mask)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    if before_backward is not None:
        before_backward()
    (output * weights)[real].sum().backward()
    return {name: weight.grad for name, weight in encoder.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_trained_parameter_gets_a_gradient_whatever_layers_are_dropped(name):
    options = {LAYERDROP.get(VARIANTS[name][0], "layerdrop"): 0.999}
    options |= {"mask_time_prob": 0.5} if name in SPEC_AUGMENT else {}
    encoder = built(name, train=True, **options)
    grads = gradients(encoder, *padded(encoder, utterances(encoder)))
    assert {key for key, gradient in grads.items() if gradient is None} == set()
    assert any(gradient.abs().sum() > 0 for gradient in grads.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_without_spec_augment_its_parameter_is_frozen(name):
    off = [{"mask_time_prob": 0.1, "apply_spec_augment": False}]
    if not name.startswith("wavlm"):  # upstream reads a value there that its configuration does not have
        off.append({"mask_feature_prob": 0.1})
    for options in off:
        encoder = built(name, train=True, **options)
        grads = gradients(encoder, *padded(encoder, utterances(encoder)))
        assert {key for key, gradient in grads.items() if gradient is None} == set()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_gradient_checkpointing_changes_no_gradient_even_with_another_batch_in_between(name, reentrant):
    if reentrant and VARIANTS[name][0] in ("wavlm", "sew-d", "speecht5"):
        pytest.skip("upstream's layers share a position bias, which this kind of checkpoint differentiates twice")
    encoder = built(name, train=True).double()
    batch, mask = padded(encoder, utterances(encoder), 1e3)
    batch = batch.double()
    expected = gradients(encoder, batch, mask)
    encoder.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert encoder.is_activation_checkpointing
    other, _ = padded(encoder, utterances(encoder)[::-1])
    with_it = gradients(encoder, batch, mask, before_backward=lambda: encoder(other[:2].double()))
    for key, gradient in expected.items():
        torch.testing.assert_close(with_it[key], gradient, rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", SPEC_AUGMENT)
def test_spec_augment_leaves_a_batch_alone_that_is_no_longer_than_a_mask(name):
    encoder = built(name, train=True, mask_time_prob=0.9, mask_time_length=500)
    batch, mask = padded(encoder, utterances(encoder))
    augmented = encoder(batch, attention_mask=mask).last_hidden_state
    encoder.config.mask_time_prob = 0.0
    torch.testing.assert_close(augmented, encoder(batch, attention_mask=mask).last_hidden_state)


@pytest.mark.parametrize("name", ["wav2vec2 layer", "sew layer", "w2v-bert", "speecht5 layer"])
def test_spec_augment_masks_real_frames_and_no_utterance_that_one_mask_would_cover(name):
    np.random.seed(0)
    encoder = built(name, train=True, mask_time_prob=0.9, mask_time_length=10, mask_time_min_masks=2)
    owner = encoder.prenet if name.startswith("speecht5") else encoder
    lengths = torch.tensor([60, 30, 11, 10, 3, 0])
    owner.lengths = lengths
    hidden_states = torch.zeros(6, 60, owner.config.hidden_size)
    masked = (owner._mask_hidden_states(hidden_states) != 0).any(-1)
    inside = masked & length_mask(lengths, 60)
    assert (inside[:3].sum(1) > 0).all()
    assert (inside[:2].sum(1) < lengths[:2]).all()
    assert inside[3:].sum() == 0


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_a_frozen_front_end_gets_no_gradient_and_all_the_rest_does(name):
    encoder = built(name, train=True)
    freeze_front_end(encoder)
    frozen = {key for key, weight in encoder.named_parameters() if not weight.requires_grad}
    unused = {key for key in frozen if "pos_conv_embed" in key or key == "embed_positions.weight"}
    front_end = {key for key, _ in encoder.named_parameters() if key.startswith(FRONT_ENDS[name])}
    assert frozen - unused == front_end != set()
    grads = gradients(encoder, *padded(encoder, utterances(encoder)))
    assert None not in grads.values()


@pytest.mark.parametrize("name", VARIANTS)
def test_half_precision_under_autocast_is_finite(name):
    encoder = built(name, train=True)
    with torch.autocast("cpu", torch.bfloat16):
        grads = gradients(encoder, *padded(encoder, utterances(encoder)))
    assert all(gradient.isfinite().all() for gradient in grads.values())


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # in transformers
@pytest.mark.parametrize(("name", "shape"), [("w2v_bert", (2, 50, 160)), ("wav2vec2_conformer", (2, 16000))])
def test_it_compiles_in_one_graph(name, shape):
    """Others compile in a joined model, in test_base_training.py."""
    encoder = tiny_encoder(name).train()
    batch = torch.randn(shape)
    mask = length_mask(torch.tensor([shape[1], shape[1] // 2]), shape[1]).long()
    expected = encoder(batch, attention_mask=mask).last_hidden_state
    torch.compiler.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    output = compiled(batch, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=2e-5)
    output.sum().backward()


class Silent(PreTrainedModel):
    """An encoder of a user's own that says nothing of masks."""

    config_class = PreTrainedConfig

    def __init__(self):
        super().__init__(PreTrainedConfig())
        self.linear = nn.Linear(1, 4)

    def forward(self, inputs, **options):
        return self.linear(inputs[..., None])


def test_an_encoder_without_the_method_for_masks_is_told_which():
    with pytest.raises(UserError, match="encoder = 'Silent'\n    it is not a speech encoder that tells") as caught:
        standalone(Silent())
    assert "_get_feature_vector_attention_mask(self, num_frames, attention_mask)" in caught.value.write


def test_an_encoder_without_a_front_end_is_told_which_method_freezes_it():
    with pytest.raises(UserError, match="encoder = 'Silent'\n    it does not say what its front end is") as caught:
        freeze_front_end(Silent())
    assert "freeze_feature_encoder(self)" in caught.value.write


def test_a_dropped_layer_does_not_change_the_frames_of_an_adapter():
    encoder = built("wav2vec2 adapter", train=True, layerdrop=0.999)
    audio = noise(encoder, SAMPLES["input_values"][0], 1)
    lengths = {encoder(audio).last_hidden_state.shape[1] for _ in range(5)}
    assert lengths == {encoder.eval()(audio).last_hidden_state.shape[1]}


def test_masked_statistics_have_the_gradient_of_each_utterance_alone():
    encoder = built("wav2vec2 group", **GROUP).double()
    rows = [row.double() for row in utterances(encoder)]
    batch, mask = padded(encoder, rows)
    together = gradients(encoder, batch.double(), mask)
    encoder.zero_grad()
    output = encoder(batch.double(), attention_mask=mask).last_hidden_state
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    encoder.zero_grad()
    for row, weight in zip(rows, weights, strict=True):
        frames = encoder(row).last_hidden_state[0]
        (frames * weight[: len(frames)]).sum().backward()
    for key, weight in encoder.named_parameters():
        torch.testing.assert_close(weight.grad, together[key], msg=key)
