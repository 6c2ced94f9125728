"""Mixins for modules of `transformers`, mixed in place: convolutions, norms over time and SpecAugment that ignore padding.

B batch, C channels, G groups, T frames, D width.
"""

import copyreg
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

Strides = tuple[tuple[int, int, int], ...]
"""(kernel, stride, padding) of consecutive convolutions."""


class Mixed(type):
    """The type of mixed classes; pickle stores such a class as its mixin and its base."""


@cache
def mixed(mixin: Any, kind: Any) -> Any:
    """A subclass of both that keeps the name of `kind`: transformers, FSDP and LoRA recognise layers by class name."""
    return Mixed(kind.__name__, (mixin, kind), {"__module__": kind.__module__})


def mix_into(module: Any, mixin: Any) -> None:
    """Makes a module an instance of `mixin` too, unless it is one."""
    if not isinstance(module, mixin):
        kind: Any = type(module)
        module.__class__ = mixed(mixin, kind)


copyreg.pickle(Mixed, lambda kind: (mixed, kind.__bases__))


def step(convolution: nn.Module) -> Strides:
    """The step of one convolution along time, its first axis."""
    kernel, stride, padding = (getattr(convolution, name)[0] for name in ("kernel_size", "stride", "padding"))
    return ((kernel, stride, padding),)


def output_lengths(lengths: Tensor, steps: Strides) -> Tensor:
    """(B,) lengths before convolutions -> (B,) lengths after them; 0 for an input shorter than a kernel."""
    for kernel, stride, padding in steps:
        lengths = ((lengths + 2 * padding - kernel).div(stride, rounding_mode="floor") + 1).clamp(min=0)
    return lengths


def length_mask(lengths: Tensor, num_frames: int) -> Tensor:
    """(B,) lengths -> (B, num_frames), True where a frame is real."""
    return torch.arange(num_frames, device=lengths.device) < lengths[:, None]


def on_device(mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Copies a mask or lengths to the device; the host does not wait for the copy."""
    return None if mask is None else mask.to(device, non_blocking=True)


class MaskedConv1d(nn.Conv1d):
    """A convolution that reads zeros after the end of each utterance.

    lengths: (B,) of its input; None if nothing is padded
    """

    lengths: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.lengths is not None:
            input = input.masked_fill(~length_mask(self.lengths, input.shape[-1])[:, None], 0.0)
        return super().forward(input)


class MaskedGroupNorm(nn.GroupNorm):
    """A group norm whose mean and variance count only real frames.

    lengths: (B,) of its input; None if nothing is padded
    """

    lengths: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.lengths is None:
            return super().forward(input)
        frames = input.float() if input.dtype.itemsize < 4 else input
        frames = frames.unflatten(1, (self.num_groups, -1))  # (B, G, C / G, T)
        padding = ~length_mask(self.lengths, input.shape[-1])[:, None, None]
        count = (self.lengths.clamp(min=1) * frames.shape[2])[:, None, None, None]
        centred = frames - frames.masked_fill(padding, 0.0).sum((2, 3), keepdim=True) / count
        variance = centred.masked_fill(padding, 0.0).square().sum((2, 3), keepdim=True) / count
        normalized = (centred * torch.rsqrt(variance + self.eps)).flatten(1, 2)
        return torch.addcmul(self.bias[:, None], normalized, self.weight[:, None]).to(input.dtype)

    def over_frames(self, frames: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C), zeros where padded; every channel is a group. Faster than `forward` on CPUs."""
        if torch.compiler.is_compiling() or type(frames) is not Tensor:  # while JAX traces, lengths are unknown
            return self.forward(frames.transpose(1, 2)).transpose(1, 2)
        num_frames, dim = frames.shape[1:]
        lengths = [num_frames] * len(frames) if self.lengths is None else self.lengths.clamp(min=1).tolist()
        pieces = []
        for row, length in zip(frames, lengths, strict=True):
            normalized = torch.batch_norm(row[:length], self.weight, self.bias, None, None, True, 0.0, self.eps, False)
            pieces += [normalized, row.new_zeros(num_frames - length, dim)]
        return torch.cat(pieces).view_as(frames)


class Recomputed(nn.Module):
    """Mixin for a layer with a masked module: gradient checkpointing runs the layer again, with the lengths of its first run.

    masked: name of the masked module
    """

    masked: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, lengths=self.get_submodule(self.masked).lengths, **kwargs)

    def forward(self, *args: Any, lengths: Tensor | None, **kwargs: Any) -> Any:
        self.get_submodule(self.masked).lengths = lengths  # type: ignore[assignment]
        return super().forward(*args, **kwargs)


class GuardedSpecAugment:
    """SpecAugment over real frames only, which skips utterances no longer than one mask.

    Upstream raises an error if the whole batch is that short, and SEW masks padding too.

    lengths: (B,) of the frames to mask; None if nothing is padded
    """

    config: Any
    training: bool
    masked_spec_embed: Tensor
    lengths: Tensor | None = None

    def _mask_hidden_states(
        self, hidden_states: Tensor, mask_time_indices: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Any:
        """Gives upstream's result. It finds the masked positions on the host; upstream makes the host wait for the device."""
        config, (batch_size, num_frames, dim) = self.config, hidden_states.shape
        if not (self.training and getattr(config, "apply_spec_augment", True)):
            return super()._mask_hidden_states(hidden_states, mask_time_indices, attention_mask)  # type: ignore[misc]
        if mask_time_indices is None and config.mask_time_prob > 0 and num_frames > config.mask_time_length:
            mask_time_indices = self.spans((batch_size, num_frames), "time")
        if mask_time_indices is not None:
            indices = mask_time_indices.nonzero().T
            rows, frames = (index.to(hidden_states.device, non_blocking=True) for index in indices)
            hidden_states[rows, frames] = self.masked_spec_embed.to(hidden_states.dtype)
        if config.mask_feature_prob > 0:
            features = self.spans((batch_size, dim), "feature").to(hidden_states.device, non_blocking=True)
            hidden_states = hidden_states.masked_fill(features[:, None], 0.0)
        return hidden_states

    def spans(self, shape: tuple[int, int], axis: str) -> Tensor:
        """(B, T) or (B, D) mask of random spans, by the settings in `config`; on the CPU."""
        length, real = getattr(self.config, f"mask_{axis}_length"), None
        if axis == "time" and self.lengths is not None:
            real = length_mask(self.lengths.masked_fill(self.lengths <= length, 0), shape[1])
        probability, min_masks = (getattr(self.config, f"mask_{axis}_{name}") for name in ("prob", "min_masks"))
        return torch.from_numpy(_compute_mask_indices(shape, probability, length, real, min_masks))


class ZeroGradients(torch.autograd.Function):
    """Returns the frames unchanged; in the backward pass, gives the parameters zero gradients."""

    @staticmethod
    def forward(ctx: Any, frames: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return frames.view_as(frames)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(weight.new_zeros(()).expand_as(weight) for weight in ctx.saved_tensors)


def with_zero_gradients(frames: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Returns the frames; the parameters get zero gradients where the step does not use them, as in a dropped layer."""
    if not parameters:
        return frames
    same_frames: Tensor = ZeroGradients.apply(frames, *parameters)  # type: ignore[no-untyped-call]
    return same_frames
