"""Model FLOPs utilization: the fraction of the device's peak that training uses (arXiv 2204.02311).

Counts forward and backward passes on real frames and tokens. Leaves out padding, the recomputation of activation
checkpointing, and the alignments of CTC.

S inputs (samples or feature frames) and U tokens of an utterance.
"""

import copy
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.throughput import get_available_flops
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sedtrain.batch import IGNORE_INDEX, Batch
from sedtrain.models.prefix import is_prefixed
from sedtrain.training.gradients import on_host
from sedtrain.training.tracking import is_logged

DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32}
LONGEST = 16.0, 64
"""Seconds and tokens of the largest utterance that is measured."""
SHARES = [(1 / 4, 1 / 4), (1 / 4, 1), (1 / 2, 1 / 2), (1, 1 / 4), (1, 1), (1 / 2, 1), (1, 1 / 2)]
"""Sizes of the measured utterances as fractions of LONGEST; the seven shapes determine six coefficients."""


def peak_of(device: torch.device, precision: str) -> int | None:
    """The device's peak in operations per second; None if Lightning does not know it, as for CPUs."""
    dtype = DTYPES.get(precision.partition("-")[0])
    return None if device.type != "cuda" or dtype is None else get_available_flops(device, dtype)


def meta_copy(model: nn.Module) -> Any:
    """A copy on the meta device, which takes no memory."""
    tensors: dict[int, Any] = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    for weight in model.parameters():
        tensors[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
    return copy.deepcopy(model, tensors).eval()


def convolution_backward_flops(gradient: Any, inputs: Any, weight: Any, *options: Any, **_: Any) -> int:
    """Operations of a convolution's backward pass, by shapes. PyTorch's own formula counts each group for all channels."""
    transposed, output_mask = options[4], options[7]
    batch, _channels, *positions = inputs if transposed else gradient
    return int(2 * batch * math.prod(positions) * math.prod(weight) * sum(output_mask[:2]))


def flops(model: Any, inputs: torch.Tensor, labels: torch.Tensor) -> int:
    """Operations of one forward and backward pass. Model and inputs are on the meta device, labels in the host's memory."""
    formulas = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        encoded = model.encode(inputs)
        loss = model(encoder_outputs=encoded, labels=labels, output_logits=False, num_items_in_batch=1).loss
        if model.ctc_head is not None:
            loss = loss + model.ctc_head(encoded.encoder_frames).sum()
        if loss.requires_grad:
            loss.backward()
    return int(counter.get_total_flops())


def terms(inputs: Any, tokens: Any) -> Any:
    """Terms of a polynomial in S and U for the operations of a Transformer: attention is quadratic, the rest linear."""
    s, u = np.asarray(inputs, float), np.asarray(tokens, float)
    return np.stack([np.ones_like(s), s, u, s * s, s * u, u * u], -1)


class Cost:
    """Operations of a training step by the sizes of its utterances: a polynomial fitted to seven measured shapes.

    model:    on the meta device
    collator: of the run, for the layout of its inputs
    """

    def __init__(self, model: Any, collator: Any) -> None:
        seconds, most = min(LONGEST[0], collator.max_seconds), min(LONGEST[1], model.max_tokens or LONGEST[1])
        sample = collator.dummy_batch()
        shape, axis = list(sample.inputs.shape), 2 if collator.time_is_last and sample.inputs.ndim == 3 else 1
        in_a_second = shape[axis] / max(1.0, collator.shortest_seconds)
        self.largest = in_a_second * seconds, most
        sizes = [(int(self.largest[0] * s), max(int(most * u), 1)) for s, u in SHARES]
        counted = []
        for shape[axis], num_tokens in sizes:
            inputs = torch.empty(shape, device="meta", dtype=sample.inputs.dtype)
            counted.append(flops(model, inputs, torch.zeros(1, num_tokens, dtype=torch.long)))
        self.coefficients = np.linalg.lstsq(self.scaled(sizes), np.array(counted, float))[0]

    def scaled(self, sizes: Sequence[tuple[int, int]]) -> Any:
        return terms(*(np.array(sizes) / self.largest).T)

    def __call__(self, batch: Batch) -> float:
        """Operations of a batch."""
        known = batch.on_host
        lengths = known.attention_mask.sum(1).tolist(), (known.labels != IGNORE_INDEX).sum(1).tolist()
        return float((self.scaled(list(zip(*lengths, strict=True))) @ self.coefficients).sum()) if len(batch) else 0.0


class Utilization(Callback):
    """Logs `train/mfu` of this process's device, in the steps that are logged, if the device's peak is known.

    Logs nothing for a prefix decoder, which reads the values of its masks, nor with `data.cache_features`.
    """

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Copies the model before compilation, sharding and activation checkpointing change its layers."""
        self.started = time.perf_counter()  # a validation may come before training
        is_counted = stage == "fit" and not is_prefixed(pl_module.model.config.decoder)
        self.peak = peak_of(trainer.strategy.root_device, str(trainer.precision)) if is_counted else None
        if self.peak is None:
            return
        self.model = meta_copy(pl_module.model)
        for part in (self.model.encoder, self.model.decoder):
            if part.config._attn_implementation not in ("eager", "sdpa"):  # other kernels need a GPU
                part.config._attn_implementation = "eager"

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.trained: list[bool] | None = None
        self.measure(pl_module)
        self.operations, self.started = 0.0, time.perf_counter()

    def measure(self, module: Any) -> None:
        """Fits the cost of an utterance, anew whenever other weights are trained."""
        trained = [weight.requires_grad for weight in module.model.parameters()]
        if self.peak is None or module.cache is not None or trained == self.trained:
            return
        for weight, is_trained in zip(self.model.parameters(), trained, strict=True):
            weight.requires_grad_(is_trained)
        self.trained, self.cost = trained, Cost(self.model, module.data.collator)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validation_started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started += time.perf_counter() - self.validation_started

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, *_: Any) -> None:
        if self.trained is None or self.peak is None:
            return
        self.operations += self.cost(batch)
        if is_logged(trainer):
            seconds = time.perf_counter() - self.started
            pl_module.log_dict(on_host({"train/mfu": self.operations / seconds / self.peak}), batch_size=1)
            self.measure(pl_module)
            self.operations, self.started = 0.0, time.perf_counter()
