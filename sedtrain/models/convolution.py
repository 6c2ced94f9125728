"""A convolution over time with the layer norm and GELU behind it, forward and backward, on CPUs.

oneDNN convolves the frames in place. Everything else takes a few frames at a time, forward and backward: each step finds the
output of the one before in the processor's cache, and the frames are not copied.

B batch, T frames, C channels; a tap is one of the frames that a kernel spans.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.activations import GELUActivation

from sedtrain.models.products import add_product

AT_ONCE = 2**18
"""Numbers in the frames that are taken at once: a megabyte."""

aten: Any = torch.ops.aten


def tap_views(frames: Tensor, num_frames: int, kernel: int, stride: int) -> list[Tensor]:
    """(T, C) -> for every `stride` taps of the kernel, a view (num_frames, taps · C) of the frames that they multiply."""
    dim, start = frames.shape[-1], frames.storage_offset()
    taps = [(first, min(stride, kernel - first)) for first in range(0, kernel, stride)]
    return [frames.as_strided((num_frames, n * dim), (stride * dim, 1), start + first * dim) for first, n in taps]


def pieces(frames: Tensor) -> Iterator[slice]:
    """Slices of (T, C) frames, each of at most AT_ONCE numbers."""
    num_frames, num_rows = len(frames), AT_ONCE // frames.shape[1] or 1
    return (slice(first, min(first + num_rows, num_frames)) for first in range(0, num_frames, num_rows))


def convolved(frames: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """(B, T, C_in) -> (B, T_out, C_out)"""
    if frames.shape[2] == 1:
        windows = frames[:, :, 0].unfold(1, weight.shape[2], stride)
        return F.linear(windows, weight[:, 0], bias)
    image = frames.transpose(1, 2)[:, :, None]
    return torch.conv2d(image, weight[:, :, None], bias, (1, stride))[:, :, 0].transpose(1, 2).contiguous()


class Behind:
    """The layers behind the convolution: none, GELU, or a layer norm and GELU.

    norm: weight and bias of the layer norm; empty without one
    """

    def __init__(self, norm: Sequence[Tensor], eps: float, has_gelu: bool) -> None:
        self.norm, self.eps, self.has_gelu = norm, eps, has_gelu
        self.gradients = [torch.zeros_like(each) for each in norm]

    def normed(self, rows: Tensor) -> tuple[Tensor, ...]:
        """(N, C) -> (N, C), means and reciprocals of standard deviations."""
        weight, bias = self.norm
        return torch.native_layer_norm(rows, rows.shape[1:], weight, bias, self.eps)

    def write(self, before: Tensor, output: Tensor) -> Tensor:
        """Writes the (B, T, C) output for `before`, possibly into `before` itself."""
        if self.has_gelu:
            rows, written = before.flatten(0, 1), output.flatten(0, 1)
            for piece in pieces(rows):
                aten.gelu.out(self.normed(rows[piece])[0] if self.norm else rows[piece], out=written[piece])
        return output

    def back(self, gradient: Tensor, before: Tensor) -> Tensor:
        """(N, C) gradient of the output -> (N, C) gradient of the convolution; adds to the gradients of the norm."""
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


class Gradients:
    """Sums up the gradients of a convolution over pieces of its output, from the end of an utterance to its beginning.

    frames: (B, T, C_in), the input of the convolution
    needed: whether the gradients of input, weight and bias are needed; the others stay None
    """

    def __init__(self, frames: Tensor, weight: Tensor, stride: int, needed: Sequence[bool]) -> None:
        self.frames, self.weight, self.stride, self.kernel = frames, weight, stride, weight.shape[2]
        taps = weight.permute(2, 1, 0).flatten(0, 1)  # (taps · C_in, C_out)
        exact = torch.promote_types(weight.dtype, torch.float32)
        self.of_frames = torch.empty_like(frames) if needed[0] else None
        self.of_taps = torch.zeros_like(taps, dtype=exact) if needed[1] else None
        self.of_bias = taps.new_zeros(len(weight), dtype=exact) if needed[2] else None
        self.matrices = taps.split(stride * weight.shape[1])
        self.sums = () if self.of_taps is None else self.of_taps.split(stride * weight.shape[1])
        if self.of_frames is not None:
            num_frames = (frames.shape[1] - self.kernel) // stride + 1
            self.of_frames[:, num_frames * stride :] = 0.0

    def add(self, number: int, piece: slice, rows: Tensor) -> None:
        """rows: (N, C_out) gradient of a piece of the output of one utterance"""
        first = piece.start * self.stride
        shape = len(rows), self.kernel, self.stride
        if self.of_bias is not None:
            self.of_bias += rows.sum(0)
        if self.sums:
            for view, total in zip(tap_views(self.frames[number, first:], *shape), self.sums, strict=True):
                add_product(total, view.T, rows)
        if self.of_frames is not None:
            inputs = self.of_frames[number, first:]
            inputs[: len(rows) * self.stride] = 0.0  # the frames after these belong to the piece added before
            for view, matrix in zip(tap_views(inputs, *shape), self.matrices, strict=True):
                add_product(view, rows, matrix.T)

    def all(self) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias. That of the weight has the memory layout of the weight, as DDP needs it."""
        taps, bias, weight = self.of_taps, self.of_bias, self.weight
        if taps is not None:
            taps = torch.empty_like(weight).copy_(taps.view(self.kernel, *weight.shape[1::-1]).permute(2, 1, 0))
        return self.of_frames, taps, None if bias is None else bias.to(weight.dtype)


class ConvolutionLayer(torch.autograd.Function):
    """(B, T, C_in) -> (B, T_out, C_out); keeps input and output of the convolution for the backward pass."""

    @staticmethod
    def forward(ctx: Any, stride: int, has_gelu: bool, eps: float, *tensors: Tensor) -> Tensor:
        """tensors: frames, weight, bias or None, then weight and bias of the norm if there is one"""
        frames, weight, bias, *norm = tensors
        frames = frames.contiguous()
        before = convolved(frames, weight, bias, stride)
        ctx.save_for_backward(frames, weight, before if has_gelu else None, *norm)
        ctx.options = stride, has_gelu, eps
        return Behind(norm, eps, has_gelu).write(before, torch.empty_like(before) if has_gelu else before)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        frames, weight, before, *norm = ctx.saved_tensors
        stride, has_gelu, eps = ctx.options
        gradient = gradient.contiguous()
        before = gradient if before is None else before
        behind, gradients = Behind(norm, eps, has_gelu), Gradients(frames, weight, stride, ctx.needs_input_grad[3:6])
        for number in range(len(gradient)):
            for piece in reversed(list(pieces(gradient[number]))):
                gradients.add(number, piece, behind.back(gradient[number, piece], before[number, piece]))
        return None, None, None, *gradients.all(), *behind.gradients


def strided_convolution(
    frames: Tensor, convolution: nn.Conv1d, norm: nn.LayerNorm | None = None, has_gelu: bool = False
) -> Tensor:
    """(B, T, C_in) -> (B, T_out, C_out): `convolution` of the transposed input (no padding, no dilation), then norm and GELU.

    norm: needs `has_gelu`
    """
    if torch.compiler.is_compiling():
        output: Tensor = convolution(frames.transpose(1, 2)).transpose(1, 2)
        return behind_in_torch(output, norm, has_gelu)
    stride, eps, layer = convolution.stride[0], 0.0 if norm is None else norm.eps, ConvolutionLayer.apply
    values: list[Any] = [frames, convolution.weight, convolution.bias]
    if torch.is_autocast_enabled("cpu"):
        values = [each if each is None else each.to(torch.get_autocast_dtype("cpu")) for each in values]
        return behind_in_torch(layer(stride, False, eps, *values), norm, has_gelu)  # type: ignore[no-untyped-call]
    parameters = [] if norm is None else [norm.weight, norm.bias]
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in [*values, *parameters]):
        output = layer(stride, has_gelu, eps, *values, *parameters)  # type: ignore[no-untyped-call]
        return output
    frames, weight, bias = values
    before = convolved(frames.contiguous(), weight, bias, stride)
    return Behind(parameters, eps, has_gelu).write(before, before)


def behind_in_torch(output: Tensor, norm: nn.LayerNorm | None, has_gelu: bool) -> Tensor:
    output = output if norm is None else norm(output)
    return F.gelu(output) if has_gelu else output


def is_gelu(activation: nn.Module) -> bool:
    return isinstance(activation, GELUActivation) and activation.act is F.gelu
