"""Greedy search over the ONNX graphs of a model, and the check that it writes the ids of `generate`.

B batch, S samples, P prompt, U new tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sedtrain.decoding.generate import prompts_of
from sedtrain.decoding.hypotheses import end_tokens, until_end
from sedtrain.errors import UserError
from sedtrain.export.check_set import check_set, room_of
from sedtrain.models.saved import SavedModel

FORCED_TOKENS = 24
WITHOUT = "write export=folder, whose model transformers and sedtrain load"


def greedy(
    encoder: Any, decoder: Any, inputs: Any, mask: Any, prompt: Any, ends: Sequence[int], most: int, least: int = 0
) -> Any:
    """Ids of each utterance by two sessions of onnxruntime; ids after an end mean nothing.

    (B, S) float32 audio and its mask, (B, P) int64 prompt -> (B, U) ids, U from `least` to `most`
    """
    heard = encoder.run(None, {"input_values": inputs, "attention_mask": mask.astype("int64")})
    places = decoder.get_inputs()
    past = [np.zeros((len(prompt), each.shape[1], 0, each.shape[3]), "float32") for each in places[1 + len(heard) :]]
    ids, new = prompt, prompt
    ended = np.zeros(len(prompt), bool)
    for number in range(1, most + 1):
        values = [new, *heard, *past]
        logits, *past = decoder.run(None, {each.name: value for each, value in zip(places, values, strict=True)})
        if number <= least:
            logits[:, -1, list(ends)] = -np.inf
        new = logits[:, -1:].argmax(-1)
        ids = np.concatenate([ids, new], 1)
        ended |= np.isin(new[:, 0], ends)
        if ended.all():
            break
    return ids[:, prompt.shape[1] :]


def refuse_other_ids(saved: SavedModel, encoder: Any, decoder: Any) -> None:
    """Raises UserError if onnxruntime writes other ids than `generate` for utterances of the embedded corpus.

    Each text is compared up to its end, and again with the end forbidden for FORCED_TOKENS tokens. The last possible token
    is left out, as some families force an end there.
    """
    batch, model, ends = check_set(saved), saved.model, end_tokens(saved.model.generation_config)
    prompt = prompts_of(model, batch)
    room = room_of(saved, prompt)
    for least, most in ((0, room), (min(FORCED_TOKENS, room), min(FORCED_TOKENS, room))):
        settings = {"num_beams": 1, "do_sample": False, "max_new_tokens": most, "min_new_tokens": least or None}
        whole = model.generate(batch.inputs, attention_mask=batch.attention_mask, decoder_input_ids=prompt, **settings)
        arrays = batch.inputs.numpy(), batch.attention_mask.numpy(), prompt.numpy()
        found = greedy(encoder, decoder, *arrays, ends, most, least)
        wanted = [until_end(row, ends) for row in whole[:, prompt.shape[1] :][:, : most - 1].tolist()]
        texts = [until_end(row, ends) for row in found[:, : most - 1].tolist()]
        if wrong := sum(text != each for text, each in zip(texts, wanted, strict=True)):
            words = f"onnxruntime writes other tokens than transformers for {wrong} of {len(wanted)} utterances"
            raise UserError("export.onnx", True, words, WITHOUT)
