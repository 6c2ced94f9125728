"""A batch without its padding: the frames and gradients of a padded one, for each family that can, and less arithmetic."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import joined
from test_encoder_training import gradients
from test_masking import VARIANTS, built, noise, padded
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sedtrain.errors import UserError
from sedtrain.models import packing
from sedtrain.models.encoder import frame_mask
from sedtrain.models.encoder_families import ENCODERS
from sedtrain.models.packing import Packing, fate_of_padding, lengths_of, why_not
from sedtrain.models.parts import Execution
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.training.finetune import LoRA

FAMILIES = {"wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio", "whisper"}
PACKED = [name for name, (family, _) in VARIANTS.items() if family in FAMILIES and name != "hubert batch norm"]
UNEVEN = [700, 120, 300, 7, 77]


def in_turns(encoder, batch, mask, draw=lambda: None):
    """Real frames and gradients with padding, and without."""
    found = []
    for choice in ("never", "always"):
        encoder.config.packing = choice
        draw()
        grads = gradients(encoder, batch, mask)
        draw()
        with torch.no_grad():
            output = encoder(batch, attention_mask=mask).last_hidden_state
        found.append((output[frame_mask(encoder, output.shape[1], mask)], grads))
    return found


def assert_equal(with_padding, without_padding):
    torch.testing.assert_close(without_padding[0], with_padding[0], rtol=0, atol=1e-5)
    assert_equal_gradients(with_padding[1], without_padding[1])


def assert_equal_gradients(grads, other_grads):
    """Within 1e-5 of the largest: some, as those of the biases of keys, are zero but for rounding."""
    largest = max(gradient.abs().max() for gradient in grads.values())
    for name, gradient in grads.items():
        torch.testing.assert_close(other_grads[name], gradient, rtol=0, atol=1e-5 * float(largest), msg=name)


def uneven(encoder, lengths=UNEVEN, garbage=1e3):
    scale = 1 if encoder.main_input_name == "input_features" else 5
    return padded(encoder, [noise(encoder, scale * each, seed) for seed, each in enumerate(lengths)], garbage)


def test_the_families_that_can_leave_padding_out_are_these():
    assert {kind.config_class.model_type for kind in ENCODERS.values() if issubclass(kind, Packing)} == {
        *(FAMILIES - {"whisper"}), "whisper-encoder",
    }  # fmt: skip


@pytest.mark.parametrize("name", PACKED)
@settings(max_examples=4, deadline=None)
@given(lengths=st.lists(st.integers(1, 600), min_size=2, max_size=4).filter(lambda each: max(each) > 100))
def test_frames_and_gradients_are_those_of_a_padded_batch(name, lengths):
    encoder = built(name, train=True)
    assert_equal(*in_turns(encoder, *uneven(encoder, lengths)))


@pytest.mark.parametrize("name", ["wav2vec2 layer", "hubert group", "wavlm layer", "whisper"])
def test_masks_of_spec_augment_and_dropped_layers_are_those_of_a_padded_batch(name):
    draws = {"encoder_layerdrop": 0.5} if name == "whisper" else {"layerdrop": 0.5, "mask_time_prob": 0.3}
    encoder = built(name, train=True, **draws)

    def draw():
        torch.manual_seed(5)
        np.random.seed(5)

    assert_equal(*in_turns(encoder, *uneven(encoder), draw))


@pytest.mark.parametrize("name", ["wav2vec2 group", "whisper"])
def test_layers_compute_again_in_backward_without_padding(name):
    encoder = built(name, train=True)
    encoder.activation_checkpointing_enable({"use_reentrant": False})
    assert_equal(*in_turns(encoder, *uneven(encoder)))


def test_frozen_layers_and_lora_have_the_gradients_of_a_padded_batch():
    model = joined("wav2vec2", "bert")
    LoRA(targets=["encoder_self_attention"]).prepare(model)
    batch, mask = uneven(model.encoder, [700, 120, 300, 50, 77], garbage=0.0)
    of_choices = []
    for choice in ("never", "always"):
        Execution(packing=choice).prepare(model)
        model.zero_grad()
        model(batch, attention_mask=mask, labels=torch.arange(6, 21).view(5, 3)).loss.backward()
        of_choices.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert any("lora" in name for name in of_choices[0])
    assert_equal_gradients(*of_choices)


def operations(encoder, batch, mask):
    """Of a forward and backward pass, and of the projection's forward pass; torch does not count products in place itself."""

    def product(_, left, right, **options):
        return 2 * left[0] * left[1] * right[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product}) as counter:
        gradients(encoder, batch, mask)
    projection = counter.get_flop_counts().get(f"{type(encoder).__name__}.feature_projection", {})
    return np.array([counter.get_total_flops(), projection.get(torch.ops.aten.addmm, 0)])


@pytest.mark.parametrize("name", [name for name in PACKED if "adapter" not in name])
def test_there_is_no_arithmetic_on_padding_but_that_of_the_projection_before_spec_augment(name):
    encoder = built(name, train=True, attn_implementation="eager")  # torch does not count fused attention on CPUs
    lengths = [700, 120, 300]
    alone = sum(operations(encoder, *uneven(encoder, [each])) for each in lengths)
    counts = {}
    for choice in ("never", "always"):
        encoder.config.packing = choice
        counts[choice] = operations(encoder, *uneven(encoder, lengths))
    total, of_projection = counts["always"] - alone
    assert total == 3 * of_projection  # its backward pass takes twice as much as its forward pass
    assert counts["never"][0] > 1.5 * counts["always"][0]


@pytest.mark.parametrize("name", ["wav2vec2 layer", "whisper"])
def test_flash_attention_gets_the_borders_of_utterances(name, monkeypatch):
    borders = []

    def by_borders(module, query, key, value, attention_mask, **options):
        assert attention_mask is None and options["max_length_q"] == options["max_length_k"]
        assert options["cu_seq_lens_q"].dtype == torch.int32
        borders.append(options["cu_seq_lens_q"])
        owner = torch.bucketize(torch.arange(query.shape[2]), borders[-1], right=True)
        mask = owner[:, None] == owner
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=options["scaling"])
        return attended.transpose(1, 2), None

    encoder = built(name)
    batch, mask = uneven(encoder)
    encoder.config.packing = "never"
    expected = encoder(batch, attention_mask=mask).last_hidden_state
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", by_borders)
    encoder.config._attn_implementation_internal = "flash_attention_2"
    encoder.config.packing = "always"
    output = encoder(batch, attention_mask=mask).last_hidden_state
    real = frame_mask(encoder, output.shape[1], mask)
    torch.testing.assert_close(output[real], expected[real], rtol=0, atol=1e-5)
    assert borders[0].diff().tolist() == [number for number in real.sum(1).tolist() if number]


def is_packed(encoder, batch, mask, **options):
    """True if the padding of the output is zeros, which only a packed batch has."""
    output = encoder(batch, attention_mask=mask, **options).last_hidden_state
    return not output[~frame_mask(encoder, output.shape[1], mask)].any()


def test_auto_leaves_padding_out_where_it_takes_more_products_than_calls_for_each_utterance(monkeypatch):
    encoder = built("wav2vec2 layer")
    _, mask = batch = uneven(encoder, [900, 700])
    lengths = lengths_of(mask, encoder.frame_steps)
    assert not is_packed(encoder, *batch)  # as a model that says nothing
    encoder.config.packing = "auto"
    assert not is_packed(encoder, *batch)  # the model is tiny
    monkeypatch.setattr(packing, "PRODUCTS_OF_AN_UTTERANCE", lengths.padding * encoder.products // 2)
    assert not is_packed(encoder, *batch)
    monkeypatch.setattr(packing, "PRODUCTS_OF_AN_UTTERANCE", lengths.padding * encoder.products // 2 - 1)
    assert is_packed(encoder, *batch)
    assert not is_packed(encoder, *uneven(encoder, [900, 850]))
    assert not is_packed(encoder, *batch, output_hidden_states=True)
    encoder.encoder.layers[0].compile(backend="eager")
    with torch.compiler.set_stance("force_eager"):
        assert not is_packed(encoder, *batch)


@pytest.mark.parametrize("name", ["wav2vec2 layer", "whisper"])
def test_products_of_a_frame_are_half_of_the_operations_that_torch_counts_but_attention(name):
    encoder = built(name)
    inputs, mask = uneven(encoder, [700])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        frames = encoder(inputs, attention_mask=mask).last_hidden_state
    assert 2 * encoder.products * frames.shape[1] == pytest.approx(counter.get_total_flops(), rel=0.3)


REFUSED = {
    "w2v-bert": "only encoders like wav2vec2 and whisper can leave it out",
    "hubert batch norm": "it has a batch norm over time",
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_family_is_refused_with_the_reason(name):
    encoder = built(name)
    model = joined("hubert", "bert")
    model.encoder = encoder
    Execution().prepare(model)
    assert not hasattr(encoder.config, "packing")  # nothing that stock configurations lack
    assert fate_of_padding(encoder, "auto", None) == f"computed by the encoder: {REFUSED[name]}"
    with pytest.raises(UserError) as refused:
        Execution(packing="always").prepare(model)
    wrong = f"the encoder, {encoder.config.model_type}, computes padding: {REFUSED[name]}"
    assert f"packing = 'always'\n    {wrong}\n    write packing=auto" in str(refused.value)


def test_compiled_layers_are_refused_with_the_reason():
    with pytest.raises(UserError, match="computes padding: inductor would compile its layers for each length"):
        Execution(backend="inductor", packing="always").prepare(joined("hubert", "bert"))


def test_flex_attention_is_no_reason_to_compile_for_each_length():
    encoder = built("wav2vec2 layer")
    encoder.config._attn_implementation_internal = "flex_attention"
    assert why_not(encoder) == "FlexAttention is compiled for each length"


def test_a_run_without_padding_has_the_losses_of_one_with_it_and_keeps_the_choice(train, tmp_path):
    losses = {}
    for choice in ("never", "always"):
        folder = train(tmp_path / choice, f"packing={choice}", "data.batches=null", "data.batch_seconds=12", steps=4)
        rows = (folder / "metrics.csv").read_text().splitlines()
        column = rows[0].split(",").index("train/loss")
        losses[choice] = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
        saved = SpeechEncoderDecoder.from_pretrained(folder / "model")
        assert getattr(saved.encoder.config, "packing", "never") == choice
        assert json.loads((folder / "model" / "config.json").read_text())["encoder"].get("packing", "never") == choice
    assert len(losses["never"]) == 4
    assert losses["always"] == pytest.approx(losses["never"], rel=1e-5)
    log = (folder / "sedtrain.log").read_text()
    assert "left out by the encoder" in log
