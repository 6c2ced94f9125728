"""One update of many micro-batches and ranks: they back-propagate sums, which are divided once, by the tokens of all."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm

SCALE = 2.0**-10
"""What a sum is multiplied by before it is back-propagated, so that its gradients fit into 16 bits; a power of two: exact."""


class LossSums(NamedTuple):
    """Of one micro-batch in nats, beside the number of tokens they were summed over; all scalars."""

    cross_entropy: Tensor
    num_tokens: Tensor
    ctc: Tensor
    num_aligned: Tensor


@dataclass(frozen=True)
class Update:
    """One step of the optimizer, over all its micro-batches and ranks.

    cross_entropy: nats per target token
    ctc: nats per aligned token
    gradient_norms: by part of the model, of the gradient that is clipped next
    micro_batches: of this rank, the (4,) sums of each
    """

    num_tokens: int
    cross_entropy: float
    ctc: float
    gradient_norms: dict[str, float]
    micro_batches: list[Tensor]

    @property
    def loss_is_finite(self) -> bool:
        return math.isfinite(self.cross_entropy) and math.isfinite(self.ctc)

    @property
    def gradient_is_finite(self) -> bool:
        return all(map(math.isfinite, self.gradient_norms.values()))

    @property
    def is_left_out(self) -> bool:
        """Whether the optimizer's step changes nothing."""
        return not (self.num_tokens and self.loss_is_finite and self.gradient_is_finite)

    @property
    def gradient_norm(self) -> float:
        return math.hypot(*self.gradient_norms.values())


class MicroBatches:
    """The sums of this rank's micro-batches since the optimizer's last step."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []

    def add(self, sums: LossSums) -> None:
        self.sums.append(torch.stack([each.detach().float() for each in sums]))

    def divide(
        self, parts: Mapping[str, Sequence[Tensor]], over_ranks: Callable[[Tensor], Tensor], num_ranks: int
    ) -> Update:
        """Divides the gradients of the weights of `parts` in place by the number of target tokens, and starts anew.

        Where they or a loss are not finite, or no token was seen, they are dropped: the optimizer's step then changes nothing,
        on all ranks alike. It waits for the device once.

        over_ranks: this rank's sums -> those of all ranks
        num_ranks: what the strategy has divided the sum over the ranks by
        """
        micro_batches, self.sums = self.sums, []
        gradients = {
            name: [weight.grad for weight in weights if weight.grad is not None] for name, weights in parts.items()
        }
        gradients = {name: each for name, each in gradients.items() if each}
        norms = [whole(get_total_norm(each)).float() for each in gradients.values()]
        totals = over_ranks(torch.stack(micro_batches).sum(0))
        values = torch.cat([totals, torch.stack(norms)] if norms else [totals]).tolist()
        cross_entropy, num_tokens, ctc, num_aligned = values[:4]
        factor = num_ranks / SCALE / max(num_tokens, 1)
        update = Update(
            num_tokens=int(num_tokens),
            cross_entropy=cross_entropy / max(num_tokens, 1),
            ctc=ctc / max(num_aligned, 1),
            gradient_norms={name: norm * factor for name, norm in zip(gradients, values[4:], strict=True)},
            micro_batches=micro_batches,
        )
        if update.is_left_out:
            for weight in chain(*parts.values()):
                weight.grad = None
        else:
            torch._foreach_mul_(list(chain(*gradients.values())), factor)
        return update


class RunningStatistics:
    """What batch norms have seen of the steps so far, without those that are left out: one NaN would stay in them forever."""

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self.now = [buffer for norm in norms for buffer in norm.buffers()]
        self.before = [buffer.clone() for buffer in self.now]

    def settle(self, update: Update) -> None:
        """Keeps what the micro-batches of an update left in them, or goes back to what was before it."""
        for now, before in zip(self.now, self.before, strict=True):
            if update.is_left_out:
                now.copy_(before)
            else:
                before.copy_(now)


def whole(norm: Tensor) -> Tensor:
    """The norm of gradients that may be sharded over ranks."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
