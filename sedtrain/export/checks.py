"""Checks an export: the embedded utterances for it, and a comparison of onnxruntime's texts with those of `generate`.

B batch, S samples, P prompt, U new tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from torch import Tensor

from sedtrain.batch import Batch, Utterance
from sedtrain.data.audio import audio_blocks
from sedtrain.data.paths import EMBEDDED
from sedtrain.decoding.collator import collator_of
from sedtrain.decoding.generate import prompts_of
from sedtrain.decoding.hypotheses import end_tokens, until_end
from sedtrain.errors import UserError
from sedtrain.evaluation.metrics import count_edits
from sedtrain.models.saved import SavedModel
from sedtrain.text.tags import WholePrompt

NUM_CHECKED, MOST_TOKENS = 6, 100
FORCED_TOKENS = 24
WITHOUT = "write export=folder, whose model transformers and sedtrain load"


def check_set(saved: SavedModel, number: int = NUM_CHECKED) -> Batch:
    """The first utterances of the embedded corpus, padded, with the prompt of the model's first task and language."""
    collator, tags = collator_of(saved), saved.tags
    task, language = "transcribe", None
    if tags and tags.ids:
        task = task if task in tags.ids else next(iter(tags.ids))
        own = tags.language if isinstance(tags, WholePrompt) else None
        language = own or next(iter(tags.ids[task]))
    cells = pyarrow.parquet.read_table(EMBEDDED / "test.parquet", columns=["audio"]).slice(0, number)["audio"]
    utterances = []
    for cell in cells.to_pylist():
        samples = torch.from_numpy(np.concatenate(list(audio_blocks(cell, collator.sampling_rate))))
        seconds = len(samples) / collator.sampling_rate
        utterances.append(Utterance("", samples, collator.sampling_rate, "", language, None, seconds, task))
    return collator(utterances)


def room_of(saved: SavedModel, prompts: Tensor) -> int:
    """Most tokens of a text in a check."""
    most = saved.model.max_tokens
    return MOST_TOKENS if most is None else min(MOST_TOKENS, most - prompts.shape[1])


def compared(wanted: Sequence[str], found: Sequence[str]) -> str:
    """A sentence about how many texts are equal and how many words differ."""
    pairs = [*zip(wanted, found, strict=True)]
    same, words = sum(one == two for one, two in pairs), sum(len(one.split()) for one in wanted)
    edits = sum(sum(count_edits(one.split(), two.split())[:3]) for one, two in pairs)
    texts = f"{same} of {len(pairs)} utterances of the embedded corpus have the text of float32"
    return f"In 8 bits, {texts}; {edits} of {words} words differ"


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
