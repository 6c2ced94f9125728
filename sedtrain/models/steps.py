"""A decoder run token by token, without the module calls, masks and copies of `forward`.

A slot is one token of one beam: it has a position and sees the earlier slots of its beam. Keys and values of slots never
move in memory, and those of the audio are computed once per utterance for all its beams.

B batch, S slots in one step (the beams of an utterance, or the tokens of a draft), L slots so far, T frames, D width,
V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from sedtrain.models.encoder import EncodedSpeech
from sedtrain.models.output_layer import DeferrableLinear
from sedtrain.models.parts import layers_of
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.models.step_layers import Layer, Memory, normed, side_by_side

KEPT: "WeakKeyDictionary[nn.Module, Kept | None]" = WeakKeyDictionary()
"""The steps of each decoder that was tried; None if they do not compute what the decoder does."""


class Steps:
    """A decoder as functions, with its present weights. Raises AttributeError for an unknown naming of its submodules."""

    def __init__(self, decoder: Any) -> None:
        found = layers_of(decoder)
        if found is None:
            raise AttributeError("no layers")
        stack = decoder.get_submodule(found[0].rpartition(".")[0])
        self.scale, self.token_type, first_norm, into, last = 1.0, None, None, None, None
        if hasattr(stack, "embed_tokens"):
            words, positions = stack.embed_tokens, stack.embed_positions
            counter = positions
            self.scale = getattr(stack if type(words) is nn.Embedding else words, "embed_scale", 1.0)
            first_norm, last = getattr(stack, "layernorm_embedding", None), getattr(stack, "layer_norm", None)
            self.layers = [Layer.like_bart(layer, before=last is not None) for layer in found[1]]
        elif hasattr(stack, "wpe"):
            words, positions, last = stack.wte, stack.wpe, stack.ln_f
            counter = positions
            self.layers = [Layer.like_gpt2(layer) for layer in found[1]]
        else:
            counter = decoder.base_model.embeddings
            words, positions, first_norm = counter.word_embeddings, counter.position_embeddings, counter.LayerNorm
            if hasattr(counter, "token_type_embeddings"):
                self.token_type = counter.token_type_embeddings.weight[0]
            projection = getattr(decoder.base_model, "embeddings_project", None)
            into = getattr(stack, "embedding_hidden_mapping_in", projection)
            self.layers = [Layer.like_bert(layer) for layer in found[1]]
        counts_real = hasattr(counter, "create_position_ids_from_input_ids")
        offset = counter.padding_idx + 1 if counts_real else getattr(counter, "offset", 0)
        self.words = words.weight
        table = positions.weight if hasattr(positions, "weight") else positions.weights
        self.positions = table[offset:].to(self.words)
        self.after_embedding = [normed(first_norm)] if first_norm is not None else []
        self.after_embedding += [side_by_side(into)] if into is not None else []
        self.after_layers = [normed(last)] if last is not None else []
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
        """(B, S) tokens, at one position or (B, S) positions -> (B, S, D) states; adds the slots to the memory.

        seen: (B, 1, S, L), 0 where a slot sees another, else -inf; None if each sees all
        """
        states = embedding(tokens, self.words)
        states = (states if self.scale == 1 else states * self.scale) + self.positions[positions]
        if self.token_type is not None:
            states = states + self.token_type
        states = states.flatten(0, 1)
        for function in self.after_embedding:
            states = function(states)
        for index, layer in enumerate(self.layers):
            states = layer(states, memory, index, seen)
        memory.length += tokens.shape[1]
        for function in self.after_layers:
            states = function(states)
        return states.view(*tokens.shape, -1)

    def logits(self, states: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, V)"""
        shape, states = states.shape[:2], states.flatten(0, 1)
        layer = self.output_layer
        try:
            if layer is not None:
                layer.deferred = True  # returns its input, which `self.output` then multiplies
            for module in self.head:
                states = module(states)
        finally:
            if layer is not None:
                layer.deferred = False
        return (states if self.output is None else self.output(states)).view(*shape, -1)


def decoder_steps(model: SpeechEncoderDecoder, num_positions: int = 1) -> Steps | None:
    """The decoder's steps with its present weights; None if they compute something else, or lack `num_positions` positions."""
    decoder = model.decoder
    if decoder not in KEPT:
        kept = try_steps(decoder)
        KEPT[decoder] = kept if kept is not None and agree(model, kept.steps) else None
    elif (kept := KEPT[decoder]) is not None and kept.state != state_of(parts_of(kept.modules)):
        KEPT[decoder] = try_steps(decoder)
    kept = KEPT[decoder]
    return kept.steps if kept is not None and num_positions <= len(kept.steps.positions) else None


@dataclass(frozen=True)
class Kept:
    """The steps of a decoder, and the state that they were made from.

    parts: its modules and weights; they are kept alive because `state` holds their ids, which must not be reused
    """

    steps: Steps
    modules: Sequence[nn.Module]
    parts: Sequence[Any]
    state: Sequence[int]


def try_steps(decoder: nn.Module) -> Kept | None:
    """Steps with the state of the decoder; None for an unknown naming of its submodules."""
    modules = list(decoder.modules())[1:]  # not the decoder, which KEPT must not keep alive
    try:
        return Kept(Steps(decoder), modules, parts := parts_of(modules), state_of(parts))
    except AttributeError:
        return None


def parts_of(modules: Iterable[nn.Module]) -> list[Any]:
    return [part for module in modules for part in (*module._modules.values(), *module._parameters.values())]


def state_of(parts: Iterable[Any]) -> list[int]:
    """Numbers that change with the weights, and with the modules that hold them."""
    weights = [part for part in parts if isinstance(part, Tensor)]
    versions = (0 if weight.is_inference() else weight._version for weight in weights)
    return [*map(id, parts), *(weight.data_ptr() for weight in weights), *versions]


def forget(model: SpeechEncoderDecoder) -> None:
    """Frees the copies of the weights; the next search copies them again, even after changes that `state_of` misses."""
    KEPT.pop(model.decoder, None)


@torch.inference_mode()
def agree(model: SpeechEncoderDecoder, steps: Steps) -> bool:
    """True if the steps give the decoder's logits for random frames."""
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
