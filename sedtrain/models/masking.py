"""Masks for convolutions and for norms over time: a padded utterance has the frames that it has alone.

The classes here are mixed into modules of `transformers`, whose parameters keep their names.

B batch, C channels, G groups, S inputs (samples or feature frames), T frames, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder, _compute_mask_indices

from sedtrain.models.convolution import is_gelu, strided_convolution
from sedtrain.models.mixing import mix_into

Steps = tuple[tuple[int, int, int], ...]
"""(kernel, stride, padding) of convolutions, one after the other."""
READ_THE_INPUT = ("conv", "residual_conv", "self_attn_conv")
"""Names of convolutions that read the input of a layer of a family's own adapter."""


def step(convolution: nn.Module) -> Steps:
    """The step of a convolution along its first axis, which is time."""
    kernel, stride, padding = (getattr(convolution, name)[0] for name in ("kernel_size", "stride", "padding"))
    return ((kernel, stride, padding),)


def output_lengths(lengths: Tensor, steps: Steps) -> Tensor:
    """(B,) lengths before convolutions -> (B,) lengths after them, 0 if not one kernel fits."""
    for kernel, stride, padding in steps:
        lengths = ((lengths + 2 * padding - kernel).div(stride, rounding_mode="floor") + 1).clamp(min=0)
    return lengths


def length_mask(lengths: Tensor, num_frames: int) -> Tensor:
    """(B,) lengths -> (B, num_frames), True where a frame is real."""
    return torch.arange(num_frames, device=lengths.device) < lengths[:, None]


def on_device(mask: Tensor | None, device: torch.device) -> Tensor | None:
    """The mask, or lengths, on that device; the host does not wait for the copy."""
    return None if mask is None else mask.to(device, non_blocking=True)


class MaskedConv1d(nn.Conv1d):
    """A convolution that sees zeros behind each utterance, as if the utterance ended there.

    lengths: (B,) of its input, or None if nothing is padded
    """

    lengths: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.lengths is not None:
            input = input.masked_fill(~length_mask(self.lengths, input.shape[-1])[:, None], 0.0)
        return super().forward(input)


class MaskedGroupNorm(nn.GroupNorm):
    """A group norm with the mean and variance of the real frames.

    lengths: (B,) of its input, or None if nothing is padded
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
        """(B, T, C), every channel a group -> (B, T, C), zeros where padded; on CPUs faster than `forward`."""
        if torch.compiler.is_compiling() or type(frames) is not Tensor:  # lengths are not known where JAX traces
            return self.forward(frames.transpose(1, 2)).transpose(1, 2)
        num_frames, dim = frames.shape[1:]
        lengths = [num_frames] * len(frames) if self.lengths is None else self.lengths.clamp(min=1).tolist()
        pieces = []
        for row, length in zip(frames, lengths, strict=True):
            norm = torch.batch_norm(row[:length], self.weight, self.bias, None, None, True, 0.0, self.eps, False)
            pieces += [norm, row.new_zeros(num_frames - length, dim)]
        return torch.cat(pieces).view_as(frames)


class Recomputed(nn.Module):
    """Mixin for a layer whose masked module keeps its lengths when gradient checkpointing runs the layer a second time.

    masked: the name of that module
    """

    masked: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, lengths=self.get_submodule(self.masked).lengths, **kwargs)

    def forward(self, *args: Any, lengths: Tensor | None, **kwargs: Any) -> Any:
        self.get_submodule(self.masked).lengths = lengths  # type: ignore[assignment]
        return super().forward(*args, **kwargs)


class GuardedSpecAugment:
    """SpecAugment over real frames only; it leaves utterances alone that are no longer than one mask.

    Upstream raises an error if the whole batch is that short, and SEW masks padding too.

    lengths: (B,) of the frames that it masks, or None if nothing is padded
    """

    config: Any
    training: bool
    masked_spec_embed: Tensor
    lengths: Tensor | None = None

    def _mask_hidden_states(
        self, hidden_states: Tensor, mask_time_indices: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Any:
        """Upstream's result, whose positions the host knows: upstream would wait for the device to find them."""
        config, (batch_size, num_frames, dim) = self.config, hidden_states.shape
        if not (self.training and getattr(config, "apply_spec_augment", True)):
            return super()._mask_hidden_states(hidden_states, mask_time_indices, attention_mask)  # type: ignore[misc]
        if mask_time_indices is None and config.mask_time_prob > 0 and num_frames > config.mask_time_length:
            mask_time_indices = self.spans((batch_size, num_frames), "time")
        if mask_time_indices is not None:
            rows, frames = (each.to(hidden_states.device, non_blocking=True) for each in mask_time_indices.nonzero().T)
            hidden_states[rows, frames] = self.masked_spec_embed.to(hidden_states.dtype)
        if config.mask_feature_prob > 0:
            features = self.spans((batch_size, dim), "feature").to(hidden_states.device, non_blocking=True)
            hidden_states = hidden_states.masked_fill(features[:, None], 0.0)
        return hidden_states

    def spans(self, shape: tuple[int, int], axis: str) -> Tensor:
        """(B, T) or (B, D), True where random spans of `config` lie, in the host's memory."""
        length, real = getattr(self.config, f"mask_{axis}_length"), None
        if axis == "time" and self.lengths is not None:
            real = length_mask(self.lengths.masked_fill(self.lengths <= length, 0), shape[1])
        probability, least = (getattr(self.config, f"mask_{axis}_{name}") for name in ("prob", "min_masks"))
        return torch.from_numpy(_compute_mask_indices(shape, probability, length, real, least))


class ZeroGradients(torch.autograd.Function):
    """Returns the frames unchanged, and gives the parameters a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, frames: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return frames.view_as(frames)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(weight.new_zeros(()).expand_as(weight) for weight in ctx.saved_tensors)


def with_zero_gradients(frames: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The same frames; parameters that the step does not use, such as those of a dropped layer, get a gradient of zero."""
    if not parameters:
        return frames
    passed: Tensor = ZeroGradients.apply(frames, *parameters)  # type: ignore[no-untyped-call]
    return passed


class Masked(PreTrainedModel):
    """Mixin for an encoder of `transformers`: the frames of an utterance do not depend on the padding behind it.

    front_end:    names of the submodules before the first layer
    whole:        the sequence-to-sequence class that this is the encoder of, if `transformers` has no class for it alone
    frame_steps:  from inputs to the frames that the layers see
    steps:        from inputs to the output frames
    masked_modules: modules that need the lengths of their input, by the steps before them
    """

    front_end: tuple[str, ...] = ("feature_extractor",)
    whole: type[PreTrainedModel] | None = None
    frame_steps: Steps
    steps: Steps
    masked_modules: dict[Steps, list[Any]]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.set_up()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Upstream's, which unfreezes every weight that it loads: what no forward uses is frozen again."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).set_up()
        return loaded

    def set_up(self) -> None:
        """Swaps the classes of modules that have to respect masks, and freezes what no forward uses."""
        self.masked_modules = {}
        self.frame_steps = self.steps = self.mask_modules()
        if isinstance(self, GuardedSpecAugment):
            self.masked_modules.setdefault(self.frame_steps, []).append(self)
        if getattr(self, "adapter", None) is not None:
            self.steps = self.mask_adapter(self.frame_steps)
        for owner in self.modules():
            if isinstance(owner, GuardedSpecAugment) and hasattr(owner, "masked_spec_embed"):
                used = getattr(self.config, "apply_spec_augment", True) and self.config.mask_time_prob > 0
                owner.masked_spec_embed.requires_grad_(used)

    def mask_modules(self) -> Steps:
        """Masks the front end and the layers; returns the steps from inputs to frames."""
        return mask_front_end(self, self.feature_extractor) if hasattr(self, "feature_extractor") else ()

    def mask_adapter(self, steps: Steps) -> Steps:
        """Masks the family's own adapter behind the layers; returns the steps from inputs to its output."""
        self.adapter.layerdrop = 0.0  # the mask cannot know of a stride that was dropped
        for layer in self.adapter.layers:
            convolutions = [each for name, each in layer.named_children() if name in READ_THE_INPUT]
            for convolution in convolutions:
                self.mask(convolution, MaskedConv1d, steps)
            steps += step(convolutions[0])
        return steps

    def mask(self, module: Any, kind: type, preceding: Steps) -> None:
        """Mixes `kind` into a module, which gets the lengths of its input in every forward: those after `preceding`."""
        mix_into(module, kind)
        self.masked_modules.setdefault(preceding, []).append(module)

    def set_lengths(self, attention_mask: Tensor | None, device: torch.device) -> None:
        """Gives the modules the lengths of their input, on its device; SpecAugment gets them where the mask is."""
        for preceding, modules in self.masked_modules.items():
            lengths = None if attention_mask is None else output_lengths(attention_mask.sum(-1), preceding)
            for module in modules:
                module.lengths = lengths if module is self else on_device(lengths, device)

    def masked_inputs(self, inputs: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and mask as upstream's forward needs them."""
        return inputs, attention_mask

    def forward(self, inputs: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Upstream's forward; attention_mask: (B, S), 1 where an input is real, on its device or in the host's memory."""
        inputs = kwargs.pop(self.main_input_name) if inputs is None else inputs
        self.set_lengths(attention_mask, inputs.device)
        try:
            if attention_mask is not None:
                moved = attention_mask.to(inputs.device, non_blocking=True)
                inputs, attention_mask = self.masked_inputs(inputs, moved)
            output = super().forward(inputs, attention_mask=attention_mask, **kwargs)
        finally:
            self.set_lengths(None, inputs.device)
        drops_layers = any(rate for name, rate in vars(self.config).items() if name.endswith("layerdrop"))
        if not (drops_layers and self.training and torch.is_grad_enabled()):
            return output
        frames = with_zero_gradients(output[0], [weight for weight in self.parameters() if weight.requires_grad])
        if isinstance(output, tuple):
            return frames, *output[1:]
        output.last_hidden_state = frames
        return output

    def _get_feature_vector_attention_mask(
        self, feature_vector_length: int, attention_mask: Tensor, add_adapter: bool | None = None
    ) -> Tensor:
        """(B, S) mask of inputs -> (B, feature_vector_length) mask of frames; add_adapter=False: before the adapter."""
        steps = self.frame_steps if add_adapter is False else self.steps
        return length_mask(output_lengths(attention_mask.sum(-1), steps), feature_vector_length)

    def freeze_feature_encoder(self) -> None:
        """Stops the gradient of the front end."""
        for name in self.front_end:
            module = self.get_submodule(name)
            module.requires_grad_(False)
            if hasattr(module, "_requires_grad"):  # by which upstream asks for the gradient of the input
                module._requires_grad = False


class MatrixProductFeatureEncoder(Wav2Vec2FeatureEncoder):
    """A front end of any family: (B, S) -> (B, C, T), on CPUs frame by frame, which is faster."""

    def forward(self, input_values: Tensor) -> Tensor:
        if input_values.device.type != "cpu" or self.is_checkpointed():
            convolved: Tensor = super().forward(input_values)
            return convolved
        hidden_states = input_values[:, :, None]
        for layer in self.conv_layers:
            hidden_states = self.convolved(hidden_states, layer)
        return hidden_states.transpose(1, 2)

    def convolved(self, hidden_states: Tensor, layer: Any) -> Tensor:
        """(B, T, C) after a layer."""
        norm = getattr(layer, "layer_norm", None)
        if (norm is None or type(norm) is nn.LayerNorm) and is_gelu(layer.activation):
            return strided_convolution(hidden_states, layer.conv, norm, has_gelu=True)
        frames = strided_convolution(hidden_states, layer.conv)
        if isinstance(norm, MaskedGroupNorm):
            frames = norm.over_frames(frames)
        elif norm is not None:
            frames = norm(frames)
        activated: Tensor = layer.activation(frames)
        return activated

    def is_checkpointed(self) -> bool:
        return any(layer.gradient_checkpointing and layer.training for layer in self.conv_layers)


def mask_front_end(encoder: Masked, feature_encoder: Any) -> Steps:
    """Masks a convolutional front end like that of wav2vec2; returns its steps."""
    steps: Steps = sum((step(layer.conv) for layer in feature_encoder.conv_layers), ())
    norms = [getattr(layer, "layer_norm", None) for layer in feature_encoder.conv_layers]
    if isinstance(norms[0], nn.GroupNorm):
        encoder.mask(norms[0], MaskedGroupNorm, steps[:1])
        mix_into(feature_encoder.conv_layers[0], Recomputed)
        feature_encoder.conv_layers[0].masked = "layer_norm"
    mix_into(feature_encoder, MatrixProductFeatureEncoder)
    return steps
