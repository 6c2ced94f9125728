"""Layers that compute their activations again, or are compiled, give the losses and gradients of plain ones."""

import copy

import pytest
import torch
from families import DECODERS, ENCODERS, TOKENIZER, tiny_decoder, tiny_encoder
from pairs import PAD, START, VOCABULARY, joined, part
from torch import nn
from torch._dynamo.utils import counters
from transformers.pytorch_utils import Conv1D

from sedtrain.data.collate import Collator
from sedtrain.errors import UserError
from sedtrain.models.family_settings import feature_extractor_of
from sedtrain.models.parts import Execution, compile_layers, layers_of
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

LINEAR = (nn.Linear, Conv1D)
EXECUTIONS = [Execution(True), Execution(backend="eager"), Execution(True, "inductor")]


def gradients(model, num_utterances, num_samples):
    """Of one batch with padding: its loss and the gradient of every weight."""
    generator = torch.Generator().manual_seed(num_samples)
    audio = torch.randn(num_utterances, num_samples, generator=generator)
    mask = torch.ones(num_utterances, num_samples, dtype=torch.long)
    mask[0, num_samples // 2 :] = 0
    labels = torch.randint(6, VOCABULARY, (num_utterances, num_samples // 1000), generator=generator)
    model.zero_grad()
    loss = model(audio, attention_mask=mask, labels=labels).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("default")  # torch's compiler raises warnings that it means to hide
@pytest.mark.parametrize("execution", EXECUTIONS, ids=str)
def test_losses_and_gradients_are_those_of_plain_layers_and_other_lengths_compile_nothing(execution):
    few = {"num_hidden_layers": 1} if execution.backend == "inductor" else {}  # it is slow
    plain = joined("hubert", "bert", **few).train()
    prepared = copy.deepcopy(plain)
    execution.prepare(prepared)
    assert prepared.state_dict().keys() == plain.state_dict().keys()
    graphs = set()
    for size in ((2, 4000), (3, 5200), (5, 9100)):
        expected, found = gradients(plain, *size), gradients(prepared, *size)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
        graphs.add(counters["stats"]["unique_graphs"])
    assert len(graphs) == 1


@pytest.mark.filterwarnings("default")
def test_a_run_compiles_for_its_training_and_nothing_for_validations_and_scores(train, tmp_path, monkeypatch):
    modes = []

    def backend(graph, _):
        modes.append(torch.is_grad_enabled())
        return graph

    def compiled(name, part, _):
        compile_layers(name, part, backend)

    monkeypatch.setattr("sedtrain.models.parts.compile_layers", compiled)
    train(tmp_path / "run", "compile=eager", "encoder.tiny.num_hidden_layers=1", "decoder.tiny.num_hidden_layers=1")
    assert modes and all(modes)


def calls_of_layers(model, part, inputs, **options):
    """How often the linear maps of each layer compute in one forward and backward pass."""
    layers = layers_of(part)[1]
    calls = [0] * len(layers)

    def count(number):
        def counted(*_):
            calls[number] += 1

        return counted

    for number, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(module, LINEAR):
                module.register_forward_pre_hook(count(number))
    model(inputs, labels=torch.tensor([[7, 8, 9]]), **options).loss.backward()
    return calls


def assert_computes_again(name, encoder, decoder, inputs, **options):
    """An encoder or decoder with layers whose activations are made again."""
    model = SpeechEncoderDecoder(encoder=encoder, decoder=decoder).train()
    model.config.decoder_start_token_id, model.config.pad_token_id = START, PAD
    again = copy.deepcopy(model)
    Execution(activation_checkpointing=True).prepare(again)
    once, twice = (calls_of_layers(each, each.get_submodule(name), inputs, **options) for each in (model, again))
    assert min(once) > 0
    assert all(b > a for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("family", ENCODERS)
def test_every_layer_of_an_encoder_computes_again_where_activations_are_not_kept(family):
    encoder = tiny_encoder(family)
    silence = Collator(feature_extractor_of(encoder), TOKENIZER, START).dummy_batch()
    assert_computes_again("encoder", encoder, part("bert"), silence.inputs, attention_mask=silence.attention_mask)


@pytest.mark.parametrize("family", [*DECODERS, "llama"])
def test_every_layer_of_a_decoder_computes_again_where_activations_are_not_kept(family):
    assert_computes_again("decoder", part("hubert"), tiny_decoder(family), torch.randn(1, 4000))


def test_a_part_without_layers_is_refused_by_name():
    model = joined("hubert", "bert")
    model.encoder.encoder = nn.Identity()
    with pytest.raises(UserError, match="compile = 'inductor'\n    no layers were found in the encoder, hubert"):
        Execution(backend="inductor").prepare(model)
