"""The arithmetic of a training step against closed formulas, and its share of the device's peak in the log."""

import time
from types import SimpleNamespace

import lightning
import pytest
import torch
from exactness import Loader, batch, new_module, trainer_of
from families import TOKENIZER, batch_of
from pairs import BART, WAVE_ENCODER, joined
from torch import nn

from sedtrain.data.collate import Collator
from sedtrain.models.family_settings import feature_extractor_of
from sedtrain.models.parts import Execution
from sedtrain.training import utilization
from sedtrain.training.module import SpeechSeq2SeqModule
from sedtrain.training.utilization import Cost, Utilization, flops, meta_copy, peak_of


def attention(queries, keys, width):
    """Scores and sums of one layer, both 2 · width operations for each pair."""
    return 4 * queries * keys * width


def forward_of(model, num_samples, num_tokens):
    """Operations of a forward pass by the shapes of the weights: two for each weight and each position that it meets."""
    linear = lambda part: sum(each.weight.numel() for each in part.modules() if isinstance(each, nn.Linear))  # noqa: E731
    frames, convolved = num_samples, 0
    for convolution in (layer.conv for layer in model.encoder.feature_extractor.conv_layers):
        frames = (frames - convolution.kernel_size[0]) // convolution.stride[0] + 1
        convolved += 2 * convolution.weight.numel() * frames
    position = model.encoder.encoder.pos_conv_embed.conv
    kernel, groups = position.kernel_size[0], position.groups
    assert kernel % 2 == 0 and groups > 1
    width = WAVE_ENCODER["hidden_size"]
    convolved += 2 * width * width // groups * kernel * (frames + 1)
    encoder = convolved + 2 * linear(model.encoder) * frames + 2 * attention(frames, frames, width)
    over_audio = [layer.encoder_attn for layer in model.decoder.model.decoder.layers]
    of_audio = sum(linear(each.k_proj) + linear(each.v_proj) for each in over_audio)
    decoder = 2 * of_audio * frames + 2 * (linear(model.decoder) - of_audio) * num_tokens
    decoder += 2 * (attention(num_tokens, num_tokens, BART["d_model"]) + attention(num_tokens, frames, BART["d_model"]))
    return encoder + decoder


@pytest.fixture
def model():
    return joined("hubert", "bart")


def on_meta(model, num_samples, num_tokens):
    inputs, labels = torch.empty(1, num_samples, device="meta"), torch.zeros(1, num_tokens, dtype=torch.long)
    return flops(meta_copy(model), inputs, labels)


@pytest.mark.parametrize("size", [(8000, 7), (16000, 7), (16000, 20)])
def test_a_step_does_three_times_the_arithmetic_of_a_forward_pass_by_the_shapes_of_its_weights(model, size):
    first = model.encoder.feature_extractor.conv_layers[0].conv.weight.numel()
    to_the_audio = 2 * first * ((size[0] - 10) // 5 + 1)  # which needs no gradient
    assert on_meta(model, *size) == pytest.approx(3 * forward_of(model, *size) - to_the_audio, rel=2e-3)


def test_frozen_weights_and_what_is_before_them_save_their_backward_pass(model):
    everything = on_meta(model, 16000, 7)
    model.encoder.requires_grad_(False)
    assert on_meta(model, 16000, 7) < 0.6 * everything


def test_activation_checkpointing_and_the_mode_of_training_leave_the_copy_alone(model):
    expected = on_meta(model, 8000, 7)
    copied = meta_copy(model.train())
    Execution(activation_checkpointing=True).prepare(model)
    assert flops(copied, torch.empty(1, 8000, device="meta"), torch.zeros(1, 7, dtype=torch.long)) == expected


def cost_of(model):
    return Cost(meta_copy(model), Collator(feature_extractor_of(model.encoder), TOKENIZER, 1))


def test_the_cost_of_a_batch_is_that_of_its_utterances_without_padding(model):
    padded = batch_of(model, 0.7, 5.3, 12.0)
    tokens = (padded.labels >= 0).sum(1).tolist()
    alone = sum(
        on_meta(model, samples, number)
        for samples, number in zip(padded.attention_mask.sum(1).tolist(), tokens, strict=True)
    )
    assert cost_of(model)(padded) == pytest.approx(alone, rel=2e-3)
    assert len(set(tokens)) > 1


def test_the_peak_is_known_of_cuda_devices_alone_and_depends_on_the_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    cuda = torch.device("cuda", 0)
    assert peak_of(cuda, "bf16-mixed") == 989_400_000_000_000 == peak_of(cuda, "16-mixed")
    assert peak_of(cuda, "64-true") is peak_of(torch.device("cpu"), "bf16-mixed") is None


class Clock(lightning.Callback):
    """The time of each step."""

    def __init__(self):
        self.times = []

    def on_train_batch_end(self, *_):
        self.times.append(time.perf_counter())


def logged(monkeypatch, utterances):
    """The module's metrics after as many steps, their batches and their times."""
    module, clock = new_module(), Clock()
    collator = Collator(feature_extractor_of(module.model.encoder), TOKENIZER, 1)
    monkeypatch.setattr(SpeechSeq2SeqModule, "data", SimpleNamespace(collator=collator))
    batches = [batch(each) for each in utterances]
    trainer = trainer_of("32-true", callbacks=[Utilization(), clock], max_steps=len(batches), log_every_n_steps=2)
    trainer.fit(module, Loader(batches))
    return trainer.callback_metrics, batches, clock.times


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:.*treespec, LeafSpec")
def test_the_log_has_the_share_of_the_peak_of_the_steps_since_the_last_log(monkeypatch):
    monkeypatch.setattr(utilization, "peak_of", lambda device, precision: 10**12)
    metrics, batches, times = logged(monkeypatch, [[0], [1, 2], [3], [4, 5, 6]])
    cost = sum(map(cost_of(new_module().model), batches[2:]))
    assert metrics["train/mfu"] == pytest.approx(cost / (times[3] - times[1]) / 1e12, rel=0.3)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:.*treespec, LeafSpec")
def test_on_a_cpu_nothing_is_counted(monkeypatch):
    assert "train/mfu" not in logged(monkeypatch, [[0], [1]])[0]
