"""Connects the components of a training run, from a checked configuration.

Components meet only here, in `build_model` and in `build_saved`.
"""

import logging
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning
from omegaconf import DictConfig

from sedtrain.build_model import connect_new_model, new_model, prepare_model
from sedtrain.build_saved import metrics_of, resolved, rewritten_data
from sedtrain.config.hydra_calls import create
from sedtrain.data.augment import Augment, options_of
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.data.readers import cache_folder
from sedtrain.data.source import lasting, refuse_same_for_all
from sedtrain.decoding.generate import refuse_impossible
from sedtrain.decoding.options import DecodingOptions
from sedtrain.devices import device, precision_of, refuse_absent
from sedtrain.errors import REFUSED, Attempts, UserError
from sedtrain.evaluation.metric_set import CorpusMetrics, MetricSet
from sedtrain.evaluation.metrics import TRANSCRIPTION, chosen
from sedtrain.models.losses import LossWeights
from sedtrain.models.parts import Execution
from sedtrain.models.saved import SavedModel
from sedtrain.text.coverage import VocabularyReport
from sedtrain.text.spacing import is_unspaced
from sedtrain.training.feature_cache import FeatureCache, Store, frozen_front
from sedtrain.training.finetune import FineTuning
from sedtrain.training.module import SpeechSeq2SeqModule
from sedtrain.training.run import TrainingRun, run_trainer
from sedtrain.training.strategies import FullySharded
from sedtrain.training.tracking import Tracker

NUM_TEXTS_OF_LANGUAGE = 1000

logger = logging.getLogger(__name__)


def training_run(cfg: DictConfig) -> TrainingRun:
    """The connected components of `task=train`. Raises one UserError for everything that they refuse."""
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    attempt = Attempts()
    data = attempt(training_data, cfg)
    augmentations = {
        str(name): attempt(options_of(f"augment.{name}")(create), cfg, f"augment.{name}") for name in cfg.augment
    }
    finetuning, loss, options, optimizer, scheduler = (
        attempt(create, cfg, group) for group in ("finetune", "loss", "decoding", "optimizer", "scheduler")
    )
    saved = attempt(connect_new_model, cfg, data, new_model(cfg, data, attempt))
    weights = attempt(prepare_model, cfg, saved, loss, finetuning)
    metrics = attempt(metrics_of, cfg, data, ["validation", cfg.split])
    module = attempt(training_module, cfg, saved, weights, metrics, finetuning, options, optimizer, scheduler)
    trainer = attempt(partial(make_trainer, cfg, data=None if data is REFUSED else data), finetuning)
    attempt(cache_features, cfg, data, module, trainer)
    attempt.report()
    data.augment = Augment(augmentations, cfg.seed, data.limits.max_seconds)
    if trainer.is_global_zero:
        report_vocabulary(data, module.metrics.metric_set, cfg.vocabulary_texts)
    return TrainingRun(trainer, module, data, saved, finetuning, Path(cfg.run_dir))


def training_data(cfg: DictConfig) -> SpeechTextDataModule:
    """The data, with rewritten texts; all splits of the run have been read."""
    data = rewritten_data(cfg)
    refuse_same_for_all(data.corpus.sources)
    data.corpus.refuse_unusable(["train", "validation", cfg.split])
    return data


def training_module(
    cfg: DictConfig,
    saved: SavedModel,
    weights: LossWeights,
    metrics: MetricSet,
    finetuning: FineTuning,
    options: DecodingOptions,
    optimizer: Callable[..., Any],
    scheduler: Callable[..., Any],
) -> SpeechSeq2SeqModule:
    """The module with the training step. Makes its optimizer once, so that the optimizer's refusals come now."""
    refuse_impossible(saved.model, saved.tokenizer, options)
    backend = None if cfg.compile == "none" else cfg.compile
    execution = Execution(cfg.activation_checkpointing, backend, cfg.packing)
    module = SpeechSeq2SeqModule(
        saved.model, saved.tokenizer, weights, metrics, options, optimizer, scheduler, finetuning.grouped, execution
    )
    module.optimizer_and_schedule(num_steps=1)
    return module


def cache_features(
    cfg: DictConfig, data: SpeechTextDataModule, module: SpeechSeq2SeqModule, trainer: lightning.Trainer
) -> None:
    """With `data.cache_features`, gives the module a cache for the outputs of its frozen front.

    Raises UserError if nothing is frozen, or if the inputs change from epoch to epoch.
    """
    if not data.cache_features:
        return
    front, write = frozen_front(module.model), "or data.cache_features=false"
    if front is None:
        wrong = "the encoder and its front end train from the first step on, so no output would stay the same"
        write = f"write finetune=encoder_frozen or feature_encoder_frozen, {write}"
        raise UserError("data.cache_features", True, wrong, write)
    if cfg.augment:
        wrong = f"{', '.join(map(str, cfg.augment))} changes the audio in every epoch, so no output would stay the same"
        raise UserError("data.cache_features", True, wrong, f"write augment=none or augment=spec_augment, {write}")
    if isinstance(trainer.strategy, FullySharded):
        wrong = "a rank with cached utterances would not gather the encoder's weights, and the other ranks would wait forever"
        raise UserError("data.cache_features", True, wrong, f"write strategy=ddp, {write}")
    assert data.collator is not None
    data.collator.has_keys = True
    settings = {"precision": trainer.precision, "device": trainer.strategy.root_device.type, "compile": cfg.compile}
    folder = cache_folder("features")
    store_of = partial(Store, folder, max_bytes=1e9 * data.cache_gb, num_ranks=trainer.world_size)
    module.cache = FeatureCache(store_of, settings, data.collator.time_is_last)
    text = "the outputs of %s are kept in %s, rounded to 16 bits: results differ by about 1e-3"
    logger.info(text, front.name, folder)


def main_metric(cfg: DictConfig, data: SpeechTextDataModule | None) -> tuple[str, str]:
    """The metric that chooses the best weights, and max or min.

    It is the first of the group; with metrics=auto, CER if the texts have no spaces between words.
    """
    names = chosen(cfg.metrics, cfg.target)
    first = next(iter(names))
    if first == "wer" and cfg.metrics.wer.get("target") and "cer" in names:
        texts = [] if data is None else islice(data.texts("validation"), NUM_TEXTS_OF_LANGUAGE)
        first = "cer" if is_unspaced(texts) else first
    return first, "max" if names[first] else "min"


def make_trainer(
    cfg: DictConfig, finetuning: FineTuning, data: SpeechTextDataModule | None = None
) -> lightning.Trainer:
    refuse_absent(cfg.trainer.get("accelerator"))
    callbacks = {name: callback for name, callback in create(cfg, "callbacks").items() if callback is not None}
    return run_trainer(trainer_maker(cfg), resolved(cfg), callbacks, loggers(cfg), finetuning, *main_metric(cfg, data))


def loggers(cfg: DictConfig) -> list[Tracker]:
    return [Tracker(str(name), partial(create, cfg, f"logger.{name}")) for name, node in cfg.logger.items() if node]


def trainer_maker(cfg: DictConfig) -> Callable[..., lightning.Trainer]:
    """A function that makes a Trainer with the options of `trainer`; precision=auto becomes the device's."""
    make: Callable[..., lightning.Trainer] = create(cfg, "trainer")
    if cfg.trainer.get("precision") != "auto":
        return make
    return partial(make, precision=precision_of(device(cfg.trainer.get("accelerator"))))


def trainer_factory(cfg: DictConfig, world_size: int) -> Callable[..., lightning.Trainer]:
    """A function that makes the run's own Trainer with some arguments replaced, for a run of `world_size` processes."""
    several = {"strategy": "ddp"} if cfg.trainer.get("strategy", "auto") == "auto" and world_size > 1 else {}
    # Each Trainer needs a strategy object of its own.
    return lambda **replaced: trainer_maker(cfg)(**several, **replaced)


def report_vocabulary(data: SpeechTextDataModule, metrics: MetricSet, max_texts: int | None) -> None:
    """Logs characters of the training and validation texts that the tokenizer cannot encode, or does not decode alike.

    metrics:   of the run; their normalizer decides what is an error
    max_texts: number of texts read from each split; None: all, 0: no report
    """
    assert data.collator is not None
    for split in ("train", "validation") if max_texts != 0 else ():
        texts = islice(data.texts(split), max_texts)
        scores = CorpusMetrics(MetricSet(TRANSCRIPTION, metrics.normalize))
        report = VocabularyReport(data.collator.tokenizer, texts, data.collator.rewrite, scores)
        logger.log(logging.INFO if report.finds_nothing else logging.WARNING, "%s: %s", split, report)


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """The whole configuration as plain values that stay valid in another folder and on another machine."""
    settings = resolved(cfg)
    if cfg.trainer.get("precision") == "auto":
        settings["trainer"]["precision"] = precision_of(device(cfg.trainer.get("accelerator")))
    return {**settings, "data": lasting(settings["data"])}
