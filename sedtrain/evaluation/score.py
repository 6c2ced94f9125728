"""A saved model scored on a split: results.json and report.html."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.decoding.generate import DecodingOptions
from sedtrain.evaluation.evaluate import Evaluation, evaluate
from sedtrain.evaluation.metrics import TRANSCRIPTION, TRANSLATION, MetricSet
from sedtrain.evaluation.report import write_report
from sedtrain.evaluation.results import Results, TrainingTotals, installed_versions
from sedtrain.models.saved import SavedModel
from sedtrain.text.normalizers import normalizer

METRICS_OF = {"transcription": TRANSCRIPTION, "translation": TRANSLATION}
"""The metrics of each target, the one that decides first."""


def metric_set(target: str, normalizer_name: str) -> MetricSet:
    """The metrics of a target, under a normalizer. Raises UserError where there is no such normalizer."""
    return MetricSet(METRICS_OF[target], normalizer(normalizer_name))


@dataclass(frozen=True)
class Scoring:
    """Settings and components of scoring.

    target, split: what the texts are, and which of them are scored
    folder: where results.json and report.html go; metrics.csv is read from it
    """

    target: str
    split: str
    metric_set: MetricSet
    decoding: DecodingOptions
    device: torch.device
    folder: Path

    def score(
        self, saved: SavedModel, data: SpeechTextDataModule, train: TrainingTotals | None = None
    ) -> tuple[Results, Evaluation]:
        """Scores a model on the data and writes both files. Raises UserError where no utterance could be read.

        train: what the training cost, where there was one
        """
        saved.model.to(self.device)
        batches = data.batches(self.split)
        evaluation = evaluate(saved.model, saved.tokenizer, batches, self.metric_set, self.decoding)
        results = Results(
            task=self.target,
            split=self.split,
            num_utterances=len(evaluation.hypotheses),
            audio_seconds=evaluation.audio_seconds,
            metrics=evaluation.metrics,
            normalizer=self.metric_set.normalize.label(),
            decoding=asdict(self.decoding),
            rtfx=evaluation.rtfx,
            train=train,
            skipped=data.skipped.totals(),
            versions=installed_versions(),
            training_normalizer=saved.training_normalizer,
        )
        results.write(self.folder / "results.json")
        model = f"{saved.model.config.encoder.model_type} + {saved.model.config.decoder.model_type}"
        audio_of, curves = data.split(self.split).audio_of, self.folder / "metrics.csv"
        write_report(self.folder / "report.html", results, evaluation, curves, audio_of, model)
        return results, evaluation
