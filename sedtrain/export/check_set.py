"""Utterances of the embedded corpus that check a model before it is exported, and a comparison of their texts."""

from collections.abc import Sequence

import numpy as np
import pyarrow.parquet
import torch
from torch import Tensor

from sedtrain.batch import Batch, Utterance
from sedtrain.data.audio import audio_blocks
from sedtrain.data.paths import EMBEDDED
from sedtrain.decoding.collator import collator_of
from sedtrain.evaluation.metrics import count_edits
from sedtrain.models.saved import SavedModel
from sedtrain.text.tags import WholePrompt

NUM_CHECKED, MOST_TOKENS = 6, 100


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
