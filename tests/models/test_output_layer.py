"""The output layer on labelled positions only, against the dense loss, for every family of decoder."""

from copy import deepcopy
from itertools import accumulate

import pytest
import torch
from families import DECODERS, TOKENIZER, tiny_decoder
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import HubertConfig, HubertModel

from sedtrain.models import output_layer
from sedtrain.models.losses import token_cross_entropy
from sedtrain.models.output_layer import DeferrableLinear, deferred_output_layer, labelled_cross_entropy
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

START, END, PAD = 1, 2, 0
VOCABULARY = len(TOKENIZER)


def joined(decoder):
    config = HubertConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=[8, 8], conv_kernel=[10, 8],
        conv_stride=[10, 8], num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer", do_stable_layer_norm=True, mask_time_prob=0.0, layerdrop=0.0, hidden_dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0,
    )  # fmt: skip
    model = SpeechEncoderDecoder(encoder=HubertModel(config), decoder=decoder)
    model.set_special_tokens(START, END, PAD)
    return model.train()


@pytest.fixture(scope="module", params=[*DECODERS, "llama"])
def model(request):
    torch.manual_seed(0)
    return joined(tiny_decoder(request.param))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    labels[0, 6:], labels[1, 2:] = -100, -100
    return {"input_values": torch.randn(3, 2000, generator=generator), "labels": labels}


def loss_and_gradient(model, batch, **options):
    model.zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    return loss.detach(), {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
    }


def relative_difference(gradients, others):
    assert gradients.keys() == others.keys()
    difference = torch.stack([(gradients[name] - others[name]).norm() for name in gradients]).norm()
    return difference / torch.stack([each.norm() for each in others.values()]).norm()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("num_rows", [128, 3])
def test_loss_and_gradient_are_those_of_the_dense_loss(model, batch, label_smoothing, num_rows, monkeypatch):
    monkeypatch.setattr(output_layer, "rows_of_chunk", lambda *_: num_rows)
    loss, gradients = loss_and_gradient(model, batch, label_smoothing=label_smoothing)
    dense, expected = loss_and_gradient(model, batch, label_smoothing=label_smoothing, output_logits=True)
    torch.testing.assert_close(loss, dense, rtol=1e-6, atol=0)
    assert relative_difference(gradients, expected) < 1e-6


def layer_and_batch(bias=True, cap=None, frozen=False):
    """A layer of 50 × 6, (3, 7, 6) inputs and (3, 7) labels."""
    generator = torch.Generator().manual_seed(2)
    layer = DeferrableLinear(6, 50, bias=bias)
    with torch.no_grad():
        for each in layer.parameters():
            each.copy_(torch.randn(each.shape, generator=generator))
    layer.cap = cap
    layer.requires_grad_(not frozen)
    hidden = torch.randn(3, 7, 6, generator=generator).requires_grad_()
    labels = torch.randint(50, (3, 7), generator=generator).masked_fill(torch.arange(7) > 4, -100)
    return layer, hidden, labels


def of_chunks(layer, hidden, labels, label_smoothing):
    loss, num_tokens, plain = labelled_cross_entropy(layer, hidden, labels, label_smoothing)
    (3 * loss / num_tokens).backward()
    return [loss.detach(), plain, *(each.grad for each in (hidden, *layer.parameters()) if each.grad is not None)]


def in_float64(layer, hidden, labels, label_smoothing):
    """The same by torch, from dense logits in float64."""
    layer = deepcopy(layer).double()
    hidden = hidden.detach().double().requires_grad_()
    logits, targets = layer.outputs(hidden).flatten(0, 1), labels.flatten()
    loss, plain = (
        nn.functional.cross_entropy(logits, targets, label_smoothing=each, reduction="sum")
        for each in (label_smoothing, 0.0)
    )
    (3 * loss / (labels != -100).sum()).backward()
    gradients = [each.grad for each in (hidden, *layer.parameters()) if each.grad is not None]
    return [each.detach().float() for each in (loss, plain, *gradients)]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"cap": 2.0}, {"frozen": True}])
def test_a_loss_by_chunks_is_that_of_float64(label_smoothing, options, monkeypatch):
    monkeypatch.setattr(output_layer, "rows_of_chunk", lambda *_: 4)
    layer, hidden, labels = layer_and_batch(**options)
    expected = in_float64(layer, hidden, labels, label_smoothing)
    measured = of_chunks(layer, hidden, labels, label_smoothing)
    assert len(measured) == 2 + 1 + (0 if options.get("frozen") else 2 if options.get("bias", True) else 1)
    torch.testing.assert_close(measured, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_loss_of_the_dense_logits_and_gradients_of_float32(dtype, monkeypatch):
    monkeypatch.setattr(output_layer, "rows_of_chunk", lambda *_: 4)
    layer, hidden, labels = layer_and_batch()
    expected = in_float64(layer, hidden, labels, 0.1)
    with torch.autocast("cpu", dtype):
        dense, _, plain = token_cross_entropy(layer.outputs(hidden), labels, 0.1)
        measured = of_chunks(layer, hidden, labels, 0.1)
    torch.testing.assert_close(measured[:2], [dense.detach(), plain], rtol=1e-5, atol=0)
    assert {each.dtype for each in measured} == {torch.float32}
    for one, other in zip(measured[2:], expected[2:], strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


def test_gradients_are_handed_over_once_and_have_none_of_their_own():
    loss, *_ = labelled_cross_entropy(*layer_and_batch())
    with pytest.raises(RuntimeError, match="gradients of gradients need the logits: pass output_logits=True"):
        loss.backward(create_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed over already: compute it again, or pass output_logits=True"):
        loss.backward()


def test_memory_holds_one_chunk_beside_the_gradients(monkeypatch):
    monkeypatch.setattr(output_layer, "rows_of_chunk", lambda *_: 8)
    layer, hidden, labels = DeferrableLinear(16, 5000), torch.randn(1, 400, 16), torch.zeros(1, 400, dtype=torch.long)
    chunk, gradients = 8 * 5000 * 4, sum(each.numel() * 4 for each in (hidden, *layer.parameters()))

    def step():
        labelled_cross_entropy(layer, hidden.requires_grad_(), labels, 0.1)[0].backward()

    def dense():
        token_cross_entropy(layer(hidden.requires_grad_()), labels, 0.1)[0].backward()

    assert chunk + gradients < peak_bytes(step) < 4 * chunk + 1.5 * gradients
    assert peak_bytes(dense) > 2 * 400 * 5000 * 4


def peak_bytes(step):
    """The most bytes that an allocator had handed out while `step` ran, beside those from before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        step()
    changes = [each.nbytes() for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    return max(accumulate(changes))


def test_without_gradients_none_are_made():
    layer, hidden, labels = layer_and_batch()
    expected = labelled_cross_entropy(layer, hidden, labels, 0.1)[0]
    with torch.no_grad():
        loss, *_ = labelled_cross_entropy(layer, hidden, labels, 0.1)
    assert loss == expected
    assert not loss.requires_grad


class MostLogits(TorchDispatchMode):
    """Notes the most elements of any tensor as wide as the vocabulary that an operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        wide = [
            each.numel()
            for each in tree_leaves(made)
            if isinstance(each, torch.Tensor) and each.ndim > 1 and each.shape[-1] == VOCABULARY
        ]
        self.elements = max([self.elements, *wide])
        return made


def test_a_training_step_never_holds_the_logits_of_all_positions(model, batch, monkeypatch):
    monkeypatch.setattr(output_layer, "rows_of_chunk", lambda *_: 3)
    batch["labels"] = torch.randint(3, VOCABULARY, (3, 60))
    with MostLogits() as most:
        output = model(**batch)
        output.loss.backward()
    assert output.logits is None
    assert 0 < most.elements <= 3 * VOCABULARY + model.decoder.get_output_embeddings().weight.numel()
    with MostLogits() as most:
        model(**batch, output_logits=True).loss.backward()
    assert most.elements >= 3 * 60 * VOCABULARY


def test_evaluation_and_a_forward_without_labels_give_logits(model, batch):
    assert model(batch["input_values"], decoder_input_ids=torch.full((3, 4), START)).logits.shape == (3, 4, VOCABULARY)
    assert model.eval()(**batch).logits.shape == (3, 9, VOCABULARY)
    model.train()


def test_the_layer_is_itself_again_after_an_error(model):
    with pytest.raises(RuntimeError, match="stop"), deferred_output_layer(model.decoder, deferred=True):
        raise RuntimeError("stop")
    layer = model.decoder.get_output_embeddings()
    assert isinstance(layer, DeferrableLinear)
    assert layer(torch.ones(1, layer.in_features)).shape == (1, VOCABULARY)


def test_a_batch_without_target_tokens_has_a_zero_loss_with_a_gradient_of_zeros(model, batch):
    loss, gradients = loss_and_gradient(model, {**batch, "labels": torch.full((3, 5), -100)})
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients.values())


def test_the_vocabulary_grows_and_the_layer_stays_deferrable(batch):
    model = joined(tiny_decoder("bert"))
    model.resize_token_embeddings(VOCABULARY + 5)
    assert model(**batch).logits is None
    assert model.config.decoder.vocab_size == VOCABULARY + 5
    assert model.eval()(**batch).logits.shape[-1] == VOCABULARY + 5


# --- one update however the batch is cut


def gradient(model, rows, num_items):
    model.zero_grad()
    for row in rows:
        model(**row, num_items_in_batch=num_items).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("padded", [False, True])
def test_eight_at_once_and_eight_accumulated_give_the_same_gradient(padded):
    torch.manual_seed(0)
    model = joined(tiny_decoder("bert"))
    lengths, num_tokens = [2000, 800, 1600, 900, 2000, 1100, 1300, 1700], [9, 2, 5, 3, 7, 1, 6, 4]
    audio, labels = torch.randn(8, 2000), torch.randint(3, VOCABULARY, (8, 9))
    mask = (torch.arange(2000) < torch.tensor(lengths)[:, None]).long()
    labels[torch.arange(9) >= torch.tensor(num_tokens)[:, None]] = -100
    whole = {"input_values": audio * mask, "attention_mask": mask, "labels": labels}
    cuts = [(2000, 9) if padded else each for each in zip(lengths, num_tokens, strict=True)]
    rows = [
        {"input_values": audio[[i], :s] * mask[[i], :s], "attention_mask": mask[[i], :s], "labels": labels[[i], :u]}
        for i, (s, u) in enumerate(cuts)
    ]
    at_once, accumulated = gradient(model, [whole], sum(num_tokens)), gradient(model, rows, sum(num_tokens))
    assert relative_difference(accumulated, at_once) < 1e-5
    model.zero_grad()
    model(**whole).loss.backward()
    mean = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert relative_difference(at_once, mean) < 1e-6
