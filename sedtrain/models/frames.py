"""Small encoders like wav2vec 2.0's without the module calls of `forward`, for decoding on a CPU in float32.

Weights are copied once into the layout in which few frames are multiplied fastest; copies of a large encoder's would cost
memory.

B batch, S samples, T frames, C channels, D width, H heads.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from sedtrain.models.convolution import tap_views
from sedtrain.models.encoder import EncodedSpeech, frame_mask, frame_spacing
from sedtrain.models.masking import length_mask, output_lengths
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.models.steps import Function, kept, normed, side_by_side

MOST_WEIGHTS = 2**24
STACK, POSITIONS = {"pos_conv_embed", "layer_norm", "dropout", "layers"}, {"conv", "padding", "activation"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "out_proj"}
LAYER = {"attention", "dropout", "layer_norm", "feed_forward", "final_layer_norm"}


class Convolution:
    """(B, T, C) -> (B, T', C') as sums of matrix products of views, which copy no frame."""

    def __init__(self, convolution: nn.Conv1d) -> None:
        weight, [self.kernel], [self.stride] = convolution.weight, convolution.kernel_size, convolution.stride
        self.bias = weight.new_zeros(len(weight)) if convolution.bias is None else convolution.bias
        self.taps = weight.permute(2, 1, 0).flatten(0, 1).contiguous().split(self.stride * weight.shape[1])

    def __call__(self, frames: Tensor) -> Tensor:
        num_frames = (frames.shape[1] - self.kernel) // self.stride + 1
        output = frames.new_empty(len(frames), num_frames, len(self.bias))
        for row, products in zip(frames.contiguous(), output, strict=True):
            windows = tap_views(row, num_frames, self.kernel, self.stride)
            torch.addmm(self.bias, windows[0], self.taps[0], out=products)
            for window, taps in zip(windows[1:], self.taps[1:], strict=True):
                products.addmm_(window, taps)
        return output


class Positions:
    """(B, T, D) -> (B, T, D), the grouped convolution by which frames learn where they are, its weight norm computed."""

    def __init__(self, embedding: Any) -> None:
        refuse_other_parts(embedding, POSITIONS)
        convolution, self.activation = embedding.conv, embedding.activation
        self.weight, self.bias = convolution.weight.detach()[:, :, None], convolution.bias
        self.padding, self.groups = (0, *convolution.padding), convolution.groups

    def __call__(self, frames: Tensor) -> Tensor:
        image = frames.transpose(1, 2)[:, :, None]  # oneDNN reads the frames where they lie
        positions = torch.conv2d(image, self.weight, self.bias, padding=self.padding, groups=self.groups)
        return self.activation(positions[:, :, 0, : frames.shape[1]].transpose(1, 2))  # type: ignore[no-any-return]


@dataclass
class EncoderLayer:
    """One layer as functions; before: its norms stand before attention and feed-forward, not behind."""

    num_heads: int
    attend_in: Function
    attend_out: Function
    feed_in: Function
    activation: Function
    feed_out: Function
    norms: tuple[Function, Function]
    before: bool

    @classmethod
    def of(cls, layer: Any, before: bool) -> "EncoderLayer":
        refuse_other_parts(layer, LAYER)
        own, feed = layer.attention, layer.feed_forward
        refuse_other_parts(own, ATTENTION)
        return cls(
            own.num_heads,
            side_by_side(own.q_proj, own.k_proj, own.v_proj),
            side_by_side(own.out_proj),
            side_by_side(feed.intermediate_dense),
            feed.intermediate_act_fn,
            side_by_side(feed.output_dense),
            (normed(layer.layer_norm), normed(layer.final_layer_norm)),
            before,
        )

    def __call__(self, states: Tensor, batch_size: int, mask: Tensor | None) -> Tensor:
        """(B · T, D) -> (B · T, D); mask: (B, 1, 1, T), False where a frame is padding."""
        if self.before:
            states = states + self.attend(self.norms[0](states), batch_size, mask)
            return states + self.feed(self.norms[1](states))
        states = self.norms[0](states + self.attend(states, batch_size, mask))
        return self.norms[1](states + self.feed(states))

    def attend(self, states: Tensor, batch_size: int, mask: Tensor | None) -> Tensor:
        heads = self.attend_in(states).view(batch_size, -1, 3, self.num_heads, states.shape[1] // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        rows = scaled_dot_product_attention(query, key, value, mask)
        return self.attend_out(rows.transpose(1, 2).reshape(states.shape))

    def feed(self, states: Tensor) -> Tensor:
        return self.feed_out(self.activation(self.feed_in(states)))


class Frames:
    """An encoder as functions. Raises AttributeError for one that is large, or has other parts."""

    def __init__(self, encoder: Any) -> None:
        stack, projection = encoder.encoder, encoder.feature_projection
        weights = list(encoder.parameters())
        if sum(each.numel() for each in weights) > MOST_WEIGHTS or getattr(encoder, "adapter", None) is not None:
            raise AttributeError("large or adapted")
        refuse_other_parts(stack, STACK)
        self.steps = encoder.frame_steps
        self.front_end = [
            (Convolution(each.conv), normed(each.layer_norm), each.activation)
            for each in encoder.feature_extractor.conv_layers
        ]
        if not all(isinstance(each.layer_norm, nn.LayerNorm) for each in encoder.feature_extractor.conv_layers):
            raise AttributeError("a norm over time")
        norm = getattr(projection, "layer_norm", None)
        self.projection = [*([] if norm is None else [normed(norm)]), side_by_side(projection.projection)]
        self.positions, self.norm = Positions(stack.pos_conv_embed), normed(stack.layer_norm)
        self.before = bool(encoder.config.do_stable_layer_norm)
        self.layers = [EncoderLayer.of(each, self.before) for each in stack.layers]

    def __call__(self, inputs: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, S) samples and their mask, None where nothing is padded -> (B, T, D)"""
        frames, mask = inputs[..., None], None
        for convolution, norm, activation in self.front_end:
            frames = activation(norm(convolution(frames)))
        shape, states = frames.shape[:2], frames.flatten(0, 1)
        for function in self.projection:
            states = function(states)
        if attention_mask is not None:
            mask = length_mask(output_lengths(attention_mask.sum(-1), self.steps), shape[1])
            states = states.masked_fill(~mask.flatten()[:, None], 0.0)
            mask = (mask | ~mask.any(1, keepdim=True))[:, None, None]  # attention over nothing is NaN
        states = states + self.positions(states.view(*shape, -1)).flatten(0, 1)
        states = states if self.before else self.norm(states)
        for layer in self.layers:
            states = layer(states, len(frames), mask)
        return (self.norm(states) if self.before else states).view(*shape, -1)


def refuse_other_parts(module: nn.Module, names: set[str]) -> None:
    if {name for name, child in module.named_children() if name != "parametrizations"} != names:
        raise AttributeError(f"other parts than {names}")


# --- encoding


def encode(model: SpeechEncoderDecoder, inputs: Tensor, attention_mask: Tensor | None) -> EncodedSpeech:
    """What `model.encode` returns; by functions where the encoder is small and they compute what it does."""
    encoder = model.encoder
    is_plain = inputs.device.type == "cpu" and inputs.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    is_plain &= not any("forward" in vars(module) for module in (encoder, *encoder.children()))  # by cached features
    frames_of: Frames | None = kept(encoder, Frames, partial(agree, encoder)) if is_plain else None
    if frames_of is None:
        return model.encode(inputs, attention_mask)
    return model.adapt({"last_hidden_state": frames_of(inputs, attention_mask)}, attention_mask)


@torch.inference_mode()
def agree(encoder: PreTrainedModel, frames_of: Frames) -> bool:
    """True if the functions give the frames of the encoder, with noise for audio."""
    audio = torch.randn(2, 10 * frame_spacing(encoder)[0], generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(audio, dtype=torch.long)
    mask[1, len(mask[1]) // 2 :] = 0
    was_training = encoder.training
    expected = encoder.eval()(audio, attention_mask=mask).last_hidden_state
    encoder.train(was_training)
    found, real = frames_of(audio, mask), frame_mask(encoder, expected.shape[1], mask)
    return bool(
        (found - expected)[real].abs().max() <= 0.1 * torch.finfo(found.dtype).eps ** 0.5 * expected.abs().max()
    )
