"""What a command does: train, evaluate, transcribe."""

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import transformers
from omegaconf import DictConfig, OmegaConf

from sedtrain import build, terminal
from sedtrain.batch import UserError, Utterance
from sedtrain.data.collate import Collator
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.data.sources import UNREADABLE, audio_paths, read_audio
from sedtrain.decoding.generate import transcribe_batch
from sedtrain.evaluation.evaluate import evaluate
from sedtrain.evaluation.report import write_report
from sedtrain.evaluation.results import Results, TrainingTotals, installed_versions
from sedtrain.export import SavedModel, write_model_card

logger = logging.getLogger(__name__)
transformers.utils.logging.disable_progress_bar()

LEFT_BEHIND = (
    "model",
    "checkpoints/best.ckpt",
    "checkpoints/last.ckpt",
    "results.json",
    "report.html",
    "metrics.csv",
    "config.yaml",
    "skipped.jsonl",
    "sedtrain.log",
)


class Interrupted(Exception):
    """Training was stopped by Ctrl-C; a checkpoint is written."""


def train(cfg: DictConfig) -> None:
    """Trains, keeps the best weights as a Hugging Face folder, and scores them on the test split."""
    run = build.training_run(cfg)
    if run.trainer.is_global_zero:
        OmegaConf.save(cfg, run.folder / "config.yaml", resolve=True)
        terminal.show(terminal.plan(*run.plan()))
    run.trainer.fit(run.module, datamodule=run.data)
    if not run.trainer.is_global_zero:
        return
    run.load_best()
    run.saved.save(run.folder / "model", run.module.decoding)
    if run.interrupted():
        raise Interrupted(
            f"stopped at step {run.trainer.global_step}; saved in {run.folder}: model, checkpoints/last.ckpt"
        )
    results = score(cfg, run.saved, run.data, run.totals())
    write_model_card(run.folder / "model", run.saved, results, cfg.data.path)


def evaluate_checkpoint(cfg: DictConfig) -> None:
    """Scores a saved model on a split."""
    OmegaConf.save(cfg, Path(cfg.run_dir) / "config.yaml", resolve=True)
    saved, data = build.restored(cfg)
    score(cfg, saved, data, train=None)


def score(cfg: DictConfig, saved: SavedModel, data: SpeechTextDataModule, train: TrainingTotals | None) -> Results:
    """Evaluates on `cfg.split`; writes results.json and report.html, shows the tables."""
    metric_set, options = build.metric_set(cfg), build.decoding_options(cfg)
    evaluation = evaluate(saved.model, saved.tokenizer, data.batches(cfg.split), metric_set, options)
    results = Results(
        task=cfg.target,
        split=cfg.split,
        num_utterances=len(evaluation.hypotheses),
        audio_seconds=evaluation.audio_seconds,
        metrics=evaluation.metrics,
        normaliser=metric_set.normalise.label(),
        decoding=asdict(options),
        rtfx=evaluation.rtfx,
        train=train,
        skipped=dict(data.skipped),
        versions=installed_versions(),
    )
    folder = Path(cfg.run_dir)
    results.write(folder / "results.json")
    parts = f"{saved.model.config.encoder.model_type} + {saved.model.config.decoder.model_type}"
    audio_of = data.split(cfg.split).audio_of
    write_report(folder / "report.html", results, evaluation, folder / "metrics.csv", audio_of, parts)
    terminal.show(
        terminal.scores(evaluation, cfg.split), terminal.examples(evaluation), terminal.places(folder, LEFT_BEHIND)
    )
    return results


def transcribe(cfg: DictConfig) -> None:
    """Prints `path<TAB>text` for every audio file."""
    paths = audio_paths(cfg.audio)
    saved = build.saved_model(cfg)
    collator = Collator(saved.feature_extractor, saved.tokenizer, saved.model.config.decoder_start_token_id)
    options = build.decoding_options(cfg)
    for path in paths:
        try:
            audio = read_audio(path, collator.sampling_rate)
        except UNREADABLE as error:
            raise UserError(f"audio={path}: {error}", "audio=FILE that can be read to its end") from error
        seconds = len(audio) / collator.sampling_rate
        utterance = Utterance(path, audio, collator.sampling_rate, "", None, None, seconds)
        [text] = transcribe_batch(saved.model, saved.tokenizer, collator([utterance]), options)
        print(f"{path}\t{text}", flush=True)


TASKS: dict[str, Callable[[DictConfig], None]] = {
    "train": train,
    "evaluate": evaluate_checkpoint,
    "transcribe": transcribe,
}
