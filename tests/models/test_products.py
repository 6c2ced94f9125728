"""Products by oneDNN against torch's in float64; which layers multiply so, and which do not."""

import copy
import pickle

import pytest
import torch
from pairs import VOCABULARY, joined
from torch import nn

from sedtrain.models import products
from sedtrain.models.lora import linear_layers
from sedtrain.models.parts import Execution
from sedtrain.models.products import FastLinear, add_product, product, quicken
from sedtrain.models.steps import decoder_steps


@pytest.fixture(autouse=True)
def amd(monkeypatch):
    """On any processor, layers of any size multiply as large ones do on AMD's."""
    monkeypatch.setattr(products, "multiplies_by_onednn", lambda: True)
    monkeypatch.setattr(products, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(products, "LEAST_PRODUCTS", 1)


def fast(*options, **others):
    torch.manual_seed(0)
    layer = nn.Linear(*options, **others)
    quicken(layer)
    assert isinstance(layer, FastLinear)
    return layer


def outputs_and_gradients(layer, inputs):
    inputs = inputs.detach().requires_grad_()
    output = layer(inputs)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype)
    wanted = [inputs, *(each for each in layer.parameters() if each.requires_grad)]
    return output.detach(), *torch.autograd.grad((output * weights).sum(), wanted)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 24), (2, 5, 24), (1, 24), (24,)])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_fast_layer_has_the_outputs_and_gradients_of_a_plain_one(bias, shape, frozen):
    layer, inputs = fast(24, 40, bias=bias).requires_grad_(not frozen), torch.randn(*shape)
    exact = copy.deepcopy(layer).double()
    exact.__class__ = nn.Linear
    found, expected = outputs_and_gradients(layer, inputs), outputs_and_gradients(exact, inputs.double())
    for each, other in zip(found, expected, strict=True):
        assert each.dtype == torch.float32
        torch.testing.assert_close(each.double(), other, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs), found[0], rtol=0, atol=0)


def test_no_gradient_of_a_gradient_is_made_up():
    layer, inputs = fast(4, 4), torch.randn(3, 4, requires_grad=True)
    [gradient] = torch.autograd.grad(layer(inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("at_once", [1, 7, 10**6])
def test_products_are_added_to_a_sum_in_pieces(at_once, monkeypatch):
    monkeypatch.setattr(products, "AT_ONCE", at_once)
    total, left, right = torch.randn(9, 4), torch.randn(5, 9).T, torch.randn(5, 4)
    expected = total.double() + left.double() @ right.double()
    add_product(total, left, right)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_product_has_a_bias_or_none():
    left, right, bias = torch.randn(3, 5), torch.randn(5, 4), torch.randn(4)
    torch.testing.assert_close(product(left, right), left @ right)
    torch.testing.assert_close(product(left, right, bias), left @ right + bias)
    torch.testing.assert_close(product(left[:0], right, bias), left[:0] @ right)


def refuse(*_):
    raise AssertionError("by oneDNN")


@pytest.mark.filterwarnings("default")  # torch's compiler and tracer raise warnings that they mean to hide
def test_other_precisions_compilers_tracers_and_few_rows_take_torch_products(monkeypatch):
    layer, inputs = fast(8, 8), torch.randn(3, 8)
    monkeypatch.setattr(products, "onednn", refuse)
    with pytest.raises(AssertionError, match="by oneDNN"):
        layer(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(inputs).dtype == torch.bfloat16
    assert torch.compile(layer, backend="eager")(inputs).shape == (3, 8)
    assert torch.jit.trace(layer, inputs, check_trace=False)(inputs).shape == (3, 8)
    assert copy.deepcopy(layer).double()(inputs.double()).shape == (3, 8)
    assert copy.deepcopy(layer).to("meta")(inputs.to("meta")).shape == (3, 8)
    monkeypatch.setattr(products, "LEAST_PRODUCTS", 8 * 8 * 4)
    assert layer(inputs).shape == (3, 8)
    monkeypatch.setattr(products, "multiplies_by_onednn", lambda: False)
    assert torch.equal(product(inputs, inputs.T), inputs @ inputs.T)


def test_large_plain_layers_of_a_model_are_quickened_once_and_keep_name_and_weights(monkeypatch):
    plain = joined("hubert", "bert")
    model = copy.deepcopy(plain)
    for _ in range(2):
        quicken(model)
    others = {type(module) for module in model.modules() if isinstance(module, nn.Linear)} - {products.FAST_LINEAR}
    assert {each.__name__ for each in others} == {"DeferrableLinear"}
    assert products.FAST_LINEAR.__name__ == "Linear"
    assert model.state_dict().keys() == plain.state_dict().keys()
    layer = model.get_submodule("decoder.bert.encoder.layer.0.output.dense")
    assert type(pickle.loads(pickle.dumps(layer))) is type(copy.deepcopy(layer)) is type(layer)
    assert linear_layers(model, ["decoder"]) == linear_layers(plain, ["decoder"])
    assert decoder_steps(model.eval()) is not None  # decoding multiplies with the same weights

    monkeypatch.setattr(products, "multiplies_by_onednn", lambda: False)
    monkeypatch.setattr(products, "LEAST_WEIGHTS", 24 * 32)
    quicken(plain)
    assert not any(isinstance(module, FastLinear) for module in plain.modules())
    monkeypatch.setattr(products, "multiplies_by_onednn", lambda: True)
    quicken(plain)
    sizes = {module.weight.numel() for module in plain.modules() if isinstance(module, FastLinear)}
    assert sizes == {24 * 32}


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_model_that_trains_has_the_gradients_of_torch_products(recomputes):
    plain = joined("hubert", "bert").train()
    model = copy.deepcopy(plain)
    Execution(recomputes).prepare(model)
    audio, labels = torch.randn(2, 5000), torch.randint(6, VOCABULARY, (2, 5))
    for each in (plain, model):
        torch.manual_seed(0)
        each(audio, labels=labels).loss.backward()
    assert any(isinstance(module, FastLinear) for module in model.modules())
    for (name, weight), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        if weight.grad is not None:
            torch.testing.assert_close(other.grad, weight.grad, rtol=1e-4, atol=1e-6, msg=name)
