"""Decodes a split, scores the hypotheses, and writes results.json and report.html."""

import logging
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from sedtrain.batch import Batch
from sedtrain.data.corpus import Corpus
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.decoding.generate import DecodingOptions, decode_batch, loop_of
from sedtrain.errors import UserError
from sedtrain.evaluation.bleu import bleu_tokenizer
from sedtrain.evaluation.intervals import confidence_intervals
from sedtrain.evaluation.metrics import TRANSCRIPTION, TRANSLATION, MetricSet
from sedtrain.evaluation.report import write_report
from sedtrain.evaluation.results import Evaluation, Hypothesis, Results, TrainingTotals, commit, installed_versions
from sedtrain.models.saved import SavedModel
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.text.normalizers import normalizer

logger = logging.getLogger(__name__)
METRICS_OF = {"transcription": TRANSCRIPTION, "translation": TRANSLATION}
"""The metrics of each target, the one that decides first."""


def metric_set(target: str, normalizer_name: str, tokenize: str, corpus: Corpus, splits: Iterable[str]) -> MetricSet:
    """The metrics of a target for these splits of a corpus.

    normalizer_name: rewrites transcriptions; translations are scored as they are
    tokenize:        the tokenizer of BLEU, see `bleu_tokenizer`
    Raises UserError where there is no such normalizer or tokenizer.
    """
    if target == "transcription":
        return MetricSet(TRANSCRIPTION, normalizer(normalizer_name))
    return MetricSet(TRANSLATION, normalizer("none"), bleu_tokenizer(tokenize, corpus, splits))


@dataclass(frozen=True)
class Scoring:
    """Settings and components of scoring.

    target, split: what the texts are, and which of them are scored
    folder: where results.json and report.html go; metrics.csv is read from it
    checkpoint: the model that is scored; None for one that was trained in this folder
    """

    target: str
    split: str
    metric_set: MetricSet
    decoding: DecodingOptions
    device: torch.device
    folder: Path
    checkpoint: str | None = None

    def score(
        self, saved: SavedModel, data: SpeechTextDataModule, train: TrainingTotals | None = None
    ) -> tuple[Results, Evaluation]:
        """Scores a model on the data and writes both files. Raises UserError where no utterance could be read.

        train: what the training cost, where there was one
        """
        saved.model.to(self.device)
        batches = data.batches(self.split)
        loop = loop_of(saved.model, self.decoding)
        logger.info("decoding: by the loop of %s", "transformers, generate" if loop == "generate" else loop)
        evaluation = evaluate(saved.model, saved.tokenizer, batches, self.metric_set, self.decoding)
        results = Results(
            task=self.target,
            split=self.split,
            num_utterances=len(evaluation.hypotheses),
            audio_seconds=evaluation.audio_seconds,
            metrics=evaluation.metrics,
            normalizer=self.metric_set.normalize.label(),
            decoding={**asdict(self.decoding), "loop": loop},
            rtfx=evaluation.rtfx,
            train=train,
            skipped=data.skipped.totals(),
            versions=installed_versions(),
            training_normalizer=saved.training_normalizer,
            not_scored=data.skipped.of_split(self.split),
            num_cut=evaluation.num_cut,
            num_empty=sum(not each.reference.strip() for each in evaluation.hypotheses),
            signatures=self.metric_set.signatures(),
            **evaluation.units._asdict(),
            data=data.corpus.described(self.split),
            run_dir=str(self.folder),
            checkpoint=self.checkpoint,
            commit=commit(),
        )
        results.write(self.folder / "results.json")
        model = f"{saved.model.config.encoder.model_type} + {saved.model.config.decoder.model_type}"
        audio_of, curves = data.split(self.split).audio_of, self.folder / "metrics.csv"
        write_report(self.folder / "report.html", results, evaluation, curves, audio_of, model)
        return results, evaluation


def evaluate(
    model: SpeechEncoderDecoder,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[Batch],
    metric_set: MetricSet,
    options: DecodingOptions,
) -> Evaluation:
    """Scores every batch, with 95 % intervals. Raises UserError where no utterance could be decoded."""
    num_skipped = num_cut = 0
    hypotheses: list[Hypothesis] = []
    audio_seconds = decoding_seconds = 0.0
    device = next(model.parameters()).device
    for batch in batches:
        num_skipped += len(batch.skipped)
        if len(batch) == 0:
            continue
        start = time.perf_counter()
        written = decode_batch(model, tokenizer, batch.to(device), options)
        if device.type == "cuda":
            torch.cuda.synchronize()
        decoding_seconds += time.perf_counter() - start
        audio_seconds += batch.seconds
        of_batch = zip(batch.ids, batch.texts, batch.speakers, batch.languages, batch.durations, written, strict=True)
        hypotheses += [
            Hypothesis(id, reference, found.texts[0], speaker, language, seconds, found.scores and found.scores[0])
            for id, reference, speaker, language, seconds, found in of_batch
        ]
        num_cut += sum(found.is_cut for found in written)
    if not hypotheses:
        raise UserError(
            "data",
            f"{num_skipped} utterances",
            "none of the utterances could be decoded: there is nothing to score",
            "write data.path and data.columns of audio that can be read; skipped.jsonl says what is wrong with this",
        )
    counts = metric_set.count([h.reference for h in hypotheses], [h.hypothesis for h in hypotheses])
    metrics = confidence_intervals(metric_set, counts, [each.speaker for each in hypotheses])
    rtfx = audio_seconds / max(decoding_seconds, 1e-9)
    return Evaluation(metrics, hypotheses, counts, audio_seconds, rtfx, num_cut)
