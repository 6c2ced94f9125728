"""8 bits: a copy whose large layers round, row by row, and a model that stays what it is."""

import copy

import pytest
import torch
from families import DECODERS, ENCODERS, END, PAD, START, batch_of, tiny_decoder, tiny_encoder
from torch import nn

from sedtrain.errors import UserError
from sedtrain.models import int8
from sedtrain.models.int8 import Int8Linear, in_int8
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.models.steps import decoder_steps


def joined(encoder, decoder):
    model = SpeechEncoderDecoder(encoder=tiny_encoder(encoder), decoder=tiny_decoder(decoder)).eval()
    model.set_special_tokens(START, END, PAD)
    model.add_ctc_head(50)
    return model.eval()


@pytest.fixture
def all_sizes(monkeypatch):
    monkeypatch.setattr(int8, "FOR_FRAMES", 1)
    monkeypatch.setattr(int8, "FOR_TOKENS", 1)


def num_rounded(model):
    return sum(isinstance(each, Int8Linear) for each in model.modules())


def logits(model, batch, rows=slice(None)):
    ids = torch.tensor([[START, 5, 9, 7]]).expand(len(batch.inputs[rows]), 4)
    with torch.inference_mode():
        return model(batch.inputs[rows], attention_mask=batch.attention_mask[rows], decoder_input_ids=ids).logits


def test_a_layer_is_the_product_of_rounded_rows():
    generator = torch.Generator().manual_seed(0)
    layer, rows = nn.Linear(300, 40), torch.randn(7, 300, generator=generator) * torch.logspace(-3, 3, 7)[:, None]
    rows[3] = 0
    of_rows, of_weight = rows.abs().amax(1, keepdim=True) / 127, layer.weight.detach().abs().amax(1) / 127
    rounded = torch.where(of_rows > 0, (rows / of_rows.clamp(min=1e-30)).double().add(0.5).floor(), 0.0)
    weight = (layer.weight.detach() / of_weight[:, None]).round().double()
    expected = (rounded @ weight.T) * of_rows * of_weight + layer.bias.detach()
    found = Int8Linear(layer.weight, layer.bias)(rows).double()
    assert ((found - expected).abs() <= 1e-5 * expected.abs().amax(1, keepdim=True)).all()
    assert torch.equal(found[3].float(), layer.bias.detach())
    exact = layer(rows).double()
    assert ((found - exact).std(1) <= 0.02 * exact.std(1)).all()


def test_a_row_does_not_depend_on_the_others_but_for_the_last_bit_of_kernels_of_other_sizes():
    layer, rows = (
        Int8Linear(torch.randn(96, 128), None),
        torch.randn(3, 5, 128) * torch.tensor([1e-2, 1, 1e2])[:, None, None],
    )
    alone = layer(rows[1, 2])
    assert (layer(rows)[1, 2] - alone).abs().max() <= 5e-7 * alone.abs().max()


@pytest.mark.parametrize(("encoder", "decoder"), [*((e, "bert") for e in ENCODERS), *(("hubert", d) for d in DECODERS)])
def test_every_family_computes_nearly_the_same(encoder, decoder, all_sizes):
    model = joined(encoder, decoder)
    small = in_int8(model)
    batch = batch_of(model, 0.5, 0.8)
    exact, rounded = logits(model, batch), logits(small, batch)
    assert num_rounded(small) >= 10 and num_rounded(model) == 0
    assert 0 < (rounded - exact).std() < 0.1 * exact.std()
    alone = logits(small, batch, slice(0, 1))
    assert (alone - rounded[:1]).std() < 0.02 * exact.std()  # sums in another order round some values otherwise
    assert (decoder_steps(small) is None) == (decoder_steps(model) is None)


def test_small_layers_stay_as_they_are():
    assert num_rounded(in_int8(joined("hubert", "bert"))) == num_rounded_by_hand(joined("hubert", "bert"))


def num_rounded_by_hand(model):
    of_frames = [each for name, each in model.named_modules() if not name.startswith("decoder")]
    return sum(type(each) is nn.Linear and each.weight.numel() >= 65536 for each in of_frames)


def test_the_model_itself_stays_as_it_is(all_sizes):
    model = joined("wavlm", "gpt2")
    before = copy.deepcopy(model.state_dict())
    small = in_int8(model.train())
    assert model.training and not small.training
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_16_bits_are_refused():
    with pytest.raises(UserError) as found:
        in_int8(joined("hubert", "bert").bfloat16())
    assert str(found.value).splitlines()[2:] == [
        "  decoding.int8 = true",
        "    8 bits are for models in float32 on a CPU; this one is in bfloat16 on cpu",
        "    write decoding.int8=false, or trainer.accelerator=cpu",
    ]
