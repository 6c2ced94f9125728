"""Texts of recordings of any length by a saved model: its windows, decoded in batches."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from math import ceil, isinf

import torch

from sedtrain.batch import Batch, Utterance
from sedtrain.data.buckets import Bounds
from sedtrain.data.collate import Collator
from sedtrain.data.memory import return_freed_memory
from sedtrain.data.sampler import DurationBatches
from sedtrain.decoding.generate import decode_batch
from sedtrain.decoding.hypotheses import Hypotheses
from sedtrain.decoding.options import DecodingOptions
from sedtrain.decoding.pauses import Samples, activity_of
from sedtrain.decoding.timestamps import FrameTimes, adapted_frames, frames_per_second, timed
from sedtrain.decoding.transcription import Segment, Transcription
from sedtrain.decoding.windows import Window, joined, windows_of
from sedtrain.models.int8 import in_int8
from sedtrain.models.prefix import is_prefixed, num_in_front
from sedtrain.models.saved import SPARE_TOKENS, SavedModel
from sedtrain.models.whole import heard_languages
from sedtrain.text.tags import WholePrompt

DEFAULT_SECONDS = 30.0
NUM_HELD = 32  # windows at once, from which batches of similar lengths are made
SURE = 0.5  # confidence; with the demo's model, speech has 0.65 to 1, noise and music 0 to 0.6
REPETITIVE = 2.4  # bytes of a text per byte when compressed; Radford et al. 2022 (arXiv 2212.04356), section 4.5


def positions_of_audio(saved: SavedModel) -> Callable[[float], int] | None:
    """Positions at most that prompt and audio of so many seconds take in front of a text; None: it takes none."""
    config = saved.model.config.decoder
    if not is_prefixed(config):
        return None
    rate, of_one_frame = frames_per_second(saved), adapted_frames(saved, 1)
    return lambda seconds: num_in_front(config, ceil(rate * seconds) + of_one_frame)


def longest_audio(saved: SavedModel) -> float:
    """Seconds that the encoder takes, and that leave a text some of the decoder's positions."""
    in_front, most = positions_of_audio(saved), saved.model.max_tokens
    if in_front is None or most is None:
        return saved.max_seconds
    return min(saved.max_seconds, max(0.1, (most - SPARE_TOKENS - in_front(0.0)) / frames_per_second(saved)))


def collator_of(saved: SavedModel, rewrite: Callable[[str], str] = str, detects: bool = False) -> Collator:
    """What makes batches for a saved model.

    rewrite: normalizes texts before they become labels
    detects: leaves languages that nothing names to a model that can find them: Whisper
    """
    tags = saved.tags
    if detects and saved.is_whisper and isinstance(tags, WholePrompt):
        tags = replace(tags, detects=bool(tags.ids))
    return Collator(
        saved.feature_extractor,
        saved.tokenizer,
        saved.model.config.decoder_start_token_id,
        rewrite,
        tags,
        longest_audio(saved),
        behind_prompt=is_prefixed(saved.model.config.decoder),
        pads=saved.is_whisper,
    )


@dataclass(frozen=True)
class RecordingDecoder:
    """A saved model with the options of its search and what bounds a batch of windows; words need a CTC head."""

    saved: SavedModel
    options: DecodingOptions
    with_words: bool = False
    bounds: Bounds = field(default_factory=Bounds)

    def __post_init__(self) -> None:
        if self.options.int8:
            object.__setattr__(self, "saved", replace(self.saved, model=in_int8(self.saved.model)))

    @cached_property
    def collator(self) -> Collator:
        return collator_of(self.saved, detects=True)

    @property
    def window_seconds(self) -> float:
        """Length up to which audio is decoded at once."""
        learnt = self.saved.max_training_seconds
        return min(self.options.window or (DEFAULT_SECONDS if isinf(learnt) else learnt), self.collator.max_seconds)

    def transcription(
        self, name: str, blocks: Iterable[Samples], language: str | None = None, task: str = "transcribe"
    ) -> Transcription:
        """The text of a recording from its samples at the rate of the collator.

        Where CTC hears nothing in a window, although it hears words in others, there is no text.
        """
        rate, num_samples = self.collator.sampling_rate, 0

        def counted() -> Iterator[Samples]:
            nonlocal num_samples
            for block in blocks:
                num_samples += len(block)
                yield block

        windows = windows_of(counted(), rate, self.window_seconds, activity_of(self.options.pauses))
        decoded: list[tuple[Segment, float | None]] = []
        for window, found in self.decoded(windows, language, task):
            segment = self.segment(window, found)
            if window.overlaps and decoded:
                before, confidence = decoded.pop()
                before, segment = joined(before, segment)
                decoded.append((before, confidence))
            decoded.append((segment, found.confidence))
        hears = any(confidence for _, confidence in decoded)
        segments = [segment for segment, confidence in decoded if confidence != 0 or not hears]
        return Transcription(name, num_samples / rate, tuple(segments))

    def decoded(
        self, windows: Iterator[Window], language: str | None, task: str
    ) -> Iterator[tuple[Window, Hypotheses]]:
        """The windows with their texts, in order of time; those of similar length are decoded together."""
        bounds = replace(self.bounds, shortest_seconds=self.collator.shortest_seconds)
        while held := list(islice(windows, NUM_HELD)):
            language = language or (self.language_of(held[0], task) if len(held) > 1 else None)
            seconds = [len(each.samples) / self.collator.sampling_rate for each in held]
            found: dict[int, Hypotheses] = {}
            for batch in DurationBatches(seconds, bounds, shuffle=False, tokens=[0] * len(held)):
                found |= zip(batch, self.decode([held[number] for number in batch], language, task), strict=True)
                return_freed_memory()
            yield from ((window, found[number]) for number, window in enumerate(held))

    def batch_of(self, windows: list[Window], language: str | None, task: str) -> Batch:
        rate = self.collator.sampling_rate
        utterances = [
            Utterance("", torch.from_numpy(each.samples), rate, "", language, None, len(each.samples) / rate, task)
            for each in windows
        ]
        return self.collator(utterances).to(self.saved.model.device)

    def language_of(self, window: Window, task: str) -> str | None:
        """The language that Whisper hears first in a recording is that of all its windows; None where none is looked for."""
        tags, model = self.collator.tags, self.saved.model
        if not (isinstance(tags, WholePrompt) and tags.detects) or tags.language:
            return None
        batch = self.batch_of([window], None, task)
        with torch.inference_mode():
            found = heard_languages(model, model.encode(batch.inputs, batch.attention_mask))
        return next(language for language, ids in tags.ids[task].items() if ids[0] == int(found))

    def decode(self, windows: list[Window], language: str | None, task: str) -> list[Hypotheses]:
        batch, saved = self.batch_of(windows, language, task), self.saved
        return decode_batch(saved.model, saved.tokenizer, batch, self.options, True, self.with_words)

    def segment(self, window: Window, found: Hypotheses) -> Segment:
        rate, words = self.collator.sampling_rate, None
        start, (best, *others) = window.start / rate, found.texts
        if found.words is not None:
            inside = timed(found.words, torch.from_numpy(window.samples), rate, FrameTimes.of(self.saved))
            words = tuple(replace(each, start=start + each.start, end=start + each.end) for each in inside)
        return Segment(
            text=best,
            start=start,
            end=start + len(window.samples) / rate,
            score=found.scores[0] if found.scores else None,
            words=words,
            others=tuple(others),
            cut_at=found.limit if found.is_cut else 0,
            doubt=doubt(best, found.confidence),
        )


def doubt(text: str, confidence: float | None) -> str | None:
    """A reason to doubt a text: CTC does not hear it, or it repeats itself."""
    written = text.encode()
    if text and confidence is not None and confidence < SURE:
        return f"CTC gives its tokens a mean probability of {confidence:.2f}, as in noise or music"
    if len(written) > REPETITIVE * len(zlib.compress(written)):
        return "it repeats itself"
    return None
