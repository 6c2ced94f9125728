"""Utterances of the embedded corpus by which a model is checked before it is exported, and what is said of their texts.

B batch, P tokens of a prompt.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow.parquet
import torch
from torch import Tensor

from sedtrain.batch import Batch, Utterance
from sedtrain.data.audio import audio_blocks
from sedtrain.data.paths import EMBEDDED
from sedtrain.decoding.recordings import collator_of
from sedtrain.evaluation.metrics import count_edits
from sedtrain.models.saved import SavedModel
from sedtrain.text.tags import WholePrompt

NUM_CHECKED, MOST_TOKENS = 6, 100


def check_set(saved: SavedModel, number: int = NUM_CHECKED) -> Batch:
    """The first utterances of the embedded corpus, padded, with the prompt of the first language and task that there are."""
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


def prompts_of(saved: SavedModel, batch: Batch) -> Tensor:
    """(B, P) tokens in front of each text."""
    return (
        torch.full((len(batch), 1), saved.model.config.decoder_start_token_id)
        if batch.prompts is None
        else batch.prompts
    )


def room_of(saved: SavedModel, prompts: Tensor) -> int:
    """Tokens that a text of a check may have."""
    most = saved.model.max_tokens
    return MOST_TOKENS if most is None else min(MOST_TOKENS, most - prompts.shape[1])


def compared(wanted: Sequence[str], found: Sequence[str]) -> str:
    """How many texts are the same, and how many words have to be edited in the others."""
    pairs = [*zip(wanted, found, strict=True)]
    same, words = sum(one == two for one, two in pairs), sum(len(one.split()) for one in wanted)
    edits = sum(sum(count_edits(one.split(), two.split())[:3]) for one, two in pairs)
    texts = f"{same} of {len(pairs)} utterances of the embedded corpus have the text of float32"
    return f"In 8 bits, {texts}; {edits} of {words} words differ"
