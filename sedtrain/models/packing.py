"""Utterances of a batch one by one in an encoder's convolutions and attention, behind one another in the rest of its layers.

So nothing is computed for padding, and an utterance has the frames that it has in a padded batch. The classes here replace the
class of a module of `transformers`, so that its parameters keep their names.

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
from sedtrain.models.masked_modules import Steps, output_lengths
from sedtrain.models.mixing import mix_into
from sedtrain.models.unread_masks import is_traced

PRODUCTS_OF_AN_UTTERANCE = 2**28
"""What computing an utterance by itself costs, in products: some milliseconds of calls, forward and backward."""
STATES = ("output_hidden_states", "output_attentions")


@dataclass(frozen=True)
class Lengths:
    """Inputs and frames of each utterance of a batch; its longest has `num_frames`."""

    inputs: list[int]
    frames: list[int]
    num_frames: int

    @property
    def padding(self) -> int:
        """Frames of all utterances that are padding."""
        return len(self.frames) * self.num_frames - sum(self.frames)

    @property
    def real(self) -> list[int]:
        """Without the utterances that have no frame."""
        return [length for length in self.frames if length]

    def one_by_one(self, function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """(B, ..., S) -> (1, N, D), by a function of one utterance."""
        rows = zip(inputs, self.inputs, self.frames, strict=True)
        return torch.cat([function(row[None, ..., :length]) for row, length, has_frames in rows if has_frames], 1)

    def behind_one_another(self, frames: Tensor) -> Tensor:
        """(B, T, D) -> (1, N, D)"""
        return torch.cat([row[:length] for row, length in zip(frames.unbind(0), self.frames, strict=True)])[None]

    def apart(self, frames: Tensor) -> Tensor:
        """(1, N, D) -> (B, T, D), zeros where an utterance has ended."""
        rows = pad_sequence(frames[0].split(self.frames), batch_first=True)
        return nn.functional.pad(rows, (0, 0, 0, self.num_frames - rows.shape[1]))

    def for_attention(self, config: PreTrainedConfig, device: torch.device) -> dict[str, Any]:
        """What layers hand to attention: lengths, or the borders of utterances where FlashAttention takes all at once."""
        if config._attn_implementation != "flash_attention_2":
            return {"packed": self.real}
        borders = torch.tensor([0, *self.real]).cumsum(0, dtype=torch.int32).to(device)
        of_all = {"cu_seq_lens": borders, "max_length": max(self.real)}
        return {f"{name}_{side}": value for name, value in of_all.items() for side in "qk"}


class OneByOne(nn.Module):
    """Mixin for attention: with `packed`, (1, N, D) are utterances of these lengths."""

    def forward(self, hidden_states: Tensor, *args: Any, packed: list[int] | None = None, **kwargs: Any) -> Any:
        forward: Any = super().forward
        if packed is None:
            return forward(hidden_states, *args, **kwargs)
        return torch.cat([forward(each, *args, **kwargs)[0] for each in hidden_states.split(packed, 1)], 1), None


class OneByOneFromDistances(nn.Module):
    """Mixin for WavLM's attention, whose first layer makes the biases of distances, (H, T, T), for all layers."""

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
        pairs = [(each, position_bias[:, : each.shape[1], : each.shape[1]]) for each in hidden_states.split(packed, 1)]
        outputs = [forward(frames, *args, position_bias=bias, **kwargs)[0] for frames, bias in pairs]
        return torch.cat(outputs, 1), None, position_bias


class Packable:
    """Mixin for a module of which a forward pass may be that of a packed batch.

    packed: its lengths; None: a batch is computed with its padding
    """

    packed: Lengths | None = None


class PackableFrontEnd(Packable, nn.Module):
    """Mixin for a convolutional front end: (B, S) -> (B, C, T), zeros where an utterance has ended."""

    def forward(self, input_values: Tensor) -> Tensor:
        forward: Any = super().forward
        if self.packed is None:
            convolved: Tensor = forward(input_values)
            return convolved
        frames = self.packed.one_by_one(lambda row: forward(row).transpose(1, 2), input_values)
        return self.packed.apart(frames).transpose(1, 2)


class PackablePositions(Packable, nn.Module):
    """Mixin for a position embedding by convolutions: (1, N, D) -> (1, N, D)"""

    def forward(self, hidden_states: Tensor) -> Tensor:
        forward: Any = super().forward
        if self.packed is None:
            embedded: Tensor = forward(hidden_states)
            return embedded
        with parametrize.cached():  # weights that are computed from others
            return torch.cat([forward(each) for each in hidden_states.split(self.packed.real, 1)], 1)


class PackableLayers(Packable, nn.Module):
    """Mixin for the layers of an encoder and the position embedding before them: (B, T, D) -> (B, T, D)"""

    config: Any

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        forward: Any = super().forward
        if self.packed is None:
            return forward(hidden_states, attention_mask, **kwargs)
        options = self.packed.for_attention(self.config, hidden_states.device)
        output = forward(self.packed.behind_one_another(hidden_states), None, **options, **kwargs)
        output.last_hidden_state = self.packed.apart(output.last_hidden_state)
        return output


class Packing(PreTrainedModel):
    """Mixin for an encoder like wav2vec2 that may compute a batch without its padding.

    Its configuration may say `packing`: "never" if it says nothing, "always", or "auto": on CPUs, where that takes less time.

    products: of a frame with the weights
    """

    attention: type[nn.Module] = OneByOne
    frame_steps: Steps
    packable: list[Any]
    products: int

    def set_up(self) -> None:
        super().set_up()
        self.mix_in()
        self.packable = [module for module in self.modules() if isinstance(module, Packable)]
        self.products = products_of_a_frame(self)

    def mix_in(self) -> None:
        """Swaps the classes of modules that have to know where an utterance ends."""
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
        """Masked's, but what computes utterances one by one has nothing to mask."""
        super().set_lengths(attention_mask, device)
        for packable in self.packable:
            for module in packable.modules() if packable.packed is not None else ():
                if getattr(module, "lengths", None) is not None:
                    module.lengths = None

    def lengths_to_pack(
        self, inputs: Tensor, attention_mask: Tensor | None, options: Mapping[str, Any]
    ) -> Lengths | None:
        """None for a batch that is computed with its padding."""
        choice = getattr(self.config, "packing", "never")
        if choice == "never" or why_not(self) or type(attention_mask) is not Tensor or is_traced(attention_mask):
            return None
        if choice == "auto" and inputs.device.type != "cpu":
            return None
        if any(options.get(name, getattr(self.config, name, False)) for name in STATES):
            return None  # they are of the frames of a padded batch
        lengths = lengths_of(attention_mask, self.frame_steps)
        saved, cost = lengths.padding * self.products, len(lengths.frames) * PRODUCTS_OF_AN_UTTERANCE
        pays = saved > cost if choice == "auto" else lengths.padding
        return lengths if lengths.real and pays and not is_compiled(self) else None


def products_of_a_frame(encoder: nn.Module) -> int:
    """Weights of linear layers and convolutions, as often as a frame of the output needs them."""
    products, times = 0, 1
    for module in reversed([each for each in encoder.modules() if isinstance(each, nn.Linear | nn.Conv1d)]):
        products += times * module.weight.numel()
        times *= module.stride[0] if isinstance(module, nn.Conv1d) else 1
    return products


def lengths_of(attention_mask: Tensor, steps: Steps) -> Lengths:
    inputs = torch.cat([attention_mask.sum(-1).cpu(), torch.tensor([attention_mask.shape[1]])])
    *frames, num_frames = output_lengths(inputs, steps).tolist()
    return Lengths(inputs[:-1].tolist(), frames, num_frames)


def why_not(encoder: Any) -> str | None:
    """Why an encoder cannot compute a batch without its padding; None for one that can."""
    if not isinstance(encoder, Packing):
        return "only encoders like wav2vec2 and whisper leave it out"
    if getattr(encoder.config, "conv_pos_batch_norm", False):
        return "it has a batch norm over time"
    if encoder.config._attn_implementation == "flex_attention":
        return "FlexAttention is compiled for each length"
    return None


def obstacle(encoder: Any, compiler: str | None) -> str | None:
    return f"{compiler} would compile its layers for each length" if compiler else why_not(encoder)


def choose_packing(encoder: Any, choice: str, compiler: str | None) -> None:
    """Writes `packing` into the configuration of an encoder that can. Raises UserError where "always" is impossible."""
    reason = obstacle(encoder, compiler)
    if choice == "always" and reason:
        wrong = f"the encoder, {encoder.config.model_type}, computes padding: {reason}"
        raise UserError("packing", choice, wrong, "write packing=auto")
    possible = "never" if reason else choice
    if possible != getattr(encoder.config, "packing", "never"):
        encoder.config.packing = possible


def fate_of_padding(encoder: Any, choice: str, compiler: str | None) -> str:
    """For people: whether padding is computed, and why."""
    if choice == "never":
        return "computed, packing=never"
    if reason := obstacle(encoder, compiler):
        return f"computed by the encoder: {reason}"
    return "left out by the encoder" + ("" if choice == "always" else " on CPUs, where that takes less time")


def is_compiled(encoder: nn.Module) -> bool:
    return any(module._compiled_call_impl is not None for module in encoder.modules())
