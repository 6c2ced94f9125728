"""A training step never makes the host wait for the device: everything that it has to know of a batch, it knows already."""

from functools import partial
from importlib import import_module

import lightning
import pytest
import torch
from exactness import Loader
from fake_device import DEVICE, counted
from families import END, PAD, START, TOKENIZER, batch_of, tiny_decoder, tiny_encoder
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils._python_dispatch import TorchDispatchMode

from sedtrain.decoding.options import DecodingOptions
from sedtrain.evaluation.metric_set import MetricSet
from sedtrain.models.losses import LossWeights
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.training.guards import Guards
from sedtrain.training.module import SpeechSeq2SeqModule
from sedtrain.training.progress import ProgressBar

AUGMENTED = {"mask_time_prob": 0.5, "mask_feature_prob": 0.1, "num_hidden_layers": 1}
PAIRS = [
    ("hubert", "bert", AUGMENTED),
    ("wav2vec2", "bart", AUGMENTED),
    ("w2v_bert", "t5", AUGMENTED),
    ("whisper", "gpt2", {"encoder_layers": 1}),
    ("speech_to_text", "roberta", {"encoder_layers": 1}),
]
pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step`",
    "ignore:.*treespec, LeafSpec",
    "ignore:Total length of",  # which Lightning compares with 0 on the device, where everything is true
)


def new_module(encoder, decoder, optimizer, **options):
    model = SpeechEncoderDecoder(encoder=tiny_encoder(encoder, **options), decoder=tiny_decoder(decoder)).train()
    model.set_special_tokens(START, END, PAD)
    model.add_ctc_head(len(TOKENIZER))
    constant = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1.0)
    return SpeechSeq2SeqModule(
        model,
        TOKENIZER,
        LossWeights(label_smoothing=0.1, ctc_weight=0.3),
        MetricSet(["wer"]),
        DecodingOptions(),
        optimizer,
        scheduler=lambda optimizer, num_training_steps: constant(optimizer),
    )


class Anywhere(CPUAccelerator):
    def setup_device(self, device):
        pass


class WaitsOfSteps(lightning.Callback):
    """What was noted in each step of the optimizer; the first is left out, which makes the optimizer's state."""

    def __init__(self, waits):
        self.waits, self.steps, self.seen = waits, [], 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > len(self.steps):
            self.steps.append(self.waits.found[self.seen :])
            self.seen = len(self.waits.found)


def waits_of_steps(folder, module, batches, log_every_n_steps=50):
    with counted() as waits:
        steps = WaitsOfSteps(waits)
        trainer = lightning.Trainer(
            max_steps=4, accumulate_grad_batches=2, gradient_clip_val=1.0, log_every_n_steps=log_every_n_steps,
            strategy=SingleDeviceStrategy(DEVICE, accelerator=Anywhere()), default_root_dir=folder, logger=False,
            callbacks=[Guards(str(folder)), ProgressBar(log_every_seconds=1000), steps], enable_checkpointing=False,
            enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(module, Loader(batches))
    assert len(steps.steps) == 4
    return steps.steps[1:]


@pytest.fixture(autouse=True)
def fused_anywhere(monkeypatch):
    module = import_module("torch.optim.optimizer")
    monkeypatch.setattr(module, "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"])


FUSED = partial(torch.optim.AdamW, lr=1e-3, fused=True)


def batches_of(module):
    """Batches with and without padding."""
    return [batch_of(module.model, *seconds) for seconds in [(0.7, 1.3, 0.4), (0.9, 0.9)] * 4]


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize(("encoder", "decoder", "options"), PAIRS)
def test_a_step_waits_for_nothing(tmp_path, encoder, decoder, options):
    module = new_module(encoder, decoder, FUSED, options=options)
    assert waits_of_steps(tmp_path, module, batches_of(module)) == [[], [], []]


def test_a_step_that_is_logged_waits_once_for_the_numbers_of_all_steps_since_the_last(tmp_path):
    module = new_module("hubert", "bert", FUSED)
    steps = waits_of_steps(tmp_path, module, batches_of(module), log_every_n_steps=2)
    assert [len(each) for each in steps] == [2, 0, 2]
    assert all("gradients.py" in line for line in steps[0])


def test_an_optimizer_that_is_not_fused_waits_once_an_update(tmp_path):
    module = new_module("hubert", "bert", partial(torch.optim.AdamW, lr=1e-3, foreach=True))
    assert [len(each) for each in waits_of_steps(tmp_path, module, batches_of(module))] == [1, 1, 1]


@pytest.mark.parametrize(
    "wait",
    [
        lambda values: values.sum().item(),
        lambda values: values.tolist(),
        lambda values: bool((values > 0).any()),
        lambda values: values[values > 0],
        lambda values: values.nonzero(),
        lambda values: values.cpu(),
        lambda values: torch.zeros(3).to(DEVICE),
        lambda values: values.copy_(torch.zeros(3)),
        lambda values: torch.tensor([1.0], device=DEVICE),
        lambda values: values.new_tensor([1.0]),
        lambda values: values.masked_select(values > 0),
        lambda values: torch.equal(values, values),
    ],
)
def test_what_makes_the_host_wait_is_counted(wait):
    with counted() as waits:
        wait(torch.ones(3, device=DEVICE))
    assert len(waits.found) == 1


class CountsReads(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_on_a_cpu_a_batch_without_padding_still_computes_without_masks():
    model = new_module("hubert", "bert", FUSED).model
    batch = batch_of(model, 0.7, 0.7)
    with CountsReads() as reads:
        model(batch.inputs, attention_mask=batch.attention_mask, labels=batch.labels, output_logits=True)
    assert reads.number == 2  # the mask of the encoder, and of the attention to it


@pytest.mark.parametrize(("seconds", "is_padded"), [((0.9, 0.9), False), ((0.9, 0.4), True)])
def test_on_a_device_attention_without_padding_gets_no_mask_and_so_its_fast_kernel(monkeypatch, seconds, is_padded):
    module = new_module("whisper", "gpt2", FUSED).to(DEVICE)
    masks, attend = [], torch.nn.functional.scaled_dot_product_attention

    def seen(*args, attn_mask=None, **options):
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    with counted():
        module.losses(batch_of(module.model, *seconds).to(DEVICE))
    heard, written = module.model.encoder.config.encoder_layers, module.model.decoder.config.n_layer
    assert len(masks) == heard + 2 * written
    assert sum(mask is not None for mask in masks) == (heard + written if is_padded else 0)
