"""Utterances and batches, the data that passes between packages.

B batch, S samples, F features, T frames, U target tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Utterance:
    """One (speech, text) pair as read: `audio` is (S,) float32 in -1..1 at `sampling_rate` hertz.

    language: of the text
    task: `transcribe` or `translate`: how the text relates to the speech
    """

    id: str
    audio: Tensor
    sampling_rate: int
    text: str
    language: str | None
    speaker: str | None
    seconds: float
    task: str = "transcribe"


class Skipped(NamedTuple):
    """An utterance that is left out, and why.

    reason: one of a few fixed words, so that reasons can be counted
    path: the audio file, with the offset in bytes inside a larger file; without one, the file of its row
    """

    id: str
    reason: str
    detail: str = ""
    path: str | None = None


@dataclass
class Batch:
    """Padded utterances for the model. Not frozen, since Lightning changes the precision of a copy in place.

    P prompt: the start token and the tags.

    inputs:         (B, S) raw audio, or (B, T, F) or (B, F, T) features, in the layout of the encoder's feature extractor
    attention_mask: (B, S) or (B, T), 1 for real inputs, 0 for padding
    labels:         (B, U) token ids with the end token, padded with IGNORE_INDEX; `losses.shift_right` shifts them later
    ids, texts:     per utterance, its id and its reference
    speakers, languages, durations: per utterance, None if unknown; empty in batches made by hand
    seconds:        audio in the batch, without padding
    skipped:        unreadable utterances, which are not in the batch
    keys:           per utterance, a fingerprint of its inputs; empty without a feature cache
    prompts:        (B, P) start of generation if labels begin with tags, else None
    source:         the same batch in the host's memory, if this one is a copy on another device
    """

    inputs: Tensor
    attention_mask: Tensor
    labels: Tensor
    ids: list[str]
    texts: list[str]
    seconds: float
    skipped: list[Skipped] = field(default_factory=list)
    prompts: Tensor | None = None
    speakers: list[str | None] = field(default_factory=list)
    languages: list[str | None] = field(default_factory=list)
    durations: list[float] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    source: "Batch | None" = None

    @property
    def on_host(self) -> "Batch":
        """The batch in the host's memory: reading its masks and labels does not wait for the device."""
        return self if self.source is None else self.source

    @property
    def padding_mask(self) -> Tensor | None:
        """The attention mask in the host's memory; None without padding, since attention then needs no mask."""
        mask = self.on_host.attention_mask
        return None if bool(mask.all()) else mask

    @property
    def text_labels(self) -> Tensor:
        """The labels without tags, which are not spoken."""
        return self.labels if self.prompts is None else self.labels[:, self.prompts.shape[1] - 1 :]

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> "Batch":
        return replace(self.with_tensors(lambda tensor: tensor.to(device, non_blocking=True)), source=self.on_host)

    def pin_memory(self) -> "Batch":
        """A copy in pinned memory, which a GPU can fetch while it computes. The DataLoader calls this."""
        return self.with_tensors(Tensor.pin_memory)

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **tensors)
