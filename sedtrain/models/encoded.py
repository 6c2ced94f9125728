"""What goes into the joined model and what comes out of it, in the forms that the base class takes and gives.

B batch, T frames, E encoder width, D decoder width.
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
    attention_mask: (B, T'), 1 where a frame is real, or None where all are
    encoder_frames, encoder_mask: (B, T, E) and (B, T), the encoder's own output
    """

    attention_mask: Tensor | None = None
    encoder_frames: Tensor | None = None
    encoder_mask: Tensor | None = None


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of the encoder, and those with the prefix `decoder_` without it."""
    for_decoder = {name for name in options if name.startswith("decoder_")}
    return (
        {name: value for name, value in options.items() if name not in for_decoder},
        {name.removeprefix("decoder_"): options[name] for name in for_decoder},
    )


def given_input(inputs: Tensor | None, input_values: Tensor | None, input_features: Tensor | None) -> Tensor:
    """`inputs`, else the one of `input_values` and `input_features` that is given."""
    given = [inputs] if inputs is not None else [each for each in (input_values, input_features) if each is not None]
    if len(given) != 1:
        raise ValueError(f"give one of inputs, input_values and input_features, not {len(given)} of them")
    return given[0]


def seq2seq_output(
    loss: Tensor | None, decoded: Mapping[str, Any], encoded: EncodedSpeech, with_logits: bool
) -> Seq2SeqLMOutput:
    return Seq2SeqLMOutput(
        loss=loss,
        logits=decoded["logits"] if with_logits else None,
        past_key_values=decoded.get("past_key_values"),
        decoder_hidden_states=decoded.get("hidden_states"),
        decoder_attentions=decoded.get("attentions"),
        cross_attentions=decoded.get("cross_attentions"),
        encoder_last_hidden_state=encoded.last_hidden_state,
        encoder_hidden_states=encoded.hidden_states,
        encoder_attentions=encoded.attentions,
    )
