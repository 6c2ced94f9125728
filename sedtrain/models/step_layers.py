"""Decoder layers as functions of tensors, and the memory of their keys and values; steps.py drives them.

B batch, S slots in one step, L slots so far, T frames, H heads, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.pytorch_utils import Conv1D

from sedtrain.models.output_layer import DeferrableLinear
from sedtrain.models.products import FAST_LINEAR

Function = Callable[[Tensor], Tensor]
PLAIN = (nn.Linear, Conv1D, DeferrableLinear, FAST_LINEAR)
FIRST_SLOTS = 32
"""Slots that a memory has room for at first; the room doubles when it is full."""


def side_by_side(*modules: Any) -> Function:
    """One matrix product for linear layers with the same input; calls the modules if one of them is not plain or has hooks.

    On a CPU, weights are copied to (inputs, outputs): a few rows of states multiply up to twice as fast in this layout.
    """
    if any(type(layer) not in PLAIN or layer._forward_hooks or layer._forward_pre_hooks for layer in modules):
        return modules[0] if len(modules) == 1 else lambda states: torch.cat([layer(states) for layer in modules], -1)
    weights = [layer.weight if type(layer) is Conv1D else layer.weight.mT for layer in modules]
    weight = weights[0] if len(modules) == 1 else torch.cat(weights, 1)
    weight = weight.contiguous() if weight.device.type == "cpu" else weight
    if all(layer.bias is None for layer in modules):
        return partial(torch.mm, mat2=weight)
    biases = [
        weight.new_zeros(columns.shape[1]) if layer.bias is None else layer.bias
        for layer, columns in zip(modules, weights, strict=True)
    ]
    return partial(torch.addmm, biases[0] if len(modules) == 1 else torch.cat(biases), mat2=weight)


def normed(module: Any) -> Function:
    """A plain layer norm without the cost of a module call; any other norm as it is."""
    if type(module) is not nn.LayerNorm:
        return module  # type: ignore[no-any-return]
    norm = torch.layer_norm
    return partial(
        norm, normalized_shape=module.normalized_shape, weight=module.weight, bias=module.bias, eps=module.eps
    )


@dataclass
class Layer:
    """One decoder layer as functions; a class method for each naming scheme of its submodules.

    norms:  of self-attention, cross-attention and feed-forward
    before: True if a norm comes before its block (pre-norm), False if after
    """

    num_heads: int
    head_width: int
    self_in: Function
    self_out: Function
    cross_query: Function
    cross_audio: Function
    cross_out: Function
    feed_in: Function
    activation: Function
    feed_out: Function
    norms: tuple[Function, Function, Function]
    before: bool

    @classmethod
    def like_bert(cls, layer: Any) -> "Layer":
        own, cross = layer.attention, layer.crossattention
        return cls(
            own.self.num_attention_heads,
            own.self.attention_head_size,
            side_by_side(own.self.query, own.self.key, own.self.value),
            side_by_side(own.output.dense),
            side_by_side(cross.self.query),
            side_by_side(cross.self.key, cross.self.value),
            side_by_side(cross.output.dense),
            side_by_side(layer.intermediate.dense),
            layer.intermediate.intermediate_act_fn,
            side_by_side(layer.output.dense),
            (normed(own.output.LayerNorm), normed(cross.output.LayerNorm), normed(layer.output.LayerNorm)),
            before=False,
        )

    @classmethod
    def like_bart(cls, layer: Any, before: bool) -> "Layer":
        own, cross = layer.self_attn, layer.encoder_attn
        norms = layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, layer.final_layer_norm
        return cls(
            own.num_heads,
            own.head_dim,
            side_by_side(own.q_proj, own.k_proj, own.v_proj),
            side_by_side(own.out_proj),
            side_by_side(cross.q_proj),
            side_by_side(cross.k_proj, cross.v_proj),
            side_by_side(cross.out_proj),
            side_by_side(layer.fc1),
            layer.activation_fn,
            side_by_side(layer.fc2),
            (normed(norms[0]), normed(norms[1]), normed(norms[2])),
            before,
        )

    @classmethod
    def like_gpt2(cls, layer: Any) -> "Layer":
        own, cross = layer.attn, layer.crossattention
        return cls(
            own.num_heads,
            own.head_dim,
            side_by_side(own.c_attn),
            side_by_side(own.c_proj),
            side_by_side(cross.q_attn),
            side_by_side(cross.c_attn),
            side_by_side(cross.c_proj),
            side_by_side(layer.mlp.c_fc),
            layer.mlp.act,
            side_by_side(layer.mlp.c_proj),
            (normed(layer.ln_1), normed(layer.ln_cross_attn), normed(layer.ln_2)),
            before=True,
        )

    def heads(self, states: Tensor, memory: "Memory", number: int) -> Tensor:
        """(B · S, number · D) -> (number, B, H, S, D / H)"""
        return states.view(memory.batch_size, -1, number, self.num_heads, self.head_width).permute(2, 0, 3, 1, 4)

    def __call__(self, states: Tensor, memory: "Memory", index: int, seen: Tensor | None) -> Tensor:
        """(B · S, D) -> (B · S, D); writes the slots' keys and values into the memory."""
        for norm, block in zip(self.norms, (self.attend, self.listen, self.feed), strict=True):
            if self.before:
                states = states + block(norm(states), memory, index, seen)
            else:
                states = norm(states + block(states, memory, index, seen))
        return states

    def attend(self, states: Tensor, memory: "Memory", index: int, seen: Tensor | None) -> Tensor:
        heads = self.heads(self.self_in(states), memory, 3)
        key, value = memory.write(index, heads[1:]).unbind(0)
        return self.self_out(joined(scaled_dot_product_attention(heads[0], key, value, seen)))

    def listen(self, states: Tensor, memory: "Memory", index: int, seen: Tensor | None) -> Tensor:
        query = self.heads(self.cross_query(states), memory, 1)[0]
        key, value = memory.audio[index]
        return self.cross_out(joined(scaled_dot_product_attention(query, key, value, memory.audio_mask)))

    def feed(self, states: Tensor, memory: "Memory", index: int, seen: Tensor | None) -> Tensor:
        return self.feed_out(self.activation(self.feed_in(states)))


def joined(heads: Tensor) -> Tensor:
    """(B, H, S, D / H) -> (B · S, D)"""
    rows = heads.transpose(1, 2)
    return rows.reshape(rows.shape[0] * rows.shape[1], -1)


@dataclass
class Memory:
    """Keys and values of each layer.

    audio:      for each layer, keys and values (B, H, T, D / H) of the frames
    audio_mask: (B, 1, 1, T), 0 where a frame is real, else -inf; None if all are
    slots:      for each layer, keys and values (2, B, H, room, D / H) of the slots, of which `length` are in use
    """

    batch_size: int
    audio: list[tuple[Tensor, Tensor]]
    audio_mask: Tensor | None
    slots: list[Tensor]
    length: int = 0

    def write(self, index: int, new: Tensor) -> Tensor:
        """Appends a layer's (2, B, H, S, D / H); returns (2, B, H, L, D / H) of all slots so far."""
        end = self.length + new.shape[3]
        if len(self.slots) == index:
            self.slots.append(new.new_empty(*new.shape[:3], max(FIRST_SLOTS, end), new.shape[4]))
        if (room := self.slots[index].shape[3]) < end:
            grown = new.new_empty(*new.shape[:3], max(2 * room, end), new.shape[4])
            grown.narrow(3, 0, self.length).copy_(self.slots[index].narrow(3, 0, self.length))
            self.slots[index] = grown
        slots = self.slots[index]
        slots.narrow(3, self.length, new.shape[3]).copy_(new)
        return slots.narrow(3, 0, end)

    def keep(self, rows: Tensor) -> None:
        """Forgets all utterances except `rows`."""
        self.batch_size = len(rows)
        self.audio = [(key[rows], value[rows]) for key, value in self.audio]
        self.audio_mask = None if self.audio_mask is None else self.audio_mask[rows]
        self.slots = [slots[:, rows] for slots in self.slots]
