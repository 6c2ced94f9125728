"""Transcribes batches and scores the hypotheses."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from sedtrain.batch import Batch
from sedtrain.decoding.generate import DecodingOptions, transcribe_batch
from sedtrain.errors import UserError
from sedtrain.evaluation.intervals import Interval, bootstrap_intervals
from sedtrain.evaluation.metrics import Counts, MetricSet
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder


@dataclass(frozen=True)
class Hypothesis:
    """An utterance's reference, and what the model wrote."""

    id: str
    reference: str
    hypothesis: str


@dataclass(frozen=True)
class Evaluation:
    """Scores of a split: `counts` (N, K) are those of the N hypotheses, `rtfx` is audio seconds per decoding second."""

    metrics: dict[str, Interval]
    hypotheses: list[Hypothesis]
    counts: Counts
    audio_seconds: float
    rtfx: float


def evaluate(
    model: SpeechEncoderDecoder,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[Batch],
    metric_set: MetricSet,
    options: DecodingOptions,
) -> Evaluation:
    """Scores every batch, with bootstrap 95 % intervals. Raises UserError where no utterance could be decoded."""
    num_skipped = 0
    hypotheses: list[Hypothesis] = []
    audio_seconds = decoding_seconds = 0.0
    device = next(model.parameters()).device
    for batch in batches:
        num_skipped += len(batch.skipped)
        if len(batch) == 0:
            continue
        start = time.perf_counter()
        texts = transcribe_batch(model, tokenizer, batch.to(device), options)
        if device.type == "cuda":
            torch.cuda.synchronize()
        decoding_seconds += time.perf_counter() - start
        audio_seconds += batch.seconds
        hypotheses += map(Hypothesis, batch.ids, batch.texts, texts)
    if not hypotheses:
        raise UserError(
            "data",
            f"{num_skipped} utterances",
            "none of the utterances could be decoded: there is nothing to score",
            "write data.path and data.columns of audio that can be read; skipped.jsonl says what is wrong with this",
        )
    counts = metric_set.count([h.reference for h in hypotheses], [h.hypothesis for h in hypotheses])
    metrics = bootstrap_intervals(metric_set, counts)
    rtfx = audio_seconds / max(decoding_seconds, 1e-9)
    return Evaluation(metrics, hypotheses, counts, audio_seconds, rtfx)
