"""Encoded speech, and the inputs and outputs of a forward pass.

B batch, T frames, T' adapted frames, E encoder width, D decoder width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput


@dataclass
class EncodedSpeech(BaseModelOutput):
    """Audio as the decoder attends to it: computed once per utterance, and accepted back as `encoder_outputs`.

    last_hidden_state: (B, T', D) adapted to the decoder
    attention_mask: (B, T'), 1 where a frame is real, or None if all are
    encoder_frames, encoder_mask: (B, T, E) and (B, T), the encoder's own output
    """

    attention_mask: Tensor | None = None
    encoder_frames: Tensor | None = None
    encoder_mask: Tensor | None = None


def given_input(inputs: Tensor | None, input_values: Tensor | None, input_features: Tensor | None) -> Tensor:
    """The one of the three that is given; raises ValueError for none or several."""
    given = [tensor for tensor in (inputs, input_values, input_features) if tensor is not None]
    if inputs is None and len(given) != 1:
        raise ValueError(f"give one of inputs, input_values and input_features, not {len(given)} of them")
    return given[0]


def states_to_return(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """Which states of the encoder `generate` returns: the first source that says so decides."""
    names = ("output_attentions", "output_hidden_states")
    return {name: next((of[name] for of in sources if of.get(name) is not None), None) for name in names}


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the encoder, and those with the prefix `decoder_`, without it."""
    prefix = "decoder_"
    return (
        {name: value for name, value in options.items() if not name.startswith(prefix)},
        {name.removeprefix(prefix): value for name, value in options.items() if name.startswith(prefix)},
    )


def seq2seq_output(
    loss: Tensor | None, decoded: Mapping[str, Any], encoded: EncodedSpeech, with_logits: bool, adapted: bool
) -> Seq2SeqLMOutput:
    """The output of the base class; its `encoder_last_hidden_state` can be given back as `encoder_outputs`.

    adapted: by an adapter, which would adapt such frames a second time; a projection would not
    """
    own_frames = encoded.encoder_frames if adapted else None
    return Seq2SeqLMOutput(
        loss=loss,
        logits=decoded["logits"] if with_logits else None,
        past_key_values=decoded.get("past_key_values"),
        decoder_hidden_states=decoded.get("hidden_states"),
        decoder_attentions=decoded.get("attentions"),
        cross_attentions=decoded.get("cross_attentions"),
        encoder_last_hidden_state=encoded.last_hidden_state if own_frames is None else own_frames,
        encoder_hidden_states=encoded.hidden_states,
        encoder_attentions=encoded.attentions,
    )
