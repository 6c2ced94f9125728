"""Connects the components of a training run, from a checked configuration.

Components meet only here and in `build_saved`.
"""

import logging
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import lightning
from omegaconf import DictConfig, OmegaConf

from sedtrain.build_saved import connect, metrics_of, resolved, rewritten_data
from sedtrain.config.instantiate import create
from sedtrain.data.augment import Augment, options_of
from sedtrain.data.buckets import Bounds
from sedtrain.data.corpus import learnt_pairs, pairs_of
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.data.options import lasting, refuse_same_for_all
from sedtrain.data.readers import cache_folder
from sedtrain.decoding.generate import refuse_impossible
from sedtrain.decoding.options import DecodingOptions
from sedtrain.decoding.recordings import positions_of_audio
from sedtrain.errors import REFUSED, Attempts, UserError
from sedtrain.evaluation.metrics import TRANSCRIPTION, CorpusMetrics, MetricSet, chosen
from sedtrain.models.decoder import tokenizer_of
from sedtrain.models.losses import LossWeights
from sedtrain.models.parts import Execution
from sedtrain.models.saved import SavedModel, join, to_finetune
from sedtrain.text.coverage import VocabularyReport
from sedtrain.text.normalizers import normalizer
from sedtrain.text.spacing import is_unspaced, with_spacing
from sedtrain.text.tags import WholePrompt
from sedtrain.training.feature_cache import FeatureCache, Store, frozen_front
from sedtrain.training.finetune import FineTuning
from sedtrain.training.module import SpeechSeq2SeqModule
from sedtrain.training.run import TrainingRun, run_trainer
from sedtrain.training.strategies import FullySharded, precision_of
from sedtrain.training.tracking import Tracker
from sedtrain.transcribe import device, refuse_absent

RANDOM_CTC_WEIGHT = 0.3
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


def new_model(cfg: DictConfig, data: SpeechTextDataModule, attempt: Attempts) -> SavedModel:
    """Joins encoder, adapter and decoder, with the pretrained decoder's tokenizer, or else one trained on the texts.

    If both parts come from one checkpoint, takes that model as a whole.
    """
    if (whole := attempt(whole_checkpoint, cfg)) is not None:
        options = attempt(lambda: {**cfg.encoder.options, **cfg.decoder.options})
        return cast(SavedModel, attempt(to_finetune, whole, options, cfg.attention.implementation))
    published = {size: cfg.decoder.get(size) for size in ("base", "large")}
    tokenizer = attempt(tokenizer_of, cfg.size, cfg.decoder.get("checkpoint"), published)
    if tokenizer is not None and REFUSED not in (tokenizer, data):
        tokenizer = with_spacing(tokenizer, map(data.corpus.rewrite, data.texts("train")))
    if tokenizer is None:
        train = attempt(create, cfg, "tokenizer")
        tokenizer = attempt(lambda train, data: train(map(data.corpus.rewrite, data.texts("train"))), train, data)
    encoder, decoder = attempt(create, cfg, "encoder"), attempt(attempt(create, cfg, "decoder"), tokenizer)
    return cast(SavedModel, attempt(join, encoder, decoder, attempt(create, cfg, "adapter"), tokenizer))


def whole_checkpoint(cfg: DictConfig) -> str | None:
    """The checkpoint that is the whole model; None if parts are joined. Raises UserError for options it cannot have."""
    parts = [cfg[part] for part in ("encoder", "decoder")]
    is_plain, pretrained = cfg.adapter.get("_target_", "").endswith(".stock_projection"), cfg.pretrained
    if cfg.checkpoint is None:
        published = "checkpoint" if cfg.size == "tiny" else cfg.size
        sources = [(part.get("model_type"), part.get("checkpoint") or part.get(published)) for part in parts]
        is_whole = is_plain and pretrained and sources[0] == sources[1] and all(sources[0])
        return sources[0][1] if is_whole else None
    named = f"encoder.checkpoint={cfg.checkpoint} decoder.checkpoint={cfg.checkpoint}"
    apart = f"encoder=OPTION decoder=OPTION {named} to join its parts"
    for name in ("encoder.checkpoint", "decoder.checkpoint", "decoder.prompt", "decoder.listens"):
        if (given := OmegaConf.select(cfg, name)) is not None:
            wrong = f"checkpoint={cfg.checkpoint} is one model of encoder, decoder and prompt"
            raise UserError(name, given, wrong, f"write {name}=null, or {apart}, without checkpoint")
    if not is_plain:
        wrong = "a whole checkpoint takes no adapter, so that it is saved as the model it was"
        raise UserError("adapter", cfg.adapter.get("_target_"), wrong, f"write adapter=linear, or {apart}")
    if not pretrained:
        wrong = "a whole checkpoint comes with its weights"
        raise UserError("pretrained", False, wrong, f"write pretrained=true, or {apart}")
    return str(cfg.checkpoint)


def connect_new_model(cfg: DictConfig, data: SpeechTextDataModule, saved: SavedModel) -> SavedModel:
    """Connects a new model and its data: adds tag tokens, and records normalizer, longest audio and tokens per second."""
    saved.model.config.training_normalizer = normalizer(cfg.training_normalizer).label()
    saved.model.config.max_training_seconds = round(data.corpus.max_training_seconds(), 2)
    if data.tags or isinstance(saved.tags, WholePrompt):
        saved.learn_tags(learnt_pairs(data.corpus) if data.tags else pairs_of(data.corpus, "train"))
    connect(data, saved, ["validation", cfg.split])
    warn_of_single_utterances(data.bounds)
    if saved.model.max_tokens is not None and data.collator is not None:
        too_long = partial(data.collator.too_long, most=saved.model.max_tokens, in_front=positions_of_audio(saved))
        data.corpus.leave_out(too_long)
    counted = data.load_split("validation" if data.corpus.streaming else "train")
    saved.model.config.tokens_per_second = round(counted.tokens_per_second(), 2)
    return saved


def warn_of_single_utterances(bounds: Bounds) -> None:
    """Warns if batches hold one utterance, because the encoder pads all audio to one length; names the option for eight."""
    padded, written = bounds.shortest_seconds, bounds.batch_seconds
    if bounds.buckets is None and written < 2 * padded:
        single = f"Whisper pads each utterance to {padded:g} s, so a batch holds only one"
        logger.warning("data.batch_seconds=%g: %s; write data.batch_seconds=%g for 8", written, single, 8 * padded)


def prepare_model(cfg: DictConfig, saved: SavedModel, weights: LossWeights, finetuning: FineTuning) -> LossWeights:
    """Adds the CTC head, freezes weights that do not move yet, and returns the loss weights.

    The default weight of CTC depends on whether the encoder starts pretrained.
    """
    if weights.ctc_weight is None:
        is_pretrained = saved.model.encoder.config._name_or_path and cfg.encoder.get("pretrained", True)
        weights = LossWeights(weights.label_smoothing, 0.0 if is_pretrained else RANDOM_CTC_WEIGHT)
    if weights.ctc_weight:
        saved.model.add_ctc_head(len(saved.tokenizer))
    finetuning.prepare(saved.model)
    return weights


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
    return partial(make, precision=precision_of(device(cfg))) if cfg.trainer.get("precision") == "auto" else make


def trainer_factory(cfg: DictConfig, world_size: int) -> Callable[..., lightning.Trainer]:
    """A function that makes the run's own Trainer with some arguments replaced, for a run of `world_size` processes."""
    several = {"strategy": "ddp"} if cfg.trainer.get("strategy", "auto") == "auto" and world_size > 1 else {}
    return lambda **replaced: trainer_maker(cfg)(
        **several, **replaced
    )  # each Trainer needs a strategy object of its own


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
        settings["trainer"]["precision"] = precision_of(device(cfg))
    return {**settings, "data": lasting(settings["data"])}
