"""Adapters: what they make of frames, and that padding never reaches a real frame."""

import copy
import json
import pickle
from math import ceil

import pytest
import torch
from families import tiny_decoder, tiny_encoder
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import SpeechEncoderDecoderModel

from sedtrain.config.check import find_problems
from sedtrain.config.schema import conf_dir, register
from sedtrain.errors import UserError
from sedtrain.models.adapter import (
    ADAPTERS,
    Adapter,
    ConvAdapter,
    QFormerAdapter,
    StackMLPAdapter,
    TransformerAdapter,
    saved_adapter,
    stock_projection,
)
from sedtrain.models.encoder import load_encoder
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

E, D = 6, 8
KINDS = {
    "conv": ConvAdapter,
    "stack_mlp": StackMLPAdapter,
    "transformer": TransformerAdapter,
    "qformer": QFormerAdapter,
}
SMALL = {
    "conv": {"stride": 2, "num_layers": 2},
    "stack_mlp": {"stride": 3},
    "transformer": {"num_layers": 1, "num_heads": 2, "dropout": 0.0},
    "qformer": {"window": 5, "num_queries": 2, "num_layers": 1, "num_heads": 2, "dropout": 0.0},
}


def num_made(kind, num_frames):
    """Frames that the adapter with the settings of SMALL makes of `num_frames`."""
    if kind == "qformer":
        return 2 * ceil(num_frames / 5)
    return ceil(num_frames / {"conv": 4, "stack_mlp": 3, "transformer": 1}[kind])


def small(kind):
    torch.manual_seed(0)
    return ADAPTERS[kind](E, D, **SMALL[kind]).eval()


def padded(lengths, garbage, num_frames=None):
    """Utterances of random frames, alone and as one batch with its mask, with garbage in the padding."""
    utterances = [
        torch.randn(length, E, generator=torch.Generator().manual_seed(i)) for i, length in enumerate(lengths)
    ]
    frames = torch.full((len(lengths), num_frames or max(lengths), E), garbage)
    mask = torch.zeros(frames.shape[:2], dtype=torch.long)
    for row, utterance in enumerate(utterances):
        frames[row, : len(utterance)] = utterance
        mask[row, : len(utterance)] = 1
    return utterances, frames, mask


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("kind", KINDS)
@given(
    lengths=st.lists(st.integers(1, 23), min_size=1, max_size=4),
    more=st.integers(0, 7),
    garbage=st.sampled_from([0.0, 1e4, float("inf"), float("nan")]),
    is_bool=st.booleans(),
)
def test_an_utterance_alone_gives_the_same_frames_as_in_a_padded_batch(kind, grad, lengths, more, garbage, is_bool):
    adapter = small(kind)
    utterances, frames, mask = padded(lengths, garbage, max(lengths) + more)
    with torch.set_grad_enabled(grad):
        together, made_mask = adapter(frames, mask.bool() if is_bool else mask)
        assert made_mask.dtype == (torch.bool if is_bool else torch.long)
        assert made_mask.shape == together.shape[:2] == (len(lengths), num_made(kind, frames.shape[1]))
        for utterance, made, real in zip(utterances, together, made_mask.bool(), strict=True):
            alone, no_mask = adapter(utterance[None], None)
            assert no_mask is None
            assert real.sum() == alone.shape[1] == num_made(kind, len(utterance))
            assert real[: alone.shape[1]].all()
            torch.testing.assert_close(made[real], alone[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_ones_is_no_mask(kind):
    frames = torch.randn(2, 11, E)
    masked, _ = small(kind)(frames, torch.ones(2, 11))
    torch.testing.assert_close(masked, small(kind)(frames, None)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_an_utterance_without_a_real_frame_makes_no_nan(kind):
    adapter = small(kind).train()
    frames = torch.full((2, 9, E), float("nan"))
    frames[0] = torch.randn(9, E)
    mask = torch.tensor([[1] * 9, [0] * 9])
    made, made_mask = adapter(frames, mask)
    assert made_mask.sum(1).tolist() == [num_made(kind, 9), 0]
    assert made.isfinite().all()
    made.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in adapter.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_any_real_frame_is_heard_and_every_parameter_learns(kind):
    adapter, frames = small(kind), torch.randn(1, 7, E, requires_grad=True)
    (adapter(frames, None)[0] ** 3).sum().backward()
    assert (frames.grad.abs().sum(-1) > 0).all()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_of_pytorch_has_weights_of_its_own(kind):
    adapter = ADAPTERS[kind](E, D)
    weights = [weight for name, weight in adapter.named_parameters() if name.endswith("linear1.weight")]
    assert len(weights) == {"transformer": 2, "qformer": 2}.get(kind, 0)
    assert not weights or not torch.equal(*weights)


def test_conv_is_strided_convolution_gate_and_norm():
    adapter, frames = ConvAdapter(E, D, stride=2, num_layers=1), torch.randn(1, 7, E)
    weight, bias = adapter.convolutions[0].weight, adapter.convolutions[0].bias
    around = torch.cat([torch.zeros(1, 1, E), frames, torch.zeros(1, 1, E)], 1)
    expected = []
    for centre in range(1, 8, 2):
        value, gate = (torch.einsum("ke,oek->o", around[0, centre - 1 : centre + 2], weight) + bias).chunk(2)
        expected.append(nn.functional.layer_norm(value * gate.sigmoid(), (D,)))
    torch.testing.assert_close(adapter(frames, None)[0][0], torch.stack(expected))


def test_stack_mlp_concatenates_frames_in_their_order():
    adapter, frames = StackMLPAdapter(E, D, stride=3), torch.randn(1, 5, E)
    filled = [*frames[0], torch.zeros(E)]
    expected = torch.stack([adapter.mlp(torch.cat(filled[first : first + 3])) for first in (0, 3)])
    torch.testing.assert_close(adapter(frames, None)[0][0], expected)


def test_a_transformer_makes_a_frame_of_the_whole_utterance():
    frames = torch.randn(1, 9, E, requires_grad=True)
    (small("transformer")(frames, None)[0][0, 0] ** 3).sum().backward()
    assert (frames.grad.abs().sum(-1) > 0).all()


def test_a_qformer_makes_a_frame_of_one_window():
    frames = torch.randn(1, 10, E, requires_grad=True)
    (small("qformer")(frames, None)[0][0, 2] ** 3).sum().backward()  # the first query of the second window
    assert (frames.grad.abs().sum(-1)[0] > 0).tolist() == [False] * 5 + [True] * 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_is_rebuilt_from_plain_values(kind):
    adapter, frames = small(kind), torch.randn(2, 11, E)
    assert (adapter.kind, type(adapter)) == (kind, KINDS[kind])
    saved = json.loads(json.dumps(adapter.settings))
    assert saved == SMALL[kind]
    rebuilt = saved_adapter(kind, E, D, saved).eval()
    rebuilt.load_state_dict(adapter.state_dict())
    assert torch.equal(rebuilt(frames, None)[0], adapter(frames, None)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_whole(kind):
    adapter, frames = small(kind), torch.randn(2, 11, E)
    for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert torch.equal(twin(frames, None)[0], adapter(frames, None)[0])
        assert not {each.data_ptr() for each in twin.parameters()} & {each.data_ptr() for each in adapter.parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_compiles_as_one_graph(kind):
    adapter = small(kind).train()
    _, frames, mask = padded([9, 11], 1.0)
    compiled = torch.compile(adapter, backend="eager", fullgraph=True)
    for ours, theirs in zip(compiled(frames, mask), adapter(frames, mask), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bit_autocast_runs(kind):
    _, frames, mask = padded([9, 11], 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made, _ = small(kind)(frames, mask)
    expected, _ = small(kind)(frames, mask)
    torch.testing.assert_close(made.float(), expected, atol=0.1, rtol=0.1)


class Mine(Adapter, kind="mine"):
    def __init__(self, input_dim: int, output_dim: int, scale: float = 1.0) -> None:
        super().__init__(input_dim, output_dim, scale=scale)
        self.linear = nn.Linear(input_dim, output_dim)

    def forward(self, frames, mask):
        return self.settings["scale"] * self.linear(frames), mask


def test_a_users_own_class_is_found_by_its_kind():
    adapter = saved_adapter("mine", E, D, {"scale": 2.0})
    assert type(adapter) is Mine
    assert adapter(torch.randn(1, 3, E), None)[0].shape == (1, 3, D)


def test_an_adapter_whose_class_was_not_imported_is_named():
    with pytest.raises(UserError) as caught:
        saved_adapter("theirs", E, D, {})
    assert (caught.value.option, caught.value.value) == ("adapter", "theirs")
    assert caught.value.wrong == f"the model was saved with an adapter of this kind; known are {', '.join(ADAPTERS)}"
    assert caught.value.write == (
        'write adapter=OPTION whose _target_ is the class with kind="theirs", or import its module before loading'
    )


# --- what a user writes


def composed(*overrides):
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", [*overrides, "run_dir=run"])


def option(name, *overrides):
    return instantiate(composed(f"adapter={name}", *overrides).adapter, _convert_="all")


def problem(action):
    with pytest.raises(UserError) as caught:
        action()
    return caught.value.option, caught.value.value, caught.value.wrong, caught.value.write


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_makes_its_adapter_for_the_widths_it_is_given(kind):
    adapter = option(kind)(144, 96)
    assert type(adapter) is KINDS[kind]
    made, mask = adapter(torch.randn(1, 20, 144), torch.ones(1, 20))
    assert made.shape == (*mask.shape, 96)


@pytest.mark.parametrize("name", ["none", "linear", "family"])
def test_the_options_that_stock_transformers_can_load_add_no_module(name):
    assert option(name)(144, 144) is None


def test_only_none_refuses_unequal_widths():
    assert option("linear")(96, 144) is option("family")(96, 144) is None
    assert problem(lambda: option("none")(96, 144)) == (
        "adapter",
        "none",
        "the encoder is 96 wide and the decoder 144",
        "write adapter=linear, which projects one to the other",
    )
    assert stock_projection(96, 96, project=False) is None


@pytest.mark.parametrize("name", ["transformer", "qformer"])
def test_heads_that_do_not_divide_the_width_are_refused(name):
    assert problem(lambda: option(name, "adapter.num_heads=5")(96, 144)) == (
        "adapter.num_heads",
        5,
        "it does not divide the decoder's width, 144",
        "write adapter.num_heads=4",
    )


def test_a_convolution_that_would_leave_frames_out_is_refused():
    assert problem(lambda: option("conv", "adapter.stride=3")(96, 144)) == (
        "adapter.stride",
        3,
        "convolutions over 3 frames would skip frames",
        "write adapter.stride=2, and adapter.num_layers for a lower rate, or adapter=stack_mlp",
    )


def test_a_wrong_option_is_found_before_anything_is_built():
    [found] = find_problems(composed("adapter=conv", "+adapter.strides=3"))
    assert (found.option, found.wrong) == ("adapter.strides", "ConvAdapter has no option 'strides'")


@pytest.mark.parametrize("family", ["wav2vec2", "wavlm", "wav2vec2_conformer", "w2v_bert", "data2vec"])
def test_a_familys_own_adapter_halves_the_frames(family):
    config = composed("adapter=family", f"encoder={family}")
    assert not find_problems(config)
    inputs = torch.randn((1, 40, 160) if family == "w2v_bert" else (1, 16000))
    encoder = instantiate(config.encoder, _convert_="all").eval()
    adapted, plain = (
        each(inputs).last_hidden_state.shape[1] for each in (encoder, tiny_encoder(family, attention=None))
    )
    assert adapted in (plain // 2, -(-plain // 2))


def test_a_family_without_an_adapter_of_its_own_is_refused():
    config = composed("adapter=family", "encoder=hubert")
    assert problem(lambda: load_encoder(**{k: v for k, v in config.encoder.items() if k != "_target_"})) == (
        "adapter",
        "family",
        "HubertConfig has no adapter of its own",
        "write adapter=conv, which is much the same, or encoder=wav2vec2, wavlm, wav2vec2_conformer, w2v_bert or data2vec",
    )


@pytest.mark.parametrize("name", ["seamless_m4t", "seamless_m4t_v2"])
def test_a_family_that_always_has_its_own_adapter_is_told_so(name):
    config = composed("adapter=family", f"encoder={name}")
    option, value, wrong, write = problem(
        lambda: load_encoder(**{k: v for k, v in config.encoder.items() if k != "_target_"})
    )
    assert (option, value) == ("adapter", "family")
    assert wrong.endswith("Config has its own adapter already")
    assert write == "write adapter=linear, and encoder.options.adaptor_stride=NUMBER to change its stride"
    tiny_encoder(name, options={"adaptor_stride": 3})


# --- in the model


def joined(name):
    """A model with the option `name`, whose encoder is 96 wide where a width may differ and whose decoder is 144."""
    own = {"add_adapter": True, "num_adapter_layers": 1} if name == "family" else {}
    width = {} if name == "none" else {"hidden_size": 96}
    encoder = tiny_encoder("wav2vec2", options={**own, **width}, attention="sdpa")
    between = option(name)(encoder.config.hidden_size, 144)
    model = SpeechEncoderDecoder(encoder=encoder, decoder=tiny_decoder("bert"), adapter=between).eval()
    model.set_special_tokens(1, 2, 0)
    return model


@torch.no_grad()
def spoken(model, seconds=(1.0,), longest=1.0, garbage=0.0):
    """Logits of utterances of noise in one batch."""
    audio = torch.full((len(seconds), int(16000 * longest)), garbage)
    mask = torch.zeros(audio.shape, dtype=torch.long)
    for row, length in enumerate(int(16000 * each) for each in seconds):
        audio[row, :length] = torch.randn(length, generator=torch.Generator().manual_seed(length))
        mask[row, :length] = 1
    ids = torch.tensor([[1, 5, 6, 7]]).expand(len(seconds), -1)
    return model(audio, attention_mask=mask, decoder_input_ids=ids).logits


@pytest.mark.parametrize("name", ["none", "linear", "family", *KINDS])
def test_a_model_gives_an_utterance_alone_the_logits_of_a_padded_batch(name):
    model = joined(name)
    together = spoken(model, (1.3, 0.71), 1.3, garbage=3.0)
    torch.testing.assert_close(together[1], spoken(model, (0.71,), 0.71)[0], rtol=0, atol=1e-5)


def test_the_transposed_frames_of_a_familys_own_adapter_reach_a_decoder_that_views_them():
    own = {"add_adapter": True, "num_adapter_layers": 1, "adapter_stride": 2}
    encoder, decoder = tiny_encoder("wav2vec2", options=own), tiny_decoder("gpt2")
    frames = encoder(torch.randn(1, 16000)).last_hidden_state
    assert not frames.is_contiguous()
    model = SpeechEncoderDecoder(encoder=encoder, decoder=decoder).eval()
    model.set_special_tokens(1, 2, 0)
    assert spoken(model, (1.0, 0.5)).isfinite().all()
    assert model.generate(torch.randn(1, 16000), max_new_tokens=3, min_new_tokens=3).shape == (1, 4)


@pytest.mark.parametrize("name", ["none", "linear", "family"])
def test_stock_transformers_loads_these(name, tmp_path):
    model = joined(name)
    model.save_pretrained(tmp_path)
    stock, ours = (each.from_pretrained(tmp_path).eval() for each in (SpeechEncoderDecoderModel, SpeechEncoderDecoder))
    torch.testing.assert_close(spoken(stock), spoken(model), rtol=0, atol=1e-5)
    torch.testing.assert_close(spoken(ours), spoken(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_stock_transformers_refuses_these_and_sedtrain_loads_them(name, tmp_path):
    model = joined(name)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"with the {name} adapter of sedtrain"):
        SpeechEncoderDecoderModel.from_pretrained(tmp_path)
    loaded = SpeechEncoderDecoder.from_pretrained(tmp_path).eval()
    assert (type(loaded.adapter), loaded.adapter.settings) == (KINDS[name], model.adapter.settings)
    torch.testing.assert_close(spoken(loaded), spoken(model), rtol=0, atol=1e-5)


def test_a_users_own_adapter_is_saved_and_loaded(tmp_path):
    parts = {"encoder": tiny_encoder("wav2vec2"), "decoder": tiny_decoder("bert")}
    model = SpeechEncoderDecoder(**parts, adapter=Mine(144, 144, scale=0.5)).eval()
    model.set_special_tokens(1, 2, 0)
    model.save_pretrained(tmp_path)
    loaded = SpeechEncoderDecoder.from_pretrained(tmp_path).eval()
    assert type(loaded.adapter) is Mine
    torch.testing.assert_close(spoken(loaded), spoken(model), rtol=0, atol=1e-5)
