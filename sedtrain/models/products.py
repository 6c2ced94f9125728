"""Products of matrices. On AMD's processors oneDNN makes those in float32, in half the time of MKL.

N rows, I inputs, O outputs.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sedtrain.models.mixins import mix_into, mixed
from sedtrain.models.no_sync_masks import is_traced

AT_ONCE = 2**19
"""Numbers to which a product is added at once: two megabytes, which stay in the processor's cache."""
LEAST_WEIGHTS, LEAST_PRODUCTS = 2**16, 2**25
"""Weights of a layer and multiplications of a call from which oneDNN is faster: it plans each new number of rows for 0.5 ms."""


@cache
def multiplies_by_onednn() -> bool:
    """True if torch multiplies by MKL on an AMD processor, for which MKL has no kernels of its own."""
    info = Path("/proc/cpuinfo")
    is_amd = info.is_file() and "AuthenticAMD" in info.read_text()
    return is_amd and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def is_for_onednn(left: Tensor) -> bool:
    is_float32 = left.dtype == torch.float32 and left.device.type == "cpu"
    return is_float32 and left.numel() > 0 and multiplies_by_onednn()


def onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left @ right + bias"""
    linear: Any = torch.ops.mkldnn._linear_pointwise
    product: Tensor = linear(left, right.mT, bias, "none", [], "")
    return product


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left @ right + bias"""
    if is_for_onednn(left):
        return onednn(left, right, bias)
    return left @ right if bias is None else torch.addmm(bias, left, right)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right in place, in the precision of `total`."""
    if total.dtype != left.dtype:
        total += left @ right
    elif is_for_onednn(left):
        num_rows = AT_ONCE // total.shape[1] or 1
        for part, rows in zip(total.split(num_rows), left.split(num_rows), strict=True):
            part += onednn(rows, right)
    else:
        total.addmm_(left, right)


class Product(torch.autograd.Function):
    """(N, I) rows, (O, I) weight, (O,) bias -> (N, O), by oneDNN forward and backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return onednn(rows, weight.mT, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (rows, weight), (of_rows, of_weight, of_bias) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            onednn(gradient, weight) if of_rows else None,
            onednn(gradient.mT, rows) if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )


class FastLinear(nn.Module):
    """Mixin for a linear layer that multiplies by oneDNN in float32 on a CPU."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        if not self.is_faster(input):
            output: Tensor = super().forward(input)
            return output
        rows: Tensor = Product.apply(input.reshape(-1, input.shape[-1]), self.weight, self.bias)  # type: ignore[no-untyped-call]
        return rows.view(*input.shape[:-1], -1)

    def is_faster(self, input: Tensor) -> bool:
        if type(input) is not Tensor or is_traced(input) or torch.is_autocast_enabled("cpu"):
            return False
        return is_for_onednn(input) and input.numel() * len(self.weight) >= LEAST_PRODUCTS


FAST_LINEAR = mixed(FastLinear, nn.Linear)


def quicken(model: nn.Module) -> None:
    """Lets the large linear layers of a model multiply by oneDNN where that is faster."""
    for module in model.modules() if multiplies_by_onednn() else ():
        if type(module) is nn.Linear and module.weight.numel() >= LEAST_WEIGHTS:
            mix_into(module, FastLinear)
