"""The layers of a decoder, driven token by token without the module calls, masks and copies of `forward`.

B batch, S slots that are computed at once (the beams of an utterance, or the tokens of a draft), L slots so far, T frames,
H heads, D width, V vocabulary. A slot has a token, a position and the slots that it sees: those of the beam it continues.
So keys and values never move, and those of the audio are computed once per utterance for all its beams.

Weights are read where a module has them, so that trained, merged and replaced layers count as they are.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers.pytorch_utils import Conv1D

from sedtrain.models.encoder import EncodedSpeech
from sedtrain.models.output_layer import DeferrableLinear
from sedtrain.models.parts import layers_of
from sedtrain.models.products import FAST_LINEAR
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

Function = Callable[[Tensor], Tensor]
PLAIN = (nn.Linear, Conv1D, DeferrableLinear, FAST_LINEAR)
FIRST_SLOTS = 32  # of which as many are made as are needed, by doubling
KEPT: "WeakKeyDictionary[nn.Module, Kept | None]" = WeakKeyDictionary()
"""Decoders that were tried, with their steps; None: the steps do not compute what the decoder does."""


def side_by_side(*modules: Any) -> Function:
    """The outputs of linear layers with the same input as one product; another kind of module is called as it is.

    On a CPU, weights are copied row by input, in which layout a few rows of states are multiplied up to twice as fast.
    """
    if any(type(each) not in PLAIN or each._forward_hooks or each._forward_pre_hooks for each in modules):
        return modules[0] if len(modules) == 1 else lambda states: torch.cat([each(states) for each in modules], -1)
    weights = [each.weight if type(each) is Conv1D else each.weight.mT for each in modules]
    weight = weights[0] if len(modules) == 1 else torch.cat(weights, 1)
    weight = weight.contiguous() if weight.device.type == "cpu" else weight
    if all(each.bias is None for each in modules):
        return partial(torch.mm, mat2=weight)
    biases = [
        weight.new_zeros(each.shape[1]) if m.bias is None else m.bias for m, each in zip(modules, weights, strict=True)
    ]
    return partial(torch.addmm, biases[0] if len(modules) == 1 else torch.cat(biases), mat2=weight)


def normed(module: Any) -> Function:
    if type(module) is not nn.LayerNorm:
        return module  # type: ignore[no-any-return]
    norm = torch.layer_norm
    return partial(
        norm, normalized_shape=module.normalized_shape, weight=module.weight, bias=module.bias, eps=module.eps
    )


@dataclass
class Layer:
    """One layer as functions, from the names that its family gives to its parts.

    norms:  of self-attention, cross-attention and feed-forward
    before: True if they stand before these, not behind
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
        """(B · S, D) -> (B · S, D); writes keys and values of the slots to the memory."""
        for norm, part in zip(self.norms, (self.attend, self.listen, self.feed), strict=True):
            if self.before:
                states = states + part(norm(states), memory, index, seen)
            else:
                states = norm(states + part(states, memory, index, seen))
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

    audio:      two (B, H, T, D / H) of each layer
    audio_mask: (B, 1, 1, T), 0 where a frame is real, else -inf; None: all are
    slots:      (2, B, H, room, D / H) of each layer, of which `length` are in use
    """

    batch_size: int
    audio: list[tuple[Tensor, Tensor]]
    audio_mask: Tensor | None
    slots: list[Tensor]
    length: int = 0

    def write(self, index: int, new: Tensor) -> Tensor:
        """(2, B, H, S, D / H) of a layer -> (2, B, H, L, D / H), those before included."""
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
        """Forgets all utterances but `rows`."""
        self.batch_size = len(rows)
        self.audio = [(key[rows], value[rows]) for key, value in self.audio]
        self.audio_mask = None if self.audio_mask is None else self.audio_mask[rows]
        self.slots = [each[:, rows] for each in self.slots]


class Steps:
    """A decoder as functions. Raises AttributeError for one whose parts have other names."""

    def __init__(self, decoder: Any) -> None:
        found = layers_of(decoder)
        if found is None:
            raise AttributeError("no layers")
        stack = decoder.get_submodule(found[0].rpartition(".")[0])
        self.scale, self.first, first_norm, into, last = 1.0, None, None, None, None
        if hasattr(stack, "embed_tokens"):
            words, positions = stack.embed_tokens, stack.embed_positions
            counter = positions
            self.scale = getattr(stack if type(words) is nn.Embedding else words, "embed_scale", 1.0)
            first_norm, last = getattr(stack, "layernorm_embedding", None), getattr(stack, "layer_norm", None)
            self.layers = [Layer.like_bart(each, before=last is not None) for each in found[1]]
        elif hasattr(stack, "wpe"):
            words, positions, last = stack.wte, stack.wpe, stack.ln_f
            counter = positions
            self.layers = [Layer.like_gpt2(each) for each in found[1]]
        else:
            counter = decoder.base_model.embeddings
            words, positions, first_norm = counter.word_embeddings, counter.position_embeddings, counter.LayerNorm
            if hasattr(counter, "token_type_embeddings"):
                self.first = counter.token_type_embeddings.weight[0]
            projection = getattr(decoder.base_model, "embeddings_project", None)
            into = getattr(stack, "embedding_hidden_mapping_in", projection)
            self.layers = [Layer.like_bert(each) for each in found[1]]
        counts = hasattr(counter, "create_position_ids_from_input_ids")  # the real tokens
        offset = counter.padding_idx + 1 if counts else getattr(counter, "offset", 0)
        self.words = words.weight
        table = positions.weight if hasattr(positions, "weight") else positions.weights
        self.positions = table[offset:].to(self.words)
        self.before = [normed(first_norm)] if first_norm is not None else []
        self.before += [side_by_side(into)] if into is not None else []
        self.behind = [normed(last)] if last is not None else []
        self.head = [child for child in decoder.children() if child is not decoder.base_model]
        output_layer = decoder.get_output_embeddings()
        self.output_layer = output_layer if isinstance(output_layer, DeferrableLinear) else None
        self.output = None if self.output_layer is None else side_by_side(self.output_layer)

    def listen(self, encoded: EncodedSpeech) -> Memory:
        """The memory of utterances before their first token."""
        states, mask = encoded.last_hidden_state, encoded.attention_mask
        assert states is not None
        memory = Memory(len(states), [], None, [])
        for layer in self.layers:
            key, value = layer.heads(layer.cross_audio(states.flatten(0, 1)), memory, 2)
            memory.audio.append((key.contiguous(), value.contiguous()))
        if mask is not None and not bool(mask.all()):
            added = torch.zeros_like(mask, dtype=memory.audio[0][0].dtype).masked_fill(mask == 0, -torch.inf)
            memory.audio_mask = added[:, None, None]
        return memory

    def step(self, tokens: Tensor, positions: int | Tensor, memory: Memory, seen: Tensor | None = None) -> Tensor:
        """(B, S) tokens at one position or (B, S) of them -> (B, S, D) states; the slots stay in memory.

        seen: (B, 1, S, L), 0 where a slot sees a slot, else -inf; None: all
        """
        states = embedding(tokens, self.words)
        states = (states if self.scale == 1 else states * self.scale) + self.positions[positions]
        if self.first is not None:
            states = states + self.first
        states = states.flatten(0, 1)
        for function in self.before:
            states = function(states)
        for index, layer in enumerate(self.layers):
            states = layer(states, memory, index, seen)
        memory.length += tokens.shape[1]
        for function in self.behind:
            states = function(states)
        return states.view(*tokens.shape, -1)

    def logits(self, states: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, V)"""
        shape, states = states.shape[:2], states.flatten(0, 1)
        if self.output_layer is None or self.output is None:
            for module in self.head:
                states = module(states)
            return states.view(*shape, -1)
        self.output_layer.deferred = True
        try:
            for module in self.head:
                states = module(states)
        finally:
            self.output_layer.deferred = False
        return self.output(states).view(*shape, -1)


def steps_of(model: SpeechEncoderDecoder, num_positions: int = 1) -> Steps | None:
    """The decoder's steps with its present weights, if they compute what it does and have so many positions, else None."""
    decoder = model.decoder
    if decoder not in KEPT:
        made = attempt(decoder)
        KEPT[decoder] = made if made is not None and agree(model, made.steps) else None
    elif (made := KEPT[decoder]) is not None and made.state != state_of(parts_of(made.modules)):
        KEPT[decoder] = attempt(decoder)
    made = KEPT[decoder]
    return made.steps if made is not None and num_positions <= len(made.steps.positions) else None


@dataclass(frozen=True)
class Kept:
    """The steps of a decoder; parts: its modules and weights at that time, so that none of their ids is given again."""

    steps: Steps
    modules: Sequence[nn.Module]
    parts: Sequence[Any]
    state: Sequence[int]


def attempt(decoder: nn.Module) -> Kept | None:
    modules = list(decoder.modules())[1:]  # without itself, which must not keep itself alive
    try:
        return Kept(Steps(decoder), modules, parts := parts_of(modules), state_of(parts))
    except AttributeError:
        return None


def parts_of(modules: Iterable[nn.Module]) -> list[Any]:
    return [part for each in modules for part in (*each._modules.values(), *each._parameters.values())]


def state_of(parts: Iterable[Any]) -> list[int]:
    """Differs after a change of the weights, or of the modules that have them."""
    weights = [each for each in parts if isinstance(each, Tensor)]
    versions = (0 if each.is_inference() else each._version for each in weights)
    return [*map(id, parts), *(each.data_ptr() for each in weights), *versions]


def forget(model: SpeechEncoderDecoder) -> None:
    """Frees the copies of the weights, and makes the next search copy them anew however they have changed."""
    KEPT.pop(model.decoder, None)


@torch.inference_mode()
def agree(model: SpeechEncoderDecoder, steps: Steps) -> bool:
    """True if steps give the logits of the decoder, with noise for audio."""
    weight, width = steps.words, model.config.decoder.hidden_size
    states = torch.randn(2, 4, width, generator=torch.Generator().manual_seed(0)).to(weight)
    tokens = torch.arange(6, device=weight.device).view(2, 3) % len(weight)
    encoded = EncodedSpeech(last_hidden_state=states, attention_mask=tokens.new_tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    was_training = model.training
    model.eval()
    expected = model(encoder_outputs=encoded, decoder_input_ids=tokens, use_cache=False).logits
    memory = steps.listen(encoded)
    logits = torch.cat([steps.logits(steps.step(tokens[:, [n]], n, memory)) for n in range(3)], 1)
    model.train(was_training)
    return bool((logits - expected).abs().max() <= 0.1 * torch.finfo(logits.dtype).eps ** 0.5 * expected.abs().max())
