"""From a checked configuration to connected objects: the only place where components meet."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import lightning
from omegaconf import DictConfig, OmegaConf

from sedtrain.config.instantiate import create
from sedtrain.data.augment import Augment, options_of
from sedtrain.data.buckets import Bounds
from sedtrain.data.corpus import learnt_pairs, pairs_of, refuse_unlearnt
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.data.limits import WHOLE
from sedtrain.data.readers import cache_folder
from sedtrain.data.source import lasting, refuse_same_for_all
from sedtrain.decoding.generate import refuse_impossible
from sedtrain.decoding.options import DecodingOptions
from sedtrain.decoding.recordings import collator_of, positions_of_audio
from sedtrain.errors import REFUSED, Attempts, UserError
from sedtrain.evaluation.evaluate import Scoring
from sedtrain.evaluation.metrics import METRICS, TRANSCRIPTION, CorpusMetrics, MetricSet, OwnMetric, chosen
from sedtrain.evaluation.metrics_of_run import metric_set, of_evaluate, of_function
from sedtrain.evaluation.results import Results
from sedtrain.evaluation.scored_runs import read_results
from sedtrain.export.options import ExportOptions
from sedtrain.export.origin import Origin, origin_of
from sedtrain.models.decoder import tokenizer_of
from sedtrain.models.losses import LossWeights
from sedtrain.models.parts import Execution
from sedtrain.models.saved import SavedModel, join, to_finetune
from sedtrain.plain import plain_value
from sedtrain.run_dir import config_of
from sedtrain.text.coverage import VocabularyReport
from sedtrain.text.normalizers import normalizer
from sedtrain.text.spacing import is_unspaced, with_spacing
from sedtrain.text.tags import WholePrompt
from sedtrain.training.feature_cache import FeatureCache, Store, frozen_front
from sedtrain.training.finetune import FineTuning
from sedtrain.training.loggers import Tracker
from sedtrain.training.module import SpeechSeq2SeqModule
from sedtrain.training.run import TrainingRun, run_trainer
from sedtrain.training.strategies import FullySharded, precision_of
from sedtrain.transcribe import device, refuse_absent, saved_model

RANDOM_CTC_WEIGHT = 0.3
NUM_TEXTS_OF_LANGUAGE = 1000

logger = logging.getLogger(__name__)


def training_run(cfg: DictConfig) -> TrainingRun:
    """The components of `task=train`, connected. Raises one UserError of everything that they refuse."""
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    attempt = Attempts()
    data = attempt(training_data, cfg)
    augmentations = {
        str(name): attempt(options_of(f"augment.{name}")(create), cfg, f"augment.{name}") for name in cfg.augment
    }
    finetuning, loss, options, optimizer, scheduler = (
        attempt(create, cfg, group) for group in ("finetune", "loss", "decoding", "optimizer", "scheduler")
    )
    saved = attempt(connected, cfg, data, new_model(cfg, data, attempt))
    weights = attempt(prepared, cfg, saved, loss, finetuning)
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
    """The data, with its texts as they are learnt; every split that the run needs has been read."""
    data = rewritten_data(cfg)
    refuse_same_for_all(data.corpus.sources)
    data.corpus.refuse_unusable(["train", "validation", cfg.split])
    return data


def rewritten_data(cfg: DictConfig) -> SpeechTextDataModule:
    data: SpeechTextDataModule = create(cfg, "data")
    data.corpus.rewrite = normalizer(cfg.training_normalizer, "training_normalizer")
    return data


def new_model(cfg: DictConfig, data: SpeechTextDataModule, attempt: Attempts) -> SavedModel:
    """Encoder, adapter and decoder joined, with the pretrained decoder's tokenizer, else one trained from the texts.

    Where both are of one checkpoint, it is that model as a whole.
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
    """The checkpoint that both parts are of; None for parts that are joined anew. Raises UserError for what it cannot have."""
    parts = [cfg[part] for part in ("encoder", "decoder")]
    is_plain, pretrained = cfg.adapter.get("_target_", "").endswith(".stock_projection"), cfg.pretrained
    if cfg.checkpoint is None:
        published = "checkpoint" if cfg.size == "tiny" else cfg.size
        sources = [(each.get("model_type"), each.get("checkpoint") or each.get(published)) for each in parts]
        is_whole = is_plain and pretrained and sources[0] == sources[1] and all(sources[0])
        return sources[0][1] if is_whole else None
    named = f"encoder.checkpoint={cfg.checkpoint} decoder.checkpoint={cfg.checkpoint}"
    apart = f"encoder=OPTION decoder=OPTION {named} for its parts alone"
    for name in ("encoder.checkpoint", "decoder.checkpoint", "decoder.prompt", "decoder.listens"):
        if (given := OmegaConf.select(cfg, name)) is not None:
            wrong = f"checkpoint={cfg.checkpoint} is one model of encoder, decoder and prompt"
            raise UserError(name, given, wrong, f"write {name}=null, or {apart}, without checkpoint")
    if not is_plain:
        wrong = "a whole checkpoint takes no adapter: it is saved as what it was"
        raise UserError("adapter", cfg.adapter.get("_target_"), wrong, f"write adapter=linear, or {apart}")
    if not pretrained:
        wrong = "a whole checkpoint comes with its weights"
        raise UserError("pretrained", False, wrong, f"write pretrained=true, or {apart}")
    return str(cfg.checkpoint)


def connected(cfg: DictConfig, data: SpeechTextDataModule, saved: SavedModel) -> SavedModel:
    """A new model connected; it names the normalizer and rate of its texts and its longest audio, and has tokens of tags."""
    saved.model.config.training_normalizer = normalizer(cfg.training_normalizer).label()
    saved.model.config.max_training_seconds = round(data.corpus.max_training_seconds(), 2)
    if data.tags or isinstance(saved.tags, WholePrompt):
        saved.learn_tags(learnt_pairs(data.corpus) if data.tags else pairs_of(data.corpus, "train"))
    connect(data, saved, ["validation", cfg.split])
    say_if_alone(data.bounds)
    if saved.model.max_tokens is not None and data.collator is not None:
        too_long = partial(data.collator.too_long, most=saved.model.max_tokens, in_front=positions_of_audio(saved))
        data.corpus.leave_out(too_long)
    counted = data.load_split("validation" if data.corpus.streaming else "train")
    saved.model.config.tokens_per_second = round(counted.tokens_per_second(), 2)
    return saved


def say_if_alone(bounds: Bounds) -> None:
    """Logs that an encoder that hears all audio at one length has one utterance in a batch, and what to write for eight."""
    heard, written = bounds.shortest_seconds, bounds.batch_seconds
    if bounds.buckets is None and written < 2 * heard:
        each = f"Whisper hears {heard:g} s for each utterance, so that a batch is one"
        logger.warning("data.batch_seconds=%g: %s; write data.batch_seconds=%g for 8", written, each, 8 * heard)


def connect(data: SpeechTextDataModule, saved: SavedModel, splits: list[str], detects: bool = False) -> None:
    """Hands the data what the model fixes. Raises UserError where a split asks for what the model never learnt to write.

    detects: lets a model that can find languages that nothing names
    """
    rewrite = normalizer((saved.training_normalizer or {"name": "none"})["name"])
    data.collator = collator_of(saved, rewrite, detects)
    data.bounds = replace(data.bounds, shortest_seconds=data.collator.shortest_seconds)
    if (tags := data.collator.tags) is not None:
        refuse_unlearnt(data.corpus, splits, tags)


def prepared(cfg: DictConfig, saved: SavedModel, weights: LossWeights, finetuning: FineTuning) -> LossWeights:
    """Completes the model, freezes what does not move yet, and returns the weights of its losses.

    The default weight of CTC depends on how the encoder starts.
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
    """The training step; its optimizer has been made once, so that what it refuses is refused now."""
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
    """Gives the module a cache of what its frozen front returns, where it is asked for.

    Raises UserError where nothing is frozen or the inputs change from epoch to epoch.
    """
    if not data.cache_features:
        return
    front, write = frozen_front(module.model), "or data.cache_features=false"
    if front is None:
        wrong = "the encoder and its front end are trained from the first step on: nothing would be the same again"
        write = f"write finetune=encoder_frozen or feature_encoder_frozen, {write}"
        raise UserError("data.cache_features", True, wrong, write)
    if cfg.augment:
        wrong = (
            f"{', '.join(map(str, cfg.augment))} changes the audio in every epoch, so that nothing is the same again"
        )
        raise UserError("data.cache_features", True, wrong, f"write augment=none or augment=spec_augment, {write}")
    if isinstance(trainer.strategy, FullySharded):
        wrong = "a rank whose utterances are cached would not gather the encoder's weights, for which the others wait"
        raise UserError("data.cache_features", True, wrong, f"write strategy=ddp, {write}")
    assert data.collator is not None
    data.collator.has_keys = True
    settings = {"precision": trainer.precision, "device": trainer.strategy.root_device.type, "compile": cfg.compile}
    folder = cache_folder("features")
    store_of = partial(Store, folder, most_bytes=1e9 * data.cache_gb, num_ranks=trainer.world_size)
    module.cache = FeatureCache(store_of, settings, data.collator.time_is_last)
    text = "the outputs of %s are kept in %s, rounded to 16 bits: results differ by about 1e-3"
    logger.info(text, front.name, folder)


def main_metric(cfg: DictConfig, data: SpeechTextDataModule | None) -> tuple[str, str]:
    """The metric that chooses the best weights, and max or min: the first; of `auto`, CER where no spaces separate words."""
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
    callbacks = {name: each for name, each in create(cfg, "callbacks").items() if each is not None}
    return run_trainer(trainer_maker(cfg), resolved(cfg), callbacks, loggers(cfg), finetuning, *main_metric(cfg, data))


def loggers(cfg: DictConfig) -> list[Tracker]:
    return [Tracker(str(name), partial(create, cfg, f"logger.{name}")) for name, node in cfg.logger.items() if node]


def trainer_maker(cfg: DictConfig) -> Callable[..., lightning.Trainer]:
    """Makes a Trainer with the options of `trainer`; its precision is the device's where it is `auto`."""
    make: Callable[..., lightning.Trainer] = create(cfg, "trainer")
    return partial(make, precision=precision_of(device(cfg))) if cfg.trainer.get("precision") == "auto" else make


def trainer_factory(cfg: DictConfig, world_size: int) -> Callable[..., lightning.Trainer]:
    """Makes the run's own Trainer with some arguments replaced; `strategy=auto` stays what it is for `world_size` processes."""
    several = {"strategy": "ddp"} if cfg.trainer.get("strategy", "auto") == "auto" and world_size > 1 else {}
    return lambda **replaced: trainer_maker(cfg)(**several, **replaced)  # a strategy serves one Trainer


def report_vocabulary(data: SpeechTextDataModule, metrics: MetricSet, max_texts: int | None) -> None:
    """Logs what the tokenizer cannot write or give back of the training and validation texts.

    metrics:   those of the run, whose normalizer decides what is an error
    max_texts: as many of each are read; None: all, 0: there is no report
    """
    assert data.collator is not None
    for split in ("train", "validation") if max_texts != 0 else ():
        texts = islice(data.texts(split), max_texts)
        scores = CorpusMetrics(MetricSet(TRANSCRIPTION, metrics.normalize))
        report = VocabularyReport(data.collator.tokenizer, texts, data.collator.rewrite, scores)
        logger.log(logging.INFO if report.finds_nothing else logging.WARNING, "%s: %s", split, report)


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The whole configuration as plain values."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """The whole configuration as plain values that hold in any folder and, of numbers, on any machine."""
    settings = resolved(cfg)
    if cfg.trainer.get("precision") == "auto":
        settings["trainer"]["precision"] = precision_of(device(cfg))
    return {**settings, "data": lasting(settings["data"])}


# --- a saved model


def metrics_of(cfg: DictConfig, data: SpeechTextDataModule, splits: list[str]) -> MetricSet:
    """The metrics that the configuration gives its target; those of the user are tried on a pair of texts."""
    tokenize = OmegaConf.select(cfg, "metrics.bleu.tokenize", default="auto")
    names = chosen(cfg.metrics, cfg.target)
    own = [own_metric(name, cfg.metrics[name]) for name in names if name not in METRICS]
    return metric_set([name for name in names if name in METRICS], cfg.normalizer, tokenize, data.corpus, splits, own)


def own_metric(name: str, node: DictConfig) -> OwnMetric:
    options = resolved(node)
    higher_is_better = options.pop("higher_is_better", None)
    if "evaluate" in options:
        options.pop("trust_remote_code", None)
        return of_evaluate(name, options.pop("evaluate"), higher_is_better, options.pop("key", None), **options)
    part = OmegaConf.create({"metrics": {name: {**options, "_partial_": True}}})
    return of_function(name, create(part, f"metrics.{name}"), options["_target_"], higher_is_better)


def scoring(cfg: DictConfig, data: SpeechTextDataModule) -> Scoring:
    metrics, options = metrics_of(cfg, data, [cfg.split]), create(cfg, "decoding")
    checkpoint = None if cfg.task == "train" else cfg.checkpoint
    return Scoring(cfg.target, cfg.split, metrics, options, device(cfg), Path(cfg.run_dir), checkpoint)


def evaluation(cfg: DictConfig) -> tuple[Scoring, SavedModel, SpeechTextDataModule]:
    """The components of `task=evaluate`, connected. Raises one UserError of everything that they refuse."""
    attempt = Attempts()
    saved, data = attempt(saved_model, cfg), attempt(whole_data, cfg)
    attempt(lambda data, saved: connect(data, saved, [cfg.split], detects=True), data, saved)
    made = attempt(scoring, cfg, data)
    attempt(lambda scoring, saved: refuse_impossible(saved.model, saved.tokenizer, scoring.decoding), made, saved)
    attempt.report()
    return made, saved, data


def whole_data(cfg: DictConfig) -> SpeechTextDataModule:
    """The data of `task=evaluate`, which scores utterances of any length."""
    data: SpeechTextDataModule = create(cfg, "data")
    data.corpus.scored_limits = WHOLE
    return data


def exported(
    cfg: DictConfig,
) -> tuple[SavedModel, ExportOptions, dict[str, Any], Results | None, Origin, str]:
    """The components of `task=export`. Raises one UserError of everything that they refuse."""
    attempt = Attempts()
    saved, options, search = attempt(saved_model, cfg), attempt(create, cfg, "export"), attempt(create, cfg, "decoding")
    write = "write checkpoint=RUN of a whole run, or checkpoint=RUN/model for a card without scores"
    run, file = Path(cfg.checkpoint).expanduser(), config_of(cfg.checkpoint)
    settings = attempt(plain_value, file, "checkpoint", cfg.checkpoint, write) if file.is_file() else {}
    has_scores = (run / "results.json").is_file()
    results = attempt(read_results, run, "checkpoint", cfg.checkpoint, write) if has_scores else None
    attempt.report()
    return saved, options, search.generation_kwargs(), results, origin(cfg, settings, saved), cfg.target


def origin(cfg: DictConfig, settings: dict[str, Any], saved: SavedModel) -> Origin:
    """The origin of a model, for its card; settings: of its training."""
    return origin_of(settings, cfg.data.get("language"), cfg.export.license, saved.tags)


def inspected_data(cfg: DictConfig) -> SpeechTextDataModule:
    """The data of `task=inspect`, which counts every bad utterance and is stopped by none."""
    tolerant = {"on_bad_utterance": "skip", "max_bad_fraction": 1.0}
    cfg.data.update({option: value for option, value in tolerant.items() if option in cfg.data})
    return rewritten_data(cfg)
