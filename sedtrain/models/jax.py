"""The model under JAX, with the interface of Flax: `__call__` and greedy `generate`, compiled once per shape.

torchax traces the PyTorch model into operations of JAX, so no family is written twice.

B batch, S samples, T frames, D width, U target tokens, L longest text with its start token, V vocabulary.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.modeling_outputs import Seq2SeqLMOutput

from sedtrain.errors import UserError, one_line
from sedtrain.models.encoder import EncodedSpeech
from sedtrain.models.greedy_rules import Rules, rules_of
from sedtrain.models.output_layer import deferred_output_layer
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

try:
    import jax
    import jax.numpy as jnp
    import torchax
    from torchax.interop import call_torch
    from torchax.tensor import OperatorNotFound
except (ImportError, AttributeError) as failure:  # AttributeError: torchax does not support this torch
    missing = f"it needs jax and a torchax that knows torch {torch.__version__}: {failure}"
    raise UserError("import", __name__, missing, "pip install 'sedtrain[jax]'") from failure

Params = Mapping[str, Any]
UNTRACEABLE = (OperatorNotFound, jax.errors.JAXTypeError, jax.errors.JAXIndexError)
"""Exceptions for operations that torchax lacks, and for shapes or branches that depend on values."""


@dataclass(frozen=True)
class Generated:
    """sequences: (B, U) ids, with the start token, and with pad tokens after the end."""

    sequences: Any


class Called(nn.Module):
    """A function of a model as a module, so that `functional_call` can replace the weights."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, **arguments: Any) -> Any:
        return self.function(self.model, **arguments)


class FlaxSpeechEncoderDecoderModel:
    """A `SpeechEncoderDecoder` as a JAX function, with the arguments, outputs and class methods of the former Flax class.

    model:  set to evaluation mode; its weights are copied
    params: the copied weights, with PyTorch's names. Calls take other weights as `params=`, for `jax.grad` and optax
    """

    def __init__(self, model: SpeechEncoderDecoder) -> None:
        self.model, self.config = model.eval(), model.config
        self.params = as_jax(dict(model.named_parameters()))
        self.buffers = as_jax(dict(model.named_buffers()))
        self._forward = jax.jit(self.apply_forward, static_argnames="options")
        self._search = jax.jit(self.greedy, static_argnames="rules")

    @classmethod
    def from_pretrained(cls, name: str | Path, *args: Any, from_pt: bool = True, **kwargs: Any) -> Self:
        """`SpeechEncoderDecoder.from_pretrained` under JAX; from_pt=False prefers Flax weights if there are both."""
        return cls(SpeechEncoderDecoder.from_pretrained(name, *args, from_flax=not from_pt, **kwargs))

    @classmethod
    def from_encoder_decoder_pretrained(
        cls,
        encoder_pretrained_model_name_or_path: str | None = None,
        decoder_pretrained_model_name_or_path: str | None = None,
        *model_args: Any,
        **kwargs: Any,
    ) -> Self:
        """`SpeechEncoderDecoder.from_encoder_decoder_pretrained` under JAX; ignores encoder_from_pt and decoder_from_pt."""
        names = encoder_pretrained_model_name_or_path, decoder_pretrained_model_name_or_path
        kwargs = {name: value for name, value in kwargs.items() if name not in ("encoder_from_pt", "decoder_from_pt")}
        return cls(SpeechEncoderDecoder.from_encoder_decoder_pretrained(*names, *model_args, **kwargs))

    def save_pretrained(self, save_directory: str | Path, params: Params | None = None, **kwargs: Any) -> None:
        """Copies `params` into `model` and saves it in a folder that PyTorch and this class load."""
        arrays = self.params if params is None else params
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(torch.from_numpy(np.array(arrays[name], dtype=np.float32)))
        self.model.save_pretrained(save_directory, **kwargs)

    def __call__(
        self,
        inputs: Any,
        attention_mask: Any = None,
        decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None,
        decoder_position_ids: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        train: bool = False,
        freeze_feature_encoder: bool = False,
        params: Params | None = None,
        dropout_rng: Any = None,
    ) -> Any:
        """(B, S) audio, or features, and (B, U) decoder inputs -> an output of JAX arrays, with (B, U, V) logits.

        Raises ValueError without `decoder_input_ids`, and UserError for `train=True` or `freeze_feature_encoder=True`.
        """
        if decoder_input_ids is None:
            raise ValueError("give decoder_input_ids, such as model.shift_right(labels)")
        for name, value in {"train": train, "freeze_feature_encoder": freeze_feature_encoder}.items():
            if value:
                write = f"leave {name} out, and train with PyTorch"
                raise UserError(name, value, "there is no dropout and no freezing under JAX", write)
        integers = {
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "decoder_position_ids": decoder_position_ids,
        }
        arguments = {name: jnp.asarray(value, jnp.int32) for name, value in integers.items() if value is not None}
        arguments["inputs"] = jnp.asarray(inputs, jnp.float32)
        options = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        arrays = self._forward(self.params if params is None else params, arguments, options=tuple(options.items()))
        output = Seq2SeqLMOutput(**arrays)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def apply_forward(self, params: Params, arguments: Params, options: tuple[tuple[str, Any], ...]) -> Any:
        """The outputs of `forward` that are not None, by name."""

        def forward(model: SpeechEncoderDecoder, **inputs: Any) -> dict[str, Any]:
            output = model(**inputs, **dict(options), use_cache=False, return_dict=True)
            names = Seq2SeqLMOutput.__dataclass_fields__.keys() & output.keys()
            return {name: output[name] for name in names}

        return self.applied(params, forward, arguments)

    def shift_right(self, labels: Any) -> Any:
        """(B, U) labels -> (B, U) decoder inputs."""
        shifted = self.model.prepare_decoder_input_ids_from_labels(torch.from_numpy(np.array(labels)))
        return jnp.asarray(shifted.numpy(), jnp.int32)

    def generate(
        self, inputs: Any, attention_mask: Any = None, params: Params | None = None, **options: Any
    ) -> Generated:
        """Greedy search: the same ids as PyTorch's `generate` with `num_beams=1`.

        options: of the generation configuration. Raises UserError for options of another search.
        """
        rules = rules_of(self.model, options)
        mask = None if attention_mask is None else jnp.asarray(attention_mask, jnp.int32)
        audio = jnp.asarray(inputs, jnp.float32)
        ids, length = self._search(self.params if params is None else params, audio, mask, rules=rules)
        return Generated(ids[:, : int(length)])

    def greedy(self, params: Params, inputs: Any, attention_mask: Any, rules: Rules) -> Any:
        """(B, L) ids, and the number of columns in use."""
        frames, mask = self.applied(params, encode, {"inputs": inputs, "attention_mask": attention_mask})
        ends = jnp.asarray(rules.ends, jnp.int32)

        def goes_on(state: Any) -> Any:
            position, _, done = state
            return (position < rules.room) & ~done.all()

        def step(state: Any) -> Any:
            position, ids, done = state
            arguments = {"frames": frames, "mask": mask, "ids": ids, "position": position}
            scores = self.applied(params, next_scores, arguments)
            if rules.least:
                scores = jnp.where(position < rules.least, scores.at[:, ends].set(-jnp.inf), scores)
            tokens = jnp.argmax(scores, -1).astype(jnp.int32)
            for forced, place in ((rules.first, 1), (rules.last, rules.room - 1)):
                if forced is not None:
                    tokens = jnp.where(position == place, forced, tokens)
            tokens = jnp.where(done, rules.pad, tokens)
            return position + 1, ids.at[:, position].set(tokens), done | jnp.isin(tokens, ends)

        ids = jnp.full((len(inputs), rules.room), rules.pad, jnp.int32).at[:, 0].set(rules.start)
        length, ids, _ = jax.lax.while_loop(goes_on, step, (jnp.int32(1), ids, jnp.zeros(len(inputs), bool)))
        return ids, length

    @torch.no_grad()
    def applied(self, params: Params, function: Callable[..., Any], arguments: Params) -> Any:
        """Traces `function(model, **arguments)` with the weights `params`; arguments and result are JAX arrays."""

        def traced(weights: Params, inputs: Params) -> Any:
            called = Called(self.model, function)
            return functional_call(
                called, {f"model.{name}": weight for name, weight in weights.items()}, (), {**inputs}
            )

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Explicitly requested dtype")  # int64 of torch is int32 in JAX
            try:
                return call_torch(traced, {**params, **self.buffers}, {**arguments})
            except UNTRACEABLE as error:
                parts = f"{self.config.encoder.model_type} and {self.config.decoder.model_type}"
                wrong = f"JAX cannot trace it: {one_line(error, 160)}"
                raise UserError("model", parts, wrong, "write other families, or run it with PyTorch") from error


def as_jax(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Copies of the weights on JAX's default device."""
    detached = {name: weight.detach() for name, weight in weights.items()}
    copies: dict[str, Any] = torchax.default_env().t2j_copy(detached)
    return copies


def encode(model: SpeechEncoderDecoder, inputs: Tensor, attention_mask: Tensor | None) -> tuple[Any, Any]:
    """(B, T, D) frames for the decoder, and their mask."""
    encoded = model.encode(inputs, attention_mask)
    return encoded.last_hidden_state, encoded.attention_mask


def next_scores(
    model: SpeechEncoderDecoder, frames: Tensor, mask: Tensor | None, ids: Tensor, position: Tensor
) -> Tensor:
    """(B, V) scores of the token at `position`, after the tokens before it in (B, L) ids."""
    encoded = EncodedSpeech(last_hidden_state=frames, attention_mask=mask)
    given: dict[str, Any] = {"inputs_embeds": None, "past_key_values": None, "use_cache": False}
    with deferred_output_layer(model.decoder, deferred=True) as output_layer:
        decoded = model.decode(encoded, input_ids=ids, attention_mask=torch.ones_like(ids), **given)
    states: Tensor = decoded.logits.index_select(1, (position - 1).view(1))[:, 0]
    return states if output_layer is None else output_layer.outputs(states)
