"""Token-exact gradients: the same update whatever the batch size, the accumulation and the number of ranks.

The gradient of a step is the gradient of the summed loss of all its target tokens, divided by their number:
- Each micro-batch back-propagates its summed loss, not a mean, times a constant that keeps float16 in range.
- Gradients add up over micro-batches and ranks as usual.
- Once a step, the token counts are summed over the ranks and divide the gradients, before clipping.
- All ranks skip a step whose loss or gradient is not finite, or that has no token.
All of this happens on the device, where a fused optimizer also skips the step. The host reads numbers only to report them.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from sedtrain.models.parts import part_of

SCALE = 2.0**-10
"""Factor of the summed loss in back-propagation; a power of two, so that it rounds nothing."""


class LossSums(NamedTuple):
    """Summed losses of one micro-batch in nats, and the numbers of tokens in the sums; all scalars."""

    cross_entropy: Tensor
    num_tokens: Tensor
    ctc: Tensor
    num_aligned: Tensor
    unsmoothed: Tensor  # cross-entropy without label smoothing


@dataclass(frozen=True)
class Update:
    """The sums and gradient norms of one optimizer step, over its micro-batches and ranks.

    They stay on the device: the first property that returns plain numbers waits for it.

    sums:          (5,) LossSums of all micro-batches and ranks
    norms:         (P,) gradient norms by part, before division and clipping
    micro_batches: (M, 5) LossSums of this rank's micro-batches
    num_ranks:     divisor that the strategy has applied to the ranks' summed gradients
    """

    sums: Tensor
    norms: Tensor
    parts: tuple[str, ...]
    micro_batches: Tensor
    num_ranks: int

    @property
    def factor(self) -> Tensor:
        """Factor of the gradients, a scalar on the device. Exact: only the final quotient is rounded."""
        return self.num_ranks / SCALE / self.sums[1].clamp(min=1)

    @property
    def skipped(self) -> Tensor:
        """1 if the optimizer must change nothing, else 0: float32 on the device, as fused optimizers expect."""
        finite = self.sums.isfinite()
        return (~(finite[0] & finite[2] & self.norms.isfinite().all() & (self.sums[1] > 0))).float()

    @cached_property
    def numbers(self) -> tuple[list[float], list[float]]:
        """Sums and norms, read in one transfer."""
        values = torch.cat([self.sums, self.norms]).tolist()
        return values[:5], values[5:]

    @property
    def num_tokens(self) -> int:
        return int(self.numbers[0][1])

    @property
    def cross_entropy(self) -> float:
        """Nats per target token."""
        return self.numbers[0][0] / max(self.num_tokens, 1)

    @property
    def ctc(self) -> float:
        """Nats per aligned token."""
        return self.numbers[0][2] / max(self.numbers[0][3], 1)

    @property
    def unsmoothed(self) -> float:
        """Cross-entropy without label smoothing."""
        return self.numbers[0][4] / max(self.num_tokens, 1)

    @property
    def gradient_norms(self) -> dict[str, float]:
        """By part of the model, before clipping."""
        factor = self.num_ranks / SCALE / max(self.num_tokens, 1)
        return {part: norm * factor for part, norm in zip(self.parts, self.numbers[1], strict=True)}

    @property
    def loss_is_finite(self) -> bool:
        return math.isfinite(self.cross_entropy) and math.isfinite(self.ctc)

    @property
    def gradient_is_finite(self) -> bool:
        return all(map(math.isfinite, self.numbers[1]))

    @property
    def gradient_norm(self) -> float:
        return math.hypot(*self.gradient_norms.values())


def divide_gradients(
    model: nn.Module, micro_batches: Tensor, over_ranks: Callable[[Tensor], Tensor], num_ranks: int
) -> Update:
    """Divides the gradients of `model` in place by the step's number of target tokens, without waiting for the device.

    micro_batches: (M, 5) LossSums of this rank
    over_ranks:    sums of this rank -> sums of all ranks
    num_ranks:     divisor that the strategy has applied to the ranks' summed gradients
    """
    gradients: dict[str, list[Tensor]] = {}
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            gradients.setdefault(part_of(name), []).append(weight.grad)
    norms = [get_total_norm(part_gradients) for part_gradients in gradients.values()]
    norms = [(norm.full_tensor() if isinstance(norm, DTensor) else norm).float() for norm in norms]
    sums = over_ranks(micro_batches.sum(0))
    update = Update(sums, torch.stack(norms), tuple(gradients), micro_batches, num_ranks)
    every = itertools.chain.from_iterable(gradients.values())
    multiply([grad.to_local() if isinstance(grad, DTensor) else grad for grad in every], update.factor)
    return update


def multiply(gradients: list[Tensor], factor: Tensor) -> None:
    """Multiplies in place by a float32 scalar. 16-bit gradients need it expanded: PyTorch rounds a scalar to 16 bits first."""
    if float32 := [gradient for gradient in gradients if gradient.dtype is torch.float32]:
        torch._foreach_mul_(float32, factor)
    for gradient in gradients:
        if gradient.dtype is not torch.float32:
            gradient.mul_(factor.expand_as(gradient))


def skip(update: Update, optimizer: Optimizer, model: nn.Module) -> None:
    """Has the optimizer change nothing in a skipped update. Without a fused optimizer, the host waits for the device."""
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = update.skipped  # type: ignore[attr-defined]
    elif update.skipped:
        model.zero_grad()


def on_host(values: Mapping[str, float]) -> dict[str, Tensor]:
    """Values for `log_dict` as tensors: Lightning would copy floats to the device one by one, and wait for each."""
    return {name: torch.tensor(value) for name, value in values.items()}


class RunningStatistics:
    """Keeps skipped steps out of the running statistics of batch norms, where a NaN would stay forever."""

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self.buffers = [buffer for norm in norms for buffer in norm.buffers()]
        self.kept = [buffer.clone() for buffer in self.buffers]

    def keep_or_restore(self, update: Update) -> None:
        """Keeps the statistics after a good step; restores the earlier ones after a skipped step."""
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            kept.copy_(torch.where(update.skipped > 0, kept, buffer))
            buffer.copy_(kept)
