"""Masks that reach convolutions and what normalizes over time, so that a padded utterance is what it is alone.

B batch, C channels, G groups, S inputs (samples or feature frames), T frames, D width.

The modules here take the place of upstream's by a swap of their class: parameters keep their names, copies copy.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder, Wav2Vec2GroupNormConvLayer

Steps = tuple[tuple[int, int, int], ...]
"""(kernel, stride, padding) of convolutions, one after the other."""


def step(convolution: nn.Module) -> Steps:
    """The one step of a convolution along its first axis, which is time."""
    kernel, stride, padding = (getattr(convolution, name)[0] for name in ("kernel_size", "stride", "padding"))
    return ((kernel, stride, padding),)


def output_lengths(lengths: Tensor, steps: Steps) -> Tensor:
    """(B,) lengths before convolutions -> (B,) lengths after them, 0 where not one kernel fits."""
    for kernel, stride, padding in steps:
        lengths = ((lengths + 2 * padding - kernel).div(stride, rounding_mode="floor") + 1).clamp(min=0)
    return lengths


def length_mask(lengths: Tensor, num_frames: int) -> Tensor:
    """(B,) lengths -> (B, num_frames), True where a frame is real."""
    return torch.arange(num_frames, device=lengths.device) < lengths[:, None]


class MaskedConv1d(nn.Conv1d):
    """A convolution that sees zeros behind each utterance, as it does in an utterance that ends there.

    lengths: (B,) of its input, or None where nothing is padded
    """

    lengths: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.lengths is not None:
            input = input.masked_fill(~length_mask(self.lengths, input.shape[-1])[:, None], 0.0)
        return super().forward(input)


class MaskedGroupNorm(nn.GroupNorm):
    """A group norm whose mean and variance are those of the real frames.

    lengths: (B,) of its input, or None where nothing is padded
    """

    lengths: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.lengths is None:
            return super().forward(input)
        frames = input.to(torch.promote_types(input.dtype, torch.float32)).unflatten(
            1, (self.num_groups, -1)
        )  # (B, G, C / G, T)
        padding = ~length_mask(self.lengths, input.shape[-1])[:, None, None]
        count = (self.lengths.clamp(min=1) * frames.shape[2])[:, None, None, None]
        centred = frames - frames.masked_fill(padding, 0.0).sum((2, 3), keepdim=True) / count
        variance = centred.masked_fill(padding, 0.0).square().sum((2, 3), keepdim=True) / count
        normalized = (centred * torch.rsqrt(variance + self.eps)).flatten(1, 2)
        return torch.addcmul(self.bias[:, None], normalized, self.weight[:, None]).to(input.dtype)


class Recomputed(nn.Module):
    """A layer that gradient checkpointing runs a second time: it hands its masked module the lengths of the first.

    masked: the name of that module
    """

    masked: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, lengths=self.get_submodule(self.masked).lengths, **kwargs)

    def forward(self, *args: Any, lengths: Tensor | None, **kwargs: Any) -> Any:
        self.get_submodule(self.masked).lengths = lengths  # type: ignore[assignment]
        return super().forward(*args, **kwargs)


class GuardedSpecAugment:
    """Upstream's SpecAugment, over real frames only, that leaves utterances alone which are no longer than a mask.

    Upstream raises where the whole batch is shorter, and SEW's masks padding too.

    lengths: (B,) of the frames that it masks, or None where nothing is padded
    """

    config: Any
    training: bool
    lengths: Tensor | None = None

    def _mask_hidden_states(
        self, hidden_states: Tensor, mask_time_indices: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Any:
        batch_size, num_frames, _ = hidden_states.shape
        if self.training and self.config.mask_time_prob > 0 and mask_time_indices is None:
            if num_frames <= self.config.mask_time_length:
                mask_time_indices = hidden_states.new_zeros(batch_size, num_frames, dtype=torch.bool)
            elif self.lengths is not None:
                maskable = self.lengths.masked_fill(self.lengths <= self.config.mask_time_length, 0)
                attention_mask = length_mask(maskable, num_frames)
        return super()._mask_hidden_states(hidden_states, mask_time_indices, attention_mask)  # type: ignore[misc]


class ZeroGradients(torch.autograd.Function):
    """Gives parameters that a step left out, such as a dropped layer's, a gradient of zero; frames pass as they are."""

    @staticmethod
    def forward(ctx: Any, frames: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return frames.view_as(frames)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(weight.new_zeros(()).expand_as(weight) for weight in ctx.saved_tensors)


class Masked(PreTrainedModel):
    """Mixin for an encoder of transformers: what it makes of an utterance does not depend on the padding behind it.

    front_end:     names of the submodules that turn inputs into what the first layer takes
    layerdrop:     the name of the configuration's value
    frame_steps:   from inputs to the frames that the layers see
    steps:         from inputs to the frames that come out
    masked_modules: what has to know the lengths of its input, by the steps before it
    """

    front_end: tuple[str, ...] = ("feature_extractor",)
    layerdrop_name = "layerdrop"
    frame_steps: Steps
    steps: Steps
    masked_modules: dict[Steps, list[Any]]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.set_up()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Upstream's, which makes every weight that it loads a trained one: what no forward uses is frozen again."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).set_up()
        return loaded

    def set_up(self) -> None:
        """Swaps the classes of what has to respect masks, and freezes what no forward uses."""
        self.masked_modules = {}
        self.frame_steps = self.steps = self.mask_modules()
        if isinstance(self, GuardedSpecAugment):
            self.tell(self, self.frame_steps)
        if getattr(self, "adapter", None) is not None:
            self.steps = self.mask_adapter(self.frame_steps)
        for owner in self.modules():
            if isinstance(owner, GuardedSpecAugment) and hasattr(owner, "masked_spec_embed"):
                used = getattr(self.config, "apply_spec_augment", True) and self.config.mask_time_prob > 0
                owner.masked_spec_embed.requires_grad_(used)

    def mask_modules(self) -> Steps:
        """Masks what is before and in the layers; returns the steps from inputs to frames."""
        raise NotImplementedError

    def mask_adapter(self, steps: Steps) -> Steps:
        """Masks the family's own adapter behind the layers; returns the steps from inputs to what it makes."""
        self.adapter.layerdrop = 0.0  # a dropped layer would leave its stride out, and the mask would not know
        for layer in self.adapter.layers:
            self.mask(layer.conv, MaskedConv1d, steps)
            steps += step(layer.conv)
        return steps

    def mask(self, module: nn.Module, kind: type[nn.Module], preceding: Steps) -> None:
        """Makes `module` one of `kind`, which is told the lengths of its input: those of the utterances after `preceding`."""
        module.__class__ = kind
        self.tell(module, preceding)

    def tell(self, module: Any, preceding: Steps) -> None:
        self.masked_modules.setdefault(preceding, []).append(module)

    def set_lengths(self, attention_mask: Tensor | None) -> None:
        for preceding, modules in self.masked_modules.items():
            lengths = None if attention_mask is None else output_lengths(attention_mask.sum(-1), preceding)
            for module in modules:
                module.lengths = lengths

    def masked_inputs(self, inputs: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and mask as upstream's forward has to have them."""
        return inputs, attention_mask

    def forward(self, inputs: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Upstream's forward; attention_mask: (B, S), 1 where an input is real."""
        inputs = kwargs.pop(self.main_input_name) if inputs is None else inputs
        self.set_lengths(attention_mask)
        try:
            if attention_mask is not None:
                inputs, attention_mask = self.masked_inputs(inputs, attention_mask)
            output = super().forward(inputs, attention_mask=attention_mask, **kwargs)
        finally:
            self.set_lengths(None)
        if not (self.training and getattr(self.config, self.layerdrop_name, 0.0) > 0 and torch.is_grad_enabled()):
            return output
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        frames = ZeroGradients.apply(output[0], *trained)  # type: ignore[no-untyped-call]
        if isinstance(output, tuple):
            return frames, *output[1:]
        output.last_hidden_state = frames
        return output

    def _get_feature_vector_attention_mask(
        self, feature_vector_length: int, attention_mask: Tensor, add_adapter: bool | None = None
    ) -> Tensor:
        """(B, S) mask of inputs -> (B, feature_vector_length) mask of frames; with add_adapter=False before the adapter."""
        steps = self.frame_steps if add_adapter is False else self.steps
        return length_mask(output_lengths(attention_mask.sum(-1), steps), feature_vector_length)

    def freeze_feature_encoder(self) -> None:
        """Stops the gradient of the front end."""
        for name in self.front_end:
            module = self.get_submodule(name)
            module.requires_grad_(False)
            if hasattr(module, "_requires_grad"):  # upstream asks for the gradient of its input by this
                module._requires_grad = False


def strided_convolution(frames: Tensor, convolution: nn.Conv1d) -> Tensor:
    """(B, T, C_in) -> (B, T_out, C_out), equal to `convolution` on the transposed input (no padding, no dilation)."""
    batch_size, num_frames, input_dim = frames.shape
    output_dim, _, kernel = convolution.weight.shape
    stride = convolution.stride[0]
    num_blocks = -(-kernel // stride)
    output_frames = (num_frames - kernel) // stride + 1
    needed = (output_frames + num_blocks - 1) * stride
    frames = F.pad(frames, (0, 0, 0, needed - num_frames))  # a negative width crops
    blocks = frames.reshape(batch_size, output_frames + num_blocks - 1, stride * input_dim)
    weight = F.pad(convolution.weight, (0, num_blocks * stride - kernel)).permute(2, 1, 0)  # (n·s, C_in, C_out)
    weight = weight.reshape(num_blocks, stride * input_dim, output_dim).transpose(0, 1).flatten(1)
    products = (blocks @ weight).unflatten(-1, (num_blocks, output_dim))
    output = sum(products[:, i : i + output_frames, i] for i in range(num_blocks))
    assert isinstance(output, Tensor)
    return output if convolution.bias is None else output + convolution.bias


class MatrixProductFeatureEncoder(Wav2Vec2FeatureEncoder):
    """A front end with layer norms, of any family, that computes (B, S) -> (B, C, T) by matrix products on CPUs."""

    def forward(self, input_values: Tensor) -> Tensor:
        if input_values.device.type != "cpu" or self.is_checkpointed():
            convolved: Tensor = super().forward(input_values)
            return convolved
        hidden_states = input_values[:, :, None]
        for layer in self.conv_layers:
            hidden_states = strided_convolution(hidden_states, layer.conv)
            hidden_states = layer.activation(layer.layer_norm(hidden_states))
        return hidden_states.transpose(1, 2)

    def is_checkpointed(self) -> bool:
        return any(layer.gradient_checkpointing and layer.training for layer in self.conv_layers)


class MaskedGroupNormConvLayer(Recomputed, Wav2Vec2GroupNormConvLayer):
    """The first layer of a front end with a group norm, of any family."""

    masked = "layer_norm"


def mask_front_end(encoder: Masked, feature_encoder: Any) -> Steps:
    """Masks the convolutional front end of a family like wav2vec2; returns its steps."""
    steps: Steps = sum((step(layer.conv) for layer in feature_encoder.conv_layers), ())
    norms = [getattr(layer, "layer_norm", None) for layer in feature_encoder.conv_layers]
    if isinstance(norms[0], nn.GroupNorm):
        feature_encoder.conv_layers[0].__class__ = MaskedGroupNormConvLayer
        encoder.mask(norms[0], MaskedGroupNorm, steps[:1])
    elif all(isinstance(norm, nn.LayerNorm) for norm in norms):
        feature_encoder.__class__ = MatrixProductFeatureEncoder
    return steps
