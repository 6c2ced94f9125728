"""Packing: an encoder computes a batch without its padding, and gives the same frames.

Convolutions and attention compute utterance by utterance; the rest of a layer computes all real frames as one long utterance.
Mixins replace the classes of modules of `transformers`, so parameters keep their names.

B batch, S samples, C channels, T frames, N real frames of all utterances, D width, H heads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel

from sedtrain.errors import UserError
from sedtrain.models.mixins import Strides, mix_into, output_lengths
from sedtrain.models.no_sync_masks import is_traced

PRODUCTS_OF_AN_UTTERANCE = 2**28
"""Cost of computing an utterance by itself, in products: forward and backward calls take some milliseconds."""
STATES = ("output_hidden_states", "output_attentions")


@dataclass(frozen=True)
class Lengths:
    """Numbers of inputs and frames of each utterance in a batch; num_frames: of the padded batch."""

    inputs: list[int]
    frames: list[int]
    num_frames: int

    @property
    def padding(self) -> int:
        """Number of padded frames in the batch."""
        return len(self.frames) * self.num_frames - sum(self.frames)

    @property
    def real(self) -> list[int]:
        """Numbers of frames, without the utterances that have none."""
        return [length for length in self.frames if length]

    def one_by_one(self, function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """(B, ..., S) -> (1, N, D), by a function of one utterance (1, ..., S) -> (1, T, D)."""
        rows = zip(inputs, self.inputs, self.frames, strict=True)
        return torch.cat([function(row[None, ..., :length]) for row, length, has_frames in rows if has_frames], 1)

    def pack(self, frames: Tensor) -> Tensor:
        """(B, T, D) -> (1, N, D)"""
        return torch.cat([row[:length] for row, length in zip(frames.unbind(0), self.frames, strict=True)])[None]

    def unpack(self, frames: Tensor) -> Tensor:
        """(1, N, D) -> (B, T, D), zeros after the end of an utterance."""
        rows = pad_sequence(frames[0].split(self.frames), batch_first=True)
        return nn.functional.pad(rows, (0, 0, 0, self.num_frames - rows.shape[1]))

    def for_attention(self, config: PreTrainedConfig, device: torch.device) -> dict[str, Any]:
        """Arguments that layers pass to attention: lengths, or the borders of utterances for FlashAttention's packed form."""
        if config._attn_implementation != "flash_attention_2":
            return {"packed": self.real}
        borders = torch.tensor([0, *self.real]).cumsum(0, dtype=torch.int32).to(device)
        arguments = {"cu_seq_lens": borders, "max_length": max(self.real)}
        return {f"{name}_{side}": value for name, value in arguments.items() for side in "qk"}


class OneByOne(nn.Module):
    """Mixin for attention: with `packed`, the lengths of utterances, (1, N, D) is split and each one attends to itself."""

    def forward(self, hidden_states: Tensor, *args: Any, packed: list[int] | None = None, **kwargs: Any) -> Any:
        forward: Any = super().forward
        if packed is None:
            return forward(hidden_states, *args, **kwargs)
        utterances = hidden_states.split(packed, 1)
        return torch.cat([forward(frames, *args, **kwargs)[0] for frames in utterances], 1), None


class OneByOneFromDistances(nn.Module):
    """Mixin for WavLM's attention, whose first layer computes the relative position bias (H, T, T) of all layers."""

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        position_bias: Tensor | None = None,
        packed: list[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        forward: Any = super().forward
        if packed is None:
            return forward(hidden_states, *args, position_bias=position_bias, **kwargs)
        if position_bias is None:
            position_bias = self.compute_bias(max(packed), max(packed))  # type: ignore[operator]
        outputs = [
            forward(frames, *args, position_bias=position_bias[:, :length, :length], **kwargs)[0]
            for frames, length in zip(hidden_states.split(packed, 1), packed, strict=True)
        ]
        return torch.cat(outputs, 1), None, position_bias


class Packable:
    """Mixin for a module that can compute a packed batch.

    packed: lengths of the packed batch; None for a padded one
    """

    packed: Lengths | None = None


class PackableFrontEnd(Packable, nn.Module):
    """Mixin for a convolutional front end: (B, S) -> (B, C, T), zeros after the end of an utterance."""

    def forward(self, input_values: Tensor) -> Tensor:
        forward: Any = super().forward
        if self.packed is None:
            convolved: Tensor = forward(input_values)
            return convolved
        frames = self.packed.one_by_one(lambda row: forward(row).transpose(1, 2), input_values)
        return self.packed.unpack(frames).transpose(1, 2)


class PackablePositions(Packable, nn.Module):
    """Mixin for a convolutional position embedding: (1, N, D) -> (1, N, D)"""

    def forward(self, hidden_states: Tensor) -> Tensor:
        forward: Any = super().forward
        if self.packed is None:
            embedded: Tensor = forward(hidden_states)
            return embedded
        with parametrize.cached():  # computes the weight norm once, not for each utterance
            return torch.cat([forward(frames) for frames in hidden_states.split(self.packed.real, 1)], 1)


class PackableLayers(Packable, nn.Module):
    """Mixin for the position embedding and layers of an encoder: (B, T, D) -> (B, T, D)"""

    config: Any

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        forward: Any = super().forward
        if self.packed is None:
            return forward(hidden_states, attention_mask, **kwargs)
        options = self.packed.for_attention(self.config, hidden_states.device)
        output = forward(self.packed.pack(hidden_states), None, **options, **kwargs)
        output.last_hidden_state = self.packed.unpack(output.last_hidden_state)
        return output


class Packing(PreTrainedModel):
    """Mixin for a wav2vec2-like encoder that can compute a batch without its padding.

    `config.packing` is "never" (also if absent), "always", or "auto": on CPUs, for batches where packing saves time.

    products: multiplications with weights for one output frame
    """

    attention: type[nn.Module] = OneByOne
    frame_steps: Strides
    packable: list[Any]
    products: int

    def set_up(self) -> None:
        super().set_up()
        self.mix_in()
        self.packable = [module for module in self.modules() if isinstance(module, Packable)]
        self.products = products_of_a_frame(self)

    def mix_in(self) -> None:
        """Mixes packing into the modules that need to know where an utterance ends."""
        mix_into(self.feature_extractor, PackableFrontEnd)
        mix_into(self.encoder, PackableLayers)
        mix_into(self.encoder.pos_conv_embed, PackablePositions)
        for layer in self.encoder.layers:
            mix_into(layer.attention, self.attention)

    def forward(self, inputs: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        source = kwargs[self.main_input_name] if inputs is None else inputs
        lengths = self.lengths_to_pack(source, attention_mask, kwargs)
        if lengths is None:
            return super().forward(inputs, attention_mask, **kwargs)
        try:
            for module in self.packable:
                module.packed = lengths
            return super().forward(inputs, attention_mask, **kwargs)
        finally:
            for module in self.packable:
                module.packed = None

    def set_lengths(self, attention_mask: Tensor | None, device: torch.device) -> None:
        """Sets lengths as `Masked` does, except within modules that now compute utterances one by one, without padding."""
        super().set_lengths(attention_mask, device)
        for packable in self.packable:
            for module in packable.modules() if packable.packed is not None else ():
                if getattr(module, "lengths", None) is not None:
                    module.lengths = None

    def lengths_to_pack(
        self, inputs: Tensor, attention_mask: Tensor | None, options: Mapping[str, Any]
    ) -> Lengths | None:
        """Lengths of the batch if it is to be packed, else None."""
        choice = getattr(self.config, "packing", "never")
        if choice == "never" or why_not(self) or type(attention_mask) is not Tensor or is_traced(attention_mask):
            return None
        if choice == "auto" and inputs.device.type != "cpu":
            return None
        if any(options.get(name, getattr(self.config, name, False)) for name in STATES):
            return None  # states of a packed batch would have other shapes
        lengths = lengths_of(attention_mask, self.frame_steps)
        saved, cost = lengths.padding * self.products, len(lengths.frames) * PRODUCTS_OF_AN_UTTERANCE
        is_worthwhile = saved > cost if choice == "auto" else lengths.padding
        return lengths if lengths.real and is_worthwhile and not is_compiled(self) else None


def products_of_a_frame(encoder: nn.Module) -> int:
    """Multiplications for one output frame: weights of linear layers and convolutions, times the inputs that a frame needs."""
    products, times = 0, 1
    for module in reversed([module for module in encoder.modules() if isinstance(module, nn.Linear | nn.Conv1d)]):
        products += times * module.weight.numel()
        times *= module.stride[0] if isinstance(module, nn.Conv1d) else 1
    return products


def lengths_of(attention_mask: Tensor, steps: Strides) -> Lengths:
    inputs = torch.cat([attention_mask.sum(-1).cpu(), torch.tensor([attention_mask.shape[1]])])
    *frames, num_frames = output_lengths(inputs, steps).tolist()
    return Lengths(inputs[:-1].tolist(), frames, num_frames)


def why_not(encoder: Any, compiler: str | None = None) -> str | None:
    """The reason why an encoder, compiled if `compiler` is given, cannot pack; None if it can."""
    if compiler:
        return f"{compiler} would compile its layers for each length"
    if not isinstance(encoder, Packing):
        return "only encoders like wav2vec2 and whisper can leave it out"
    if getattr(encoder.config, "conv_pos_batch_norm", False):
        return "it has a batch norm over time"
    if encoder.config._attn_implementation == "flex_attention":
        return "FlexAttention is compiled for each length"
    return None


def choose_packing(encoder: Any, choice: str, compiler: str | None) -> None:
    """Sets `config.packing` of the encoder to `choice` or "never". Raises UserError if "always" is impossible."""
    reason = why_not(encoder, compiler)
    if choice == "always" and reason:
        wrong = f"the encoder, {encoder.config.model_type}, computes padding: {reason}"
        raise UserError("packing", choice, wrong, "write packing=auto")
    possible = "never" if reason else choice
    if possible != getattr(encoder.config, "packing", "never"):
        encoder.config.packing = possible


def fate_of_padding(encoder: Any, choice: str, compiler: str | None) -> str:
    """Text for people: what happens to padding, and why."""
    if choice == "never":
        return "computed, packing=never"
    if reason := why_not(encoder, compiler):
        return f"computed by the encoder: {reason}"
    return "left out by the encoder" + ("" if choice == "always" else " on CPUs, where that takes less time")


def is_compiled(encoder: nn.Module) -> bool:
    return any(module._compiled_call_impl is not None for module in encoder.modules())
