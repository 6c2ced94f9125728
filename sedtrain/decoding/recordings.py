"""Decodes recordings of any length: their windows, in batches, by a saved model."""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from math import isinf

import torch

from sedtrain.batch import Batch, Utterance
from sedtrain.data.buckets import Bounds
from sedtrain.data.collate import Collator
from sedtrain.data.memory import return_freed_memory
from sedtrain.data.sampler import DurationBatches
from sedtrain.decoding.collator import collator_of
from sedtrain.decoding.generate import decode_batch
from sedtrain.decoding.hypotheses import Hypotheses
from sedtrain.decoding.options import DecodingOptions
from sedtrain.decoding.timestamps import FrameTimes, timed
from sedtrain.decoding.transcription import Segment, Transcription
from sedtrain.decoding.windows import Activity, Samples, Window, activity_of, joined, windows_of
from sedtrain.models.int8 import in_int8
from sedtrain.models.saved import SavedModel
from sedtrain.models.whole import heard_languages
from sedtrain.text.tags import WholePrompt

DEFAULT_SECONDS = 30.0
NUM_HELD = 32  # windows in memory, from which batches of similar lengths are made
SURE = 0.5  # least support by CTC for a text without doubt; the demo's model: speech 0.7 to 1, noise and music 0 to 0.5
REPETITIVE = 2.4  # compression ratio of a text that repeats itself; Radford et al. 2022 (arXiv 2212.04356), section 4.5


class Recording:
    """A recording while it is decoded: its windows, read one by one, and the segments so far.

    blocks: its samples at the rate of the decoder's collator
    """

    def __init__(
        self,
        decoder: "RecordingDecoder",
        name: str,
        blocks: Iterable[Samples],
        language: str | None = None,
        task: str = "transcribe",
        with_words: bool = False,
    ) -> None:
        self.name, self.language, self.task, self.with_words = name, language, task, with_words
        self.rate, self.num_samples = decoder.collator.sampling_rate, 0
        self.windows = windows_of(self.counted(blocks), self.rate, decoder.window_seconds, decoder.activity)
        self.decoded: list[tuple[Segment, float | None]] = []

    def counted(self, blocks: Iterable[Samples]) -> Iterator[Samples]:
        for block in blocks:
            self.num_samples += len(block)
            yield block

    def add(self, window: Window, segment: Segment, confidence: float | None) -> None:
        """Takes the text of the next window."""
        if window.overlaps and self.decoded:
            before, of_before = self.decoded.pop()
            before, segment = joined(before, segment)
            self.decoded.append((before, of_before))
        self.decoded.append((segment, confidence))

    def transcription(self) -> Transcription:
        """The texts so far. A window in which CTC hears nothing has no text, if CTC hears something in another window."""
        hears = any(confidence for _, confidence in self.decoded)
        segments = [segment for segment, confidence in self.decoded if confidence != 0 or not hears]
        return Transcription(self.name, self.num_samples / self.rate, tuple(segments))


@dataclass(frozen=True)
class RecordingDecoder:
    """A saved model with the options of its search and the bounds of a batch of windows; words need a CTC head."""

    saved: SavedModel
    options: DecodingOptions
    with_words: bool = False
    bounds: Bounds = field(default_factory=Bounds)

    def __post_init__(self) -> None:
        if self.options.int8:
            object.__setattr__(self, "saved", replace(self.saved, model=in_int8(self.saved.model)))

    @cached_property
    def activity(self) -> Activity:
        return activity_of(self.options.pauses)

    @cached_property
    def collator(self) -> Collator:
        return collator_of(self.saved, detects=True)

    @property
    def window_seconds(self) -> float:
        """Longest audio that is decoded at once."""
        learnt = self.saved.max_training_seconds
        return min(self.options.window or (DEFAULT_SECONDS if isinf(learnt) else learnt), self.collator.max_seconds)

    def transcription(
        self, name: str, blocks: Iterable[Samples], language: str | None = None, task: str = "transcribe"
    ) -> Transcription:
        """The text of a recording, from its samples at the rate of the collator."""
        recording = Recording(self, name, blocks, language, task, self.with_words)
        while windows := list(islice(recording.windows, NUM_HELD)):
            if len(windows) > 1:
                self.find_language(recording, windows[0])
            self.add_texts([(recording, window) for window in windows])
        return recording.transcription()

    def add_texts(self, windows: Sequence[tuple[Recording, Window]], returns_memory: bool = True) -> None:
        """Decodes windows of one or more recordings in batches of similar length, and adds their texts in the given order.

        returns_memory: gives freed memory back to the system after each batch, which takes a fifth of a small model's time
        """
        bounds = replace(self.bounds, shortest_seconds=self.collator.shortest_seconds)
        seconds = [len(window.samples) / self.collator.sampling_rate for _, window in windows]
        found: dict[int, Hypotheses] = {}
        for batch in DurationBatches(seconds, bounds, shuffle=False, tokens=[0] * len(windows)):
            found |= zip(batch, self.decode([windows[number] for number in batch]), strict=True)
            if returns_memory:
                return_freed_memory()
        for number, (recording, window) in enumerate(windows):
            recording.add(window, self.segment(window, found[number]), found[number].confidence)

    def batch_of(self, windows: Sequence[tuple[Recording, Window]]) -> Batch:
        rate = self.collator.sampling_rate
        utterances = []
        for recording, window in windows:
            audio, seconds = torch.from_numpy(window.samples), len(window.samples) / rate
            utterances.append(Utterance("", audio, rate, "", recording.language, None, seconds, recording.task))
        return self.collator(utterances).to(self.saved.model.device)

    def find_language(self, recording: Recording, window: Window) -> None:
        """Sets a recording's language to the one that Whisper hears in this window, unless something names a language."""
        tags, model = self.collator.tags, self.saved.model
        if recording.language or not (isinstance(tags, WholePrompt) and tags.detects) or tags.language:
            return
        batch = self.batch_of([(recording, window)])
        with torch.inference_mode():
            found = heard_languages(model, model.encode(batch.inputs, batch.attention_mask))
        languages = tags.ids[recording.task].items()
        recording.language = next(language for language, ids in languages if ids[0] == int(found))

    def decode(self, windows: Sequence[tuple[Recording, Window]]) -> list[Hypotheses]:
        """The texts of windows, decoded as one batch; with words if any recording wants them."""
        batch, saved = self.batch_of(windows), self.saved
        with_words = any(recording.with_words for recording, _ in windows)
        return decode_batch(saved.model, saved.tokenizer, batch, self.options, True, with_words)

    def segment(self, window: Window, found: Hypotheses) -> Segment:
        rate, words = self.collator.sampling_rate, None
        start, ((best, score), *others) = window.start / rate, found.scored_texts
        if found.words is not None:
            inside = timed(found.words, torch.from_numpy(window.samples), rate, FrameTimes.of(self.saved))
            words = tuple(replace(each, start=start + each.start, end=start + each.end) for each in inside)
        return Segment(
            text=best,
            start=start,
            end=start + len(window.samples) / rate,
            score=score,
            words=words,
            others=tuple(others),
            cut_at=found.limit if found.is_cut else 0,
            doubt=doubt(best, found.support),
        )


def doubt(text: str, support: float | None) -> str | None:
    """A reason to doubt a text: CTC does not hear it, or it repeats itself."""
    written = text.encode()
    if text and support is not None and support < SURE:
        return f"CTC supports it by {support:.2f} of 1, as in noise or music"
    if len(written) > REPETITIVE * len(zlib.compress(written)):
        return "it repeats itself"
    return None
