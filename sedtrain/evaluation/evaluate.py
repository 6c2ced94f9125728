"""Decodes a split, scores the hypotheses, and writes results.json, hypotheses.jsonl and report.html."""

import logging
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from math import nan
from pathlib import Path

import torch

from sedtrain.batch import Batch, Utterance
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.decoding.generate import decode_batch
from sedtrain.decoding.options import DecodingOptions
from sedtrain.decoding.recordings import RecordingDecoder
from sedtrain.decoding.searches import loop_of
from sedtrain.errors import UserError
from sedtrain.evaluation.attention_picture import Listening, listen
from sedtrain.evaluation.metric_set import MetricSet
from sedtrain.evaluation.report import write_report
from sedtrain.evaluation.results import (
    Evaluation,
    Hypothesis,
    Results,
    TrainingTotals,
    commit,
    installed_versions,
    write_hypotheses,
)
from sedtrain.evaluation.statistics import Interval, confidence_intervals
from sedtrain.models.saved import SavedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scoring:
    """Settings and components of scoring.

    folder: gets results.json, hypotheses.jsonl and report.html; its metrics.csv is read
    checkpoint: the scored model; None for one that was trained in this folder
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
        """Scores a model on the data and writes the files. Raises UserError if no utterance could be read."""
        saved.model.to(self.device)
        decoder = RecordingDecoder(saved, self.decoding, bounds=data.bounds)
        loop = loop_of(decoder.saved.model, self.decoding)
        logger.info("decoding: by the loop of %s", "transformers, generate" if loop == "generate" else loop)
        evaluation, exact = self.evaluation(decoder, data), None
        if self.decoding.int8:
            logger.info("decoding again in float32, to show what 8 bits cost")
            exact = self.evaluation(replace(decoder, saved=saved, options=replace(self.decoding, int8=False)), data)
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
            not_scored=dict(data.skipped.of_split[self.split].most_common()),
            num_cut=evaluation.num_cut,
            num_empty=sum(not each.reference.strip() for each in evaluation.hypotheses),
            signatures=self.metric_set.signatures(),
            **evaluation.units._asdict(),
            data=data.corpus.described(self.split),
            run_dir=str(self.folder),
            checkpoint=self.checkpoint,
            commit=commit(),
            float32=None if exact is None else exact.metrics,
        )
        results.write(self.folder / "results.json")
        write_hypotheses(self.folder / "hypotheses.jsonl", evaluation, self.metric_set)
        model = f"{saved.model.config.encoder.model_type} + {saved.model.config.decoder.model_type}"
        rows, curves = data.split(self.split), self.folder / "metrics.csv"

        def listen_to(utterance: Hypothesis) -> Listening:
            batch = rows.batch_of(utterance.id, utterance.hypothesis)
            return listen(saved.model, saved.tokenizer, batch.to(self.device))

        labels = [source.label for source in data.corpus.sources]
        page = self.folder / "report.html"
        write_report(page, results, evaluation, curves, rows.audio_of, model, labels, listen_to)
        return results, evaluation

    def evaluation(self, decoder: RecordingDecoder, data: SpeechTextDataModule) -> Evaluation:
        seconds = decoder.window_seconds
        short, long = data.batches(self.split, seconds), data.long_utterances(self.split, seconds)
        return evaluate(decoder, short, long, self.metric_set)


def evaluate(
    decoder: RecordingDecoder, batches: Iterable[Batch], long: Iterable[Utterance], metric_set: MetricSet
) -> Evaluation:
    """Scores every batch, and long utterances by windows. Raises UserError if no utterance could be decoded."""
    model, tokenizer, options = decoder.saved.model, decoder.saved.tokenizer, decoder.options
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
        for id, reference, speaker, language, seconds, found in of_batch:
            (text, score), *others = found.scored_texts
            hypotheses.append(Hypothesis(id, reference, text, speaker, language, seconds, score, tuple(others)))
        num_cut += sum(found.is_cut for found in written)
    for number, each in enumerate(long):
        if number == 0:
            logger.info("utterances longer than %.2f s are decoded by windows", decoder.window_seconds)
        start = time.perf_counter()
        recording = decoder.transcription(each.id, [each.audio.numpy()], each.language, each.task)
        decoding_seconds += time.perf_counter() - start
        audio_seconds += each.seconds
        described = each.id, each.text, recording.text, each.speaker, each.language, each.seconds
        hypotheses.append(Hypothesis(*described))
        num_cut += any(segment.cut_at for segment in recording.segments)
    if not hypotheses:
        wrong = "none of the utterances could be decoded: there is nothing to score"
        write = (
            "write data.path and data.columns of audio that can be read; skipped.jsonl says what is wrong with these"
        )
        raise UserError("data", f"{num_skipped} utterances", wrong, write)
    texts = [h.reference for h in hypotheses], [h.hypothesis for h in hypotheses]
    counts = metric_set.count(*texts)
    metrics = confidence_intervals(metric_set, counts, [each.speaker for each in hypotheses])
    metrics |= {name: Interval(value, nan, nan) for name, value in metric_set.own_values(*texts).items()}
    rtfx = audio_seconds / max(decoding_seconds, 1e-9)
    return Evaluation(metrics, hypotheses, counts, audio_seconds, rtfx, num_cut)
