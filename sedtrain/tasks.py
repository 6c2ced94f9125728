"""What a command does: train, evaluate, transcribe, inspect, fit_batches."""

import logging
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from omegaconf import DictConfig, OmegaConf

from sedtrain import build, terminal
from sedtrain.batch import Utterance
from sedtrain.config.instantiate import create
from sedtrain.data.audio import UNREADABLE, read_audio
from sedtrain.data.collate import Collator
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.data.sources import audio_paths
from sedtrain.decoding.generate import DecodingOptions, transcribe_batch
from sedtrain.errors import Unfinished, UserError
from sedtrain.evaluation.evaluate import evaluate
from sedtrain.evaluation.report import write_report
from sedtrain.evaluation.results import Results, TrainingTotals, installed_versions
from sedtrain.export import SavedModel, write_model_card
from sedtrain.inspection.report import tables, write_page
from sedtrain.inspection.summary import inspected
from sedtrain.run_dir import config_of
from sedtrain.text.normalizers import normalizer
from sedtrain.text.tags import TASK_OF
from sedtrain.training.fit_batches import fitted_batches, write_batches
from sedtrain.training.loggers import log_scores
from sedtrain.training.resume import plain, starting_point

logger = logging.getLogger(__name__)
transformers.utils.logging.disable_progress_bar()

LEFT_BEHIND = (
    "model",
    "checkpoints/best.ckpt",
    "checkpoints/last.ckpt",
    "results.json",
    "report.html",
    "metrics.csv",
    "tensorboard",
    "wandb",
    "config.yaml",
    "skipped.jsonl",
    "sedtrain.log",
)
INSPECTED = ("inspect.html", "inspect.json", "skipped.jsonl", "sedtrain.log")
FITTED = ("batches.yaml", "skipped.jsonl", "sedtrain.log")
OF_FITTING = ("task", "memory_gb", "inspect_utterances", "run_dir", "data.batches")
"""Options that are not those of the training whose batches are looked for."""
TOLERANT = {"on_bad_utterance": "skip", "max_bad_fraction": 1.0}
"""Options of the data by which bad utterances are counted, and none of them is the end."""


class Interrupted(Unfinished):
    """Training was stopped by a signal; a checkpoint is written. The status is that of a command which the signal ends."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 128 + number


def train(cfg: DictConfig) -> None:
    """Trains, keeps the best weights as a Hugging Face folder, and scores them on the test split."""
    start = starting_point(cfg)
    run = build.training_run(cfg)
    if run.trainer.is_global_zero:
        keep_configuration(cfg)
        terminal.show(terminal.plan(*run.plan()))
    run.fit(start)
    if not run.trainer.is_global_zero:
        return
    run.load_best()
    run.saved.save(run.folder / "model", run.module.decoding)
    if number := run.stopped_by():
        raise Interrupted(
            f"stopped at step {run.trainer.global_step}; saved in {run.folder}: model, checkpoints/last.ckpt\n"
            "  resume=auto with this run_dir goes on from there",
            number,
        )
    with torch.compiler.set_stance("force_eager"):  # each token's layers would be compiled anew
        results = score(cfg, run.saved, run.data, run.totals())
    log_scores(run.trainer, results)
    write_model_card(run.folder / "model", run.saved, results, run.data.corpus.public_name)


def keep_configuration(cfg: DictConfig) -> None:
    """Writes config.yaml, with the data as it is found from any folder."""
    kept, unfinished = config_of(cfg.run_dir), Path(cfg.run_dir) / "config.yaml.unfinished"
    with unfinished.open("w", encoding="utf-8") as file:
        OmegaConf.save(OmegaConf.create(plain(cfg)), file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(kept)


def evaluate_checkpoint(cfg: DictConfig) -> None:
    """Scores a saved model on a split."""
    keep_configuration(cfg)
    saved, data = build.restored(cfg)
    score(cfg, saved, data, train=None)


def score(cfg: DictConfig, saved: SavedModel, data: SpeechTextDataModule, train: TrainingTotals | None) -> Results:
    """Evaluates on `cfg.split`; writes results.json and report.html, shows the tables."""
    metric_set, options = build.metric_set(cfg), build.decoding_options(cfg)
    saved.model.to(build.device(cfg))
    evaluation = evaluate(saved.model, saved.tokenizer, data.batches(cfg.split), metric_set, options)
    results = Results(
        task=cfg.target,
        split=cfg.split,
        num_utterances=len(evaluation.hypotheses),
        audio_seconds=evaluation.audio_seconds,
        metrics=evaluation.metrics,
        normalizer=metric_set.normalize.label(),
        decoding=asdict(options),
        rtfx=evaluation.rtfx,
        train=train,
        skipped=data.skipped.totals(),
        versions=installed_versions(),
        training_normalizer=saved.training_normalizer,
    )
    folder = Path(cfg.run_dir)
    results.write(folder / "results.json")
    parts = f"{saved.model.config.encoder.model_type} + {saved.model.config.decoder.model_type}"
    audio_of = data.split(cfg.split).audio_of
    write_report(folder / "report.html", results, evaluation, folder / "metrics.csv", audio_of, parts)
    terminal.show(
        terminal.scores(evaluation, cfg.split),
        terminal.examples(evaluation),
        terminal.left_out(results.skipped),
        terminal.places(folder, LEFT_BEHIND),
    )
    return results


def transcribe(cfg: DictConfig) -> None:
    """Prints `path<TAB>text` for every audio file; of several, one that cannot be transcribed stops no other."""
    paths = audio_paths(cfg.audio)
    saved = build.saved_model(cfg)
    refuse_unlearnt(cfg, saved)
    saved.model.to(build.device(cfg))
    start = saved.model.config.decoder_start_token_id
    collator = Collator(saved.feature_extractor, saved.tokenizer, start, tags=saved.tags)
    options = build.decoding_options(cfg)
    num_failed = 0
    for path in paths:
        try:
            print(f"{path}\t{transcription(cfg, path, saved, collator, options)}", flush=True)
        except UserError as error:
            if len(paths) == 1:
                raise
            which = f"audio={path}: "
            logger.error(which + error.what_is_wrong.removeprefix(which))
            num_failed += 1
    if num_failed:
        raise Unfinished(f"{num_failed} of {len(paths)} files could not be transcribed")


def refuse_unlearnt(cfg: DictConfig, saved: SavedModel) -> None:
    """Raises UserError where the model never learnt to write what `target` and `data.language` ask for."""
    if saved.tags is not None:
        saved.tags.of(cfg.data.get("language"), TASK_OF[cfg.target])
    elif language := cfg.data.get("language"):
        raise UserError(
            f"data.language={language}: this model was trained without data.tags, so that it cannot be asked for a language",
            "a checkpoint that was trained with data.tags=true, or no data.language",
        )


def transcription(cfg: DictConfig, path: str, saved: SavedModel, collator: Collator, options: DecodingOptions) -> str:
    try:
        audio = read_audio(path, collator.sampling_rate)
    except UNREADABLE as error:
        raise UserError(f"audio={path}: {error}", "audio=FILE that can be read to its end") from error
    seconds = len(audio) / collator.sampling_rate
    language, task = cfg.data.get("language"), TASK_OF[cfg.target]
    utterance = Utterance(path, audio, collator.sampling_rate, "", language, None, seconds, task)
    batch = collator([utterance]).to(saved.model.device)
    [text] = transcribe_batch(saved.model, saved.tokenizer, batch, options)
    return text


def inspect_data(cfg: DictConfig) -> None:
    """Shows what the data hold and what of them training would leave out; nothing of a model is needed."""
    most, folder = cfg.inspect_utterances, Path(cfg.run_dir)
    cfg.data.update({option: value for option, value in TOLERANT.items() if option in cfg.data})
    data: SpeechTextDataModule = create(cfg, "data")
    data.corpus.rewrite = normalizer(cfg.training_normalizer)
    found, columns = inspected(data, most)
    found.write(folder / "inspect.json")
    write_page(folder / "inspect.html", found, columns)
    terminal.show(*tables(found), terminal.places(folder, INSPECTED))


def fit_batches(cfg: DictConfig) -> None:
    """Finds the largest batches that memory holds, and writes them for `data.batches`."""
    found, budget = fitted_batches(cfg, build.training_run(cfg))
    file = Path(cfg.run_dir) / "batches.yaml"
    write_batches(file, found, budget, shlex.join(sys.argv[1:]))
    arguments = [each for each in sys.argv[1:] if each.lstrip("+").partition("=")[0] not in OF_FITTING]
    command = shlex.join(["python", "-m", "sedtrain", *arguments, f"data.batches={file}"])
    terminal.show(
        terminal.batches(found, budget),
        terminal.places(file.parent, FITTED),
        f"to train with them:\n  {command}",
    )


TASKS: dict[str, Callable[[DictConfig], None]] = {
    "train": train,
    "evaluate": evaluate_checkpoint,
    "transcribe": transcribe,
    "inspect": inspect_data,
    "fit_batches": fit_batches,
}
