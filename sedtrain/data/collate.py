"""Makes padded batches; computes features utterance by utterance, so that they do not depend on the batch.

B batch, S samples, T frames, F features, U target tokens.
"""

import hashlib
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, SequenceFeatureExtractor, WhisperFeatureExtractor

from sedtrain.batch import IGNORE_INDEX, Batch, Skipped, Utterance
from sedtrain.data.features import features_of
from sedtrain.data.sampler import SHORTEST_SECONDS
from sedtrain.text.tags import Tags, WholePrompt
from sedtrain.text.tokenizers import encode_target, encode_whisper

MOST_AROUND = 8
"""Largest number of label ids around a text: the end token, tags, a language code, a first space."""


class Collator:
    """Turns utterances into a Batch with the encoder's feature extractor and the decoder's tokenizer.

    rewrite: normalizes a text before it becomes labels; the batch keeps the original text for scoring
    tags:    stand at the start of the labels and at the end of the prompts
    max_seconds: longest audio that the model takes
    behind_prompt: True if a text continues a prompt, so that the tokenizer must not put a start token before it
    pads:    True if all audio is padded with silence to `max_seconds`, and the model does not mask the silence
    has_keys: True if batches carry fingerprints of their inputs
    """

    def __init__(
        self,
        feature_extractor: SequenceFeatureExtractor,
        tokenizer: PreTrainedTokenizerBase,
        decoder_start_token_id: int,
        rewrite: Callable[[str], str] = str,
        tags: Tags | WholePrompt | None = None,
        max_seconds: float = inf,
        behind_prompt: bool = False,
        pads: bool = False,
        has_keys: bool = False,
    ) -> None:
        self.feature_extractor: Any = feature_extractor
        self.tokenizer = tokenizer
        self.decoder_start_token_id, self.rewrite, self.tags = decoder_start_token_id, rewrite, tags
        self.max_seconds, self.behind_prompt, self.pads, self.has_keys = max_seconds, behind_prompt, pads, has_keys
        self.time_is_last = isinstance(feature_extractor, WhisperFeatureExtractor)

    @property
    def shortest_seconds(self) -> float:
        """The length to which silence pads shorter audio; the first frame of an encoder can span 0.05 s."""
        return self.max_seconds if self.pads else SHORTEST_SECONDS

    @property
    def sampling_rate(self) -> int:
        return int(self.feature_extractor.sampling_rate)

    def __call__(self, utterances: Sequence[Utterance], skipped: Sequence[Skipped] = ()) -> Batch:
        """The padded Batch of `utterances`; a Batch of length 0 if there are none."""
        if not utterances:
            none = torch.zeros(0, 0, dtype=torch.long)
            return Batch(none.float(), none, none, [], [], 0.0, list(skipped))
        features = [self.features(utterance.audio) for utterance in utterances]
        tags = [self.tags.of(utterance.language, utterance.task) if self.tags else [] for utterance in utterances]
        pairs = zip(tags, utterances, strict=True)
        labels = [torch.tensor(ids + self.target(utterance.text)) for ids, utterance in pairs]
        inputs = pad_sequence(features, batch_first=True)
        masks = [torch.ones(len(frames), dtype=torch.long) for frames in features]
        return Batch(
            inputs=inputs.transpose(1, 2) if self.time_is_last else inputs,
            attention_mask=pad_sequence(masks, batch_first=True),
            labels=pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            ids=[utterance.id for utterance in utterances],
            texts=[utterance.text for utterance in utterances],
            seconds=sum(utterance.seconds for utterance in utterances),
            skipped=list(skipped),
            prompts=torch.tensor([[self.decoder_start_token_id, *ids] for ids in tags]) if self.tags else None,
            speakers=[utterance.speaker for utterance in utterances],
            languages=[utterance.language for utterance in utterances],
            durations=[utterance.seconds for utterance in utterances],
            keys=[fingerprint(frames) for frames in features] if self.has_keys else [],
        )

    def dummy_batch(self) -> Batch:
        """A second of silence without text, for a rank that has no utterances left."""
        frames = self.features(torch.zeros(self.sampling_rate))[None]
        return Batch(
            inputs=frames.transpose(1, 2) if self.time_is_last else frames,
            attention_mask=torch.ones(1, frames.shape[1], dtype=torch.long),
            labels=torch.tensor([self.target("")]),
            ids=["silence"],
            texts=[""],
            seconds=1.0,
        )

    def num_tokens(self, text: str) -> int:
        """The number of label ids of a text, tags included."""
        return len(self.target(text)) + (self.tags.number if self.tags else 0)

    def too_long(
        self, text: str, seconds: float, most: int, in_front: Callable[[float], int] | None = None
    ) -> tuple[str, str] | None:
        """Reason and detail if a text has more than `most` label ids, else None.

        in_front: seconds of audio -> the number of those `most` positions that the audio takes

        A text that is clearly short enough is not tokenized. An ASCII character becomes at most one token; another
        character at most 33, the bytes of the longest ligature, written out.
        """
        rewritten, audio = self.rewrite(text), 0 if in_front is None else in_front(seconds)
        if audio + len(rewritten) * (1 if rewritten.isascii() else 33) + MOST_AROUND <= most:
            return None
        number = self.num_tokens(text)
        what, behind = ("audio and text", f" behind {audio} of {seconds:.2f} s") if audio else ("text", "")
        reason = f"{what} too long for the decoder's {most} positions", f"{number} tokens{behind}"
        return reason if audio + number > most else None

    def target(self, text: str) -> list[int]:
        """The label ids of a text, without tags."""
        if isinstance(self.tags, WholePrompt) and self.tags.spaced:
            return encode_whisper(self.tokenizer, self.rewrite(text))
        behind_prompt = self.behind_prompt or isinstance(self.tags, WholePrompt)
        start = None if behind_prompt else self.decoder_start_token_id
        return encode_target(self.tokenizer, self.rewrite(text), start)

    def features(self, audio: Tensor) -> Tensor:
        """(S,) audio -> (S,) normalized audio or (T, F) features, time first; never truncated to 30 s.

        Pads only audio shorter than `shortest_seconds`.
        """
        missing = round(self.sampling_rate * self.shortest_seconds) - len(audio)
        return features_of(self.feature_extractor, pad(audio, (0, missing)) if missing > 0 else audio)


def fingerprint(features: Tensor) -> str:
    """A digest that is the same only for equal features."""
    return hashlib.blake2b(features.contiguous().numpy().data, digest_size=16).hexdigest()
