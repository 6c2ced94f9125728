"""An encoder of `transformers` with masked convolutions and norms: padding changes no frame of an utterance.

Mixins replace the classes of modules, so parameters keep their names.

B batch, C channels, S inputs (samples or feature frames), T frames.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder

from sedtrain.models.convolution import is_gelu, strided_convolution
from sedtrain.models.mixins import (
    GuardedSpecAugment,
    MaskedConv1d,
    MaskedGroupNorm,
    Recomputed,
    Strides,
    length_mask,
    mix_into,
    on_device,
    output_lengths,
    step,
    with_zero_gradients,
)

ADAPTER_CONVOLUTIONS = ("conv", "residual_conv", "self_attn_conv")
"""Names, in a layer of a family's own adapter, of the convolutions that read the layer's input."""


class Masked(PreTrainedModel):
    """Mixin for an encoder of `transformers`: padding after an utterance does not change its frames.

    front_end:      names of the submodules before the first layer
    whole:          the sequence-to-sequence class with this encoder, if `transformers` has no class for the encoder alone
    frame_steps:    from inputs to the frames that the layers read
    steps:          from inputs to the output frames
    masked_modules: modules that need the lengths of their input, by the steps before them
    """

    front_end: tuple[str, ...] = ("feature_extractor",)
    whole: type[PreTrainedModel] | None = None
    frame_steps: Strides
    steps: Strides
    masked_modules: dict[Strides, list[Any]]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.set_up()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Loads as upstream does, then freezes again what no forward uses: upstream unfreezes every weight that it loads."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).set_up()
        return loaded

    def set_up(self) -> None:
        """Mixes masks into the modules that need them, and freezes what no forward uses."""
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

    def mask_modules(self) -> Strides:
        """Masks the front end and the layers; returns the steps from inputs to frames."""
        return mask_front_end(self, self.feature_extractor) if hasattr(self, "feature_extractor") else ()

    def mask_adapter(self, steps: Strides) -> Strides:
        """Masks the family's own adapter; returns the steps from inputs to its output."""
        self.adapter.layerdrop = 0.0  # a dropped layer would not apply its stride, which the mask counts
        for layer in self.adapter.layers:
            convolutions = [module for name, module in layer.named_children() if name in ADAPTER_CONVOLUTIONS]
            for convolution in convolutions:
                self.mask(convolution, MaskedConv1d, steps)
            steps += step(convolutions[0])
        return steps

    def mask(self, module: Any, kind: type, preceding: Strides) -> None:
        """Mixes `kind` into a module that reads its input after the steps `preceding`; each forward tells it their lengths."""
        mix_into(module, kind)
        self.masked_modules.setdefault(preceding, []).append(module)

    def set_lengths(self, attention_mask: Tensor | None, device: torch.device) -> None:
        """Sets `lengths` of the masked modules, on `device`; for SpecAugment, on the device of the mask."""
        for preceding, modules in self.masked_modules.items():
            lengths = None if attention_mask is None else output_lengths(attention_mask.sum(-1), preceding)
            for module in modules:
                module.lengths = lengths if module is self else on_device(lengths, device)

    def masked_inputs(self, inputs: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and mask for upstream's forward."""
        return inputs, attention_mask

    def forward(self, inputs: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Runs upstream's forward. attention_mask: (B, S), 1 where an input is real, on the CPU or the inputs' device."""
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
        """(B, S) mask of inputs -> (B, feature_vector_length) mask of frames; before the adapter if add_adapter=False."""
        steps = self.frame_steps if add_adapter is False else self.steps
        return length_mask(output_lengths(attention_mask.sum(-1), steps), feature_vector_length)

    def freeze_feature_encoder(self) -> None:
        for name in self.front_end:
            module = self.get_submodule(name)
            module.requires_grad_(False)
            if hasattr(module, "_requires_grad"):  # upstream would ask for the gradient of the input
                module._requires_grad = False


class MatrixProductFeatureEncoder(Wav2Vec2FeatureEncoder):
    """A convolutional front end, (B, S) -> (B, C, T). On CPUs it stores states frame by frame, which is faster."""

    def forward(self, input_values: Tensor) -> Tensor:
        if input_values.device.type != "cpu" or self.is_checkpointed():
            convolved: Tensor = super().forward(input_values)
            return convolved
        hidden_states = input_values[:, :, None]
        for layer in self.conv_layers:
            hidden_states = self.convolved(hidden_states, layer)
        return hidden_states.transpose(1, 2)

    def convolved(self, hidden_states: Tensor, layer: Any) -> Tensor:
        """(B, T, C) -> (B, T', C) by one layer."""
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


def mask_front_end(encoder: Masked, feature_encoder: Any) -> Strides:
    """Masks a front end like wav2vec2's; returns its steps."""
    steps: Strides = sum((step(layer.conv) for layer in feature_encoder.conv_layers), ())
    norms = [getattr(layer, "layer_norm", None) for layer in feature_encoder.conv_layers]
    if isinstance(norms[0], nn.GroupNorm):
        encoder.mask(norms[0], MaskedGroupNorm, steps[:1])
        mix_into(feature_encoder.conv_layers[0], Recomputed)
        feature_encoder.conv_layers[0].masked = "layer_norm"
    mix_into(feature_encoder, MatrixProductFeatureEncoder)
    return steps
