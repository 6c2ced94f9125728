"""Token-exact gradients: one update, whatever the batch size, the accumulation and the number of ranks.

The gradient of a step is that of the loss summed over all its target tokens, divided by their number.
Each micro-batch back-propagates its summed loss, not a mean, times a constant that keeps float16 in range.
Gradients add up over micro-batches and ranks, as they always do.
The numbers of tokens are added over the ranks once a step, and divide the gradients before these are clipped.
A step whose loss or gradient is not finite, or that has no token, is skipped on all ranks: its gradients are dropped.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm

from sedtrain.models.parts import part_of

SCALE = 2.0**-10
"""Multiplies a summed loss before it is back-propagated; a power of two, so that nothing is rounded."""


class LossSums(NamedTuple):
    """Summed losses of one micro-batch in nats, each with the number of tokens that it is summed over; all scalars."""

    cross_entropy: Tensor
    num_tokens: Tensor
    ctc: Tensor
    num_aligned: Tensor
    unsmoothed: Tensor  # cross-entropy without label smoothing


@dataclass(frozen=True)
class Update:
    """One optimizer step over all its micro-batches and ranks.

    cross_entropy:  nats per target token; unsmoothed: without label smoothing
    ctc:            nats per aligned token
    gradient_norms: by part of the model, before clipping
    micro_batches:  (M, 5) LossSums of this rank's micro-batches
    """

    num_tokens: int
    cross_entropy: float
    ctc: float
    gradient_norms: dict[str, float]
    micro_batches: Tensor
    unsmoothed: float

    @property
    def loss_is_finite(self) -> bool:
        return math.isfinite(self.cross_entropy) and math.isfinite(self.ctc)

    @property
    def gradient_is_finite(self) -> bool:
        return all(map(math.isfinite, self.gradient_norms.values()))

    @property
    def is_skipped(self) -> bool:
        """True if the optimizer changes nothing."""
        return not (self.num_tokens and self.loss_is_finite and self.gradient_is_finite)

    @property
    def gradient_norm(self) -> float:
        return math.hypot(*self.gradient_norms.values())


def divide_gradients(
    model: nn.Module, micro_batches: Tensor, over_ranks: Callable[[Tensor], Tensor], num_ranks: int
) -> Update:
    """Divides the gradients of `model` in place by the step's number of target tokens; drops those of a skipped step.

    Waits for the device once.

    micro_batches: (M, 5) LossSums of this rank
    over_ranks:    sums of this rank -> sums of all ranks
    num_ranks:     the strategy has divided the sum of the ranks' gradients by it
    """
    gradients: dict[str, list[Tensor]] = {}
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            gradients.setdefault(part_of(name), []).append(weight.grad)
    norms = [get_total_norm(of_part) for of_part in gradients.values()]
    norms = [(norm.full_tensor() if isinstance(norm, DTensor) else norm).float() for norm in norms]
    values = torch.cat([over_ranks(micro_batches.sum(0)), *(norm[None] for norm in norms)]).tolist()
    cross_entropy, num_tokens, ctc, num_aligned, unsmoothed = values[:5]
    factor = num_ranks / SCALE / max(num_tokens, 1)
    update = Update(
        num_tokens=int(num_tokens),
        cross_entropy=cross_entropy / max(num_tokens, 1),
        ctc=ctc / max(num_aligned, 1),
        gradient_norms={part: norm * factor for part, norm in zip(gradients, values[5:], strict=True)},
        micro_batches=micro_batches,
        unsmoothed=unsmoothed / max(num_tokens, 1),
    )
    if update.is_skipped:
        model.zero_grad()
    else:
        torch._foreach_mul_(list(chain(*gradients.values())), factor)
    return update


def on_host(values: Mapping[str, float]) -> dict[str, Tensor]:
    """Values for a log, which Lightning would otherwise copy to the device one by one, each time waiting for it."""
    return {name: torch.tensor(value) for name, value in values.items()}


class RunningStatistics:
    """The running statistics of batch norms, without skipped steps: a NaN would stay in them forever."""

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self.buffers = [buffer for norm in norms for buffer in norm.buffers()]
        self.kept = [buffer.clone() for buffer in self.buffers]

    def keep_or_restore(self, update: Update) -> None:
        """Keeps what the micro-batches of a step changed; restores what was before a skipped one."""
        sources, targets = (self.kept, self.buffers) if update.is_skipped else (self.buffers, self.kept)
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
