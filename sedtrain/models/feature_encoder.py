"""The convolutional front end of wav2vec2 and its kin: masked, and as matrix products for CPUs.

B batch, S samples, T frames, C channels, k kernel, s stride, n = ceil(k / s) blocks of s frames that one kernel spans.

oneDNN's 1-d convolutions and the transposes around every LayerNorm cost most of a small model's step on a CPU. In (B, T, C)
layout a strided convolution is one matrix product of non-overlapping blocks (a view) followed by n shifted additions, and
LayerNorm needs no transpose. Parameters keep their names, so checkpoints are interchangeable with `transformers`.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder, Wav2Vec2GroupNormConvLayer

from sedtrain.models.masks import Masked, MaskedGroupNorm, Recomputed, Steps, step


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
