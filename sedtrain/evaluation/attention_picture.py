"""Shows the frames that the decoder attends to while it writes a text, and the times at which CTC hears its tokens.

U tokens, T frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sedtrain.batch import Batch
from sedtrain.decoding.alignment import align
from sedtrain.decoding.ctc import lattice_of_tokens
from sedtrain.models.encoder import EncodedSpeech
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.models.whole import with_heard_languages

MOST_SECONDS, MOST_TOKENS = 30.0, 60  # longest utterance that is looked at; first tokens of its text


@dataclass(frozen=True)
class Listening:
    """One utterance of `seconds` and the tokens of a text.

    attention: (U, T) cross-attention, the mean of all heads and layers; None if the decoder gives no weights
    spans:     start and end of each token in seconds, by CTC; None without a CTC head, and for a text that cannot be aligned
    """

    seconds: float
    tokens: list[str]
    attention: NDArray[np.float32] | None
    spans: list[tuple[float, float]] | None


@torch.inference_mode()
def listen(model: SpeechEncoderDecoder, tokenizer: PreTrainedTokenizerBase, batch: Batch) -> Listening:
    """Looks at the first tokens of the labels in a batch of one utterance."""
    num_tags = batch.labels.shape[1] - batch.text_labels.shape[1]
    labels = batch.labels[:, : num_tags + MOST_TOKENS]
    text = [token for token in batch.text_labels[0].tolist() if token != model.config.eos_token_id]
    encoded = model.encode(batch.inputs, batch.attention_mask)
    labels = with_heard_languages(model, encoded, labels)
    attention, spans = cross_attention(model, encoded, labels), ctc_spans(model, encoded, text, batch.seconds)
    shown = text[:MOST_TOKENS]
    return Listening(
        batch.seconds,
        [tokenizer.decode([token]) for token in shown],
        None if attention is None else attention[num_tags:][: len(shown)].numpy(),
        spans and spans[:MOST_TOKENS],
    )


def cross_attention(model: SpeechEncoderDecoder, encoded: EncodedSpeech, labels: Tensor) -> Tensor | None:
    """(1, U) labels -> (U, T) attention weights; None if the decoder gives none."""
    inputs = model.prepare_decoder_input_ids_from_labels(labels)
    wanted = {"output_attentions": True, "output_logits": False, "use_cache": False}
    config = model.decoder.config
    chosen, config._attn_implementation = config._attn_implementation, "eager"  # the only one that gives weights
    try:
        output = model(encoder_outputs=encoded, decoder_input_ids=inputs, **wanted)
    finally:
        config._attn_implementation = chosen
    layers = [layer for layer in output.cross_attentions or () if layer is not None]
    if not layers:
        return None
    weights = torch.stack([layer[0].float().mean(0) for layer in layers]).mean(0).cpu()
    return weights if encoded.attention_mask is None else weights[:, encoded.attention_mask[0].bool().cpu()]


def ctc_spans(
    model: SpeechEncoderDecoder, encoded: EncodedSpeech, text: Sequence[int], seconds: float
) -> list[tuple[float, float]] | None:
    """Start and end of each token by CTC."""
    if model.ctc_head is None or not text or max(text) >= model.ctc_head.out_features:
        return None
    columns = [model.config.pad_token_id, *sorted({*text})]
    lattice = lattice_of_tokens(model, encoded, columns)
    [aligned] = align(lattice, [[columns.index(token, 1) for token in text]])
    scale = seconds / int(lattice.num_frames[0])
    return None if aligned is None else [(token.start * scale, token.end * scale) for token in aligned]
