"""A convolution over time with the layer norm and GELU behind it, forward and backward, on CPUs.

oneDNN convolves frames where they lie. The rest, forward and backward, goes through the frames a few at a time, so that
what one step writes is still near the processor when the next one reads it, and no other copy of the frames is made.

B batch, T frames, C channels; a tap is one of the frames that a kernel spans.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.activations import GELUActivation

ROWS = 512  # frames taken at once: with 512 channels a megabyte

aten: Any = torch.ops.aten


@cache
def multiplies_by_onednn() -> bool:
    """True on AMD's processors, for which MKL, where torch.mm is MKL's, has no kernels of their own."""
    info = Path("/proc/cpuinfo")
    is_amd = info.is_file() and "AuthenticAMD" in info.read_text()
    return is_amd and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right in place."""
    if multiplies_by_onednn() and total.dtype == torch.float32:
        linear: Any = torch.ops.mkldnn._linear_pointwise
        total += linear(left, right.mT, None, "none", [], "")
    else:
        total.addmm_(left, right)


def tap_views(frames: Tensor, num_frames: int, kernel: int, stride: int) -> list[Tensor]:
    """(T, C) -> a view (num_frames, taps · C) for every `stride` taps of the kernel: the frames that they are applied to."""
    dim, start = frames.shape[-1], frames.storage_offset()
    taps = [(first, min(stride, kernel - first)) for first in range(0, kernel, stride)]
    return [frames.as_strided((num_frames, n * dim), (stride * dim, 1), start + first * dim) for first, n in taps]


def pieces(num_frames: int) -> Iterator[slice]:
    return (slice(first, min(first + ROWS, num_frames)) for first in range(0, num_frames, ROWS))


def convolved(frames: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """(B, T, C_in) -> (B, T_out, C_out)"""
    if frames.shape[2] == 1:
        windows = frames[:, :, 0].unfold(1, weight.shape[2], stride)
        return F.linear(windows, weight[:, 0], bias)
    image = frames.transpose(1, 2)[:, :, None]
    return torch.conv2d(image, weight[:, :, None], bias, (1, stride))[:, :, 0].transpose(1, 2).contiguous()


class Behind:
    """What stands behind the convolution: nothing, GELU, or a layer norm and GELU.

    norm: weight and bias of a layer norm; empty: there is none
    """

    def __init__(self, norm: Sequence[Tensor], eps: float, has_gelu: bool) -> None:
        self.norm, self.eps, self.has_gelu = norm, eps, has_gelu
        self.gradients = [torch.zeros_like(each) for each in norm]

    def normed(self, rows: Tensor) -> tuple[Tensor, ...]:
        """(N, C) -> (N, C), means, reciprocals of deviations."""
        weight, bias = self.norm
        return torch.native_layer_norm(rows, rows.shape[1:], weight, bias, self.eps)

    def write(self, before: Tensor, output: Tensor) -> Tensor:
        """Writes the output, which may be `before` itself: (B, T, C)."""
        if self.has_gelu:
            rows, written = before.flatten(0, 1), output.flatten(0, 1)
            for piece in pieces(len(rows)):
                aten.gelu.out(self.normed(rows[piece])[0] if self.norm else rows[piece], out=written[piece])
        return output

    def back(self, gradient: Tensor, before: Tensor) -> Tensor:
        """(N, C) gradient of the output -> (N, C) that of the convolution; adds to those of the norm."""
        if not self.has_gelu:
            return gradient
        if not self.norm:
            return aten.gelu_backward(gradient, before)  # type: ignore[no-any-return]
        normed, *statistics = self.normed(before)
        gradient = aten.gelu_backward(gradient, normed)
        of_rows, *more = aten.native_layer_norm_backward(
            gradient, before, before.shape[1:], *statistics, *self.norm, [True] * 3
        )
        for total, each in zip(self.gradients, more, strict=True):
            total += each
        return of_rows  # type: ignore[no-any-return]


class ConvolutionLayer(torch.autograd.Function):
    """(B, T, C_in) -> (B, T_out, C_out); what is kept for the backward pass are the input and the convolution of it."""

    @staticmethod
    def forward(
        ctx: Any,
        frames: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: int,
        has_gelu: bool,
        eps: float,
        *norm: Tensor,
    ) -> Tensor:
        frames = frames.contiguous()
        before = convolved(frames, weight, bias, stride)
        ctx.save_for_backward(frames, weight, before if has_gelu else None, *norm)
        ctx.stride, ctx.has_gelu, ctx.eps = stride, has_gelu, eps
        behind = Behind(norm, eps, has_gelu)
        return behind.write(before, torch.empty_like(before) if has_gelu else before)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        frames, weight, before, *norm = ctx.saved_tensors
        gradient, taps = gradient.contiguous(), weight.permute(2, 1, 0).flatten(0, 1)  # (taps · C_in, C_out)
        behind = Behind(norm, ctx.eps, ctx.has_gelu)
        frames_gradient = torch.empty_like(frames) if ctx.needs_input_grad[0] else None
        taps_gradient, bias_gradient = torch.zeros_like(taps), taps.new_zeros(taps.shape[1])
        matrices, sums = (each.split(ctx.stride * weight.shape[1]) for each in (taps, taps_gradient))
        kernel, stride, num_frames = weight.shape[2], ctx.stride, gradient.shape[1]
        for row in range(len(gradient)):
            if frames_gradient is not None:
                frames_gradient[row, num_frames * stride :] = 0.0
            for piece in reversed(
                list(pieces(num_frames))
            ):  # frames that two pieces share are cleared by the later one
                inputs = slice(piece.start * stride, piece.stop * stride)
                rows = behind.back(gradient[row, piece], gradient[row, piece] if before is None else before[row, piece])
                bias_gradient += rows.sum(0)
                for view, total in zip(
                    tap_views(frames[row, inputs.start :], len(rows), kernel, stride), sums, strict=True
                ):
                    add_product(total, view.T, rows)
                if frames_gradient is not None:
                    frames_gradient[row, inputs] = 0.0
                    views = tap_views(frames_gradient[row, inputs.start :], len(rows), kernel, stride)
                    for view, matrix in zip(views, matrices, strict=True):
                        add_product(view, rows, matrix.T)
        weight_gradient = taps_gradient.view(kernel, *weight.shape[1::-1]).permute(2, 1, 0)
        needs_bias = ctx.needs_input_grad[2]
        return (
            frames_gradient,
            weight_gradient,
            bias_gradient if needs_bias else None,
            None,
            None,
            None,
            *behind.gradients,
        )


def strided_convolution(
    frames: Tensor, convolution: nn.Conv1d, norm: nn.LayerNorm | None = None, has_gelu: bool = False
) -> Tensor:
    """(B, T, C_in) -> (B, T_out, C_out): `convolution` of the transposed input (no padding, no dilation), and what is behind.

    norm: only with GELU
    """
    if torch.compiler.is_compiling():
        output: Tensor = convolution(frames.transpose(1, 2)).transpose(1, 2)
        return behind_in_torch(output, norm, has_gelu)
    values: list[Any] = [frames, convolution.weight, convolution.bias]
    if torch.is_autocast_enabled("cpu"):
        values = [each if each is None else each.to(torch.get_autocast_dtype("cpu")) for each in values]
        output = ConvolutionLayer.apply(*values, convolution.stride[0], False, 0.0)  # type: ignore[no-untyped-call]
        return behind_in_torch(output, norm, has_gelu)
    eps, parameters = (0.0, []) if norm is None else (norm.eps, [norm.weight, norm.bias])
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in [*values, *parameters]):
        output = ConvolutionLayer.apply(*values, convolution.stride[0], has_gelu, eps, *parameters)  # type: ignore[no-untyped-call]
        return output
    frames, weight, bias = values
    before = convolved(frames.contiguous(), weight, bias, convolution.stride[0])
    return Behind(parameters, eps, has_gelu).write(before, before)


def behind_in_torch(output: Tensor, norm: nn.LayerNorm | None, has_gelu: bool) -> Tensor:
    output = output if norm is None else norm(output)
    return F.gelu(output) if has_gelu else output


def is_gelu(activation: nn.Module) -> bool:
    return isinstance(activation, GELUActivation) and activation.act is F.gelu
