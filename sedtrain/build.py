"""From a checked configuration to connected objects: the only place where components meet."""

import logging
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning
import torch
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sedtrain.config.instantiate import create, import_target
from sedtrain.data.augment import Augment, options_of
from sedtrain.data.buckets import buckets_of
from sedtrain.data.collate import Collator
from sedtrain.data.corpus import each_source, is_same_for_all, stands_for_several
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.data.sources import absolute_path
from sedtrain.decoding.generate import DecodingOptions
from sedtrain.errors import ConfigError, Problem
from sedtrain.evaluation.metrics import METRICS, TRANSCRIPTION, TRANSLATION, MetricSet
from sedtrain.export import SavedModel
from sedtrain.models.adapter import Adapter
from sedtrain.models.config import frame_width
from sedtrain.models.decoder import tokenizer_of
from sedtrain.models.encoder import feature_extractor_of
from sedtrain.models.losses import LossWeights
from sedtrain.models.parts import Execution
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.text.coverage import VocabularyReport
from sedtrain.text.normalizers import normalizer
from sedtrain.text.tags import add_tags
from sedtrain.text.tokenizers import start_end_pad
from sedtrain.training.checkpoints import NEVER, ValidateEvery
from sedtrain.training.finetune import FineTuning
from sedtrain.training.loggers import Tracker, Tracking
from sedtrain.training.module import SpeechSeq2SeqModule
from sedtrain.training.progress import ProgressBar
from sedtrain.training.run import TrainingRun

logger = logging.getLogger(__name__)

RANDOM_CTC_WEIGHT = 0.3
METRICS_OF = {"transcription": TRANSCRIPTION, "translation": TRANSLATION}
DECIDED = {
    "logger": "write logger=csv, logger=[csv,tensorboard] or logger=none",
    "callbacks": "add yours to the group: +callbacks.NAME._target_=package.module.Name",
    "default_root_dir": "write run_dir=FOLDER",
    "use_distributed_sampler": "leave it out: batches are shared among the devices when they are cut",
    "enable_checkpointing": "leave it out: a run keeps its best and its last weights",
    "enable_model_summary": "leave it out: the parts of the model are shown before training starts",
    "overfit_batches": "write trainer.limit_train_batches=NUMBER, or data.path=PATH of data with few utterances",
}
"""Options of the Trainer that follow from others, and what to write instead."""


def training_run(cfg: DictConfig) -> TrainingRun:
    """Builds what `task=train` needs; raises ConfigError or UserError for what the user can repair."""
    refuse_unusable(cfg)
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    data: SpeechTextDataModule = create(cfg, "data")
    data.augment = augment(cfg)
    rewrite = data.corpus.rewrite = normalizer(cfg.training_normalizer)
    data.corpus.refuse_unusable(["train", "validation", cfg.split])
    tokenizer = tokenizer_for(cfg, data, rewrite)
    encoder: PreTrainedModel = create(cfg, "encoder")
    decoder: PreTrainedModel = create(cfg, "decoder")(tokenizer)
    feature_extractor = feature_extractor_of(encoder)
    saved = SavedModel(joined(encoder, decoder, create(cfg, "adapter"), tokenizer), tokenizer, feature_extractor)
    saved.model.config.training_normalizer = rewrite.label()  # lies in config.json, wherever the folder goes
    if data.tags:
        add_tags_of(data, saved)
    connect(data, saved)
    data.refuse_unlearnt(["validation", cfg.split])
    weights = loss_weights(
        create(cfg, "loss"), starts_random=not (encoder.config._name_or_path and cfg.encoder.get("pretrained", True))
    )
    if weights.ctc_weight:
        saved.model.add_ctc_head(len(tokenizer))
    finetuning: FineTuning = create(cfg, "finetune")
    finetuning.prepare(saved.model)
    module = SpeechSeq2SeqModule(
        saved.model,
        tokenizer,
        weights,
        metric_set(cfg),
        decoding_options(cfg),
        create(cfg, "optimizer"),
        create(cfg, "scheduler"),
        finetuning.grouped,
        Execution(cfg.activation_checkpointing, None if cfg.compile == "none" else cfg.compile),
    )
    module.optimizer_and_schedule(num_steps=1)  # what these refuse is refused before training starts
    run = TrainingRun(trainer(cfg, finetuning), module, data, saved, finetuning, Path(cfg.run_dir))
    if run.trainer.is_global_zero:
        report_vocabulary(cfg, data)
    return run


def refuse_unusable(cfg: DictConfig) -> None:
    """Raises one ConfigError of everything that no component would refuse by itself, or too late."""
    problems = [
        Problem(f"trainer.{option}", cfg.trainer[option], f"{option} is decided elsewhere", write)
        for option, write in DECIDED.items()
        if option in cfg.trainer
    ]
    for option in ("val_check_interval", "accumulate_grad_batches"):
        value = cfg.trainer.get(option)
        if isinstance(value, int) and value < 1:
            write = f"write trainer.{option}=NUMBER of 1 or more"
            problems.append(Problem(f"trainer.{option}", value, "this has to be 1 or more", write))
    if isinstance(cfg.trainer.get("max_time"), int | float):
        wrong, write = "this has no unit", 'write trainer.max_time="DD:HH:MM:SS", or trainer.max_time={minutes: NUMBER}'
        problems.append(Problem("trainer.max_time", cfg.trainer.max_time, wrong, write))
    if not 0 <= cfg.seed < 2**32:
        write = "write seed=NUMBER from 0 to 4294967295"
        problems.append(Problem("seed", cfg.seed, "random number generators do not take this seed", write))
    if cfg.vocabulary_texts is not None and cfg.vocabulary_texts < 0:
        write = "write vocabulary_texts=NUMBER, 0 for no report, or vocabulary_texts=null for all texts"
        problems.append(Problem("vocabulary_texts", cfg.vocabulary_texts, "there are no fewer texts than none", write))
    if not cfg.callbacks.get("checkpoints"):
        write = "leave callbacks.checkpoints as it is; other callbacks may go"
        problems.append(Problem("callbacks.checkpoints", None, "a run keeps its best weights by it", write))
    if cfg.attention.implementation == "flash_attention_2" and str(cfg.trainer.precision).startswith("32"):
        wrong = f"it computes in 16 bits, and trainer.precision is {cfg.trainer.precision}"
        problems.append(Problem("attention", "flash_attention_2", wrong, "write trainer.precision=bf16-mixed"))
    for where, source in each_source(cfg.data).items():
        if is_same_for_all(source):
            problems.append(same_for_all(f"{where}.path", source["path"]))
    if problems:
        raise ConfigError(problems)


def same_for_all(where: str, path: str) -> Problem:
    several = stands_for_several(path)
    wrong = f"{'the same files' if several else 'one file'} would be training, validation and test data at once"
    instead = "with {split} where they differ" if several else "with train, validation and test files"
    other = "what is for all splits" if several else "a single file"
    kind = "PATTERN" if several else "FOLDER"
    return Problem(where, path, wrong, f"write {where}={kind} {instead} ({other} serves task=evaluate)")


def augment(cfg: DictConfig) -> Augment:
    """The chain of `augment`; nothing in it makes an utterance longer than `data.max_seconds`."""
    made = {}
    for name in cfg.augment:
        with options_of(f"augment.{name}"):
            made[str(name)] = create(cfg, f"augment.{name}")
    return Augment(made, cfg.seed, cfg.data.max_seconds)


def tokenizer_for(
    cfg: DictConfig, data: SpeechTextDataModule, rewrite: Callable[[str], str]
) -> PreTrainedTokenizerBase:
    """The pretrained decoder's own tokenizer; where the decoder starts random, one trained from what it is to write."""
    decoder = cfg.decoder
    published = {size: decoder.get(size) for size in ("base", "large")}
    own = tokenizer_of(cfg.size, decoder.get("checkpoint"), published)
    if own is not None:
        return own
    trained: PreTrainedTokenizerBase = create(cfg, "tokenizer")(map(rewrite, data.texts("train")))
    return trained


def report_vocabulary(cfg: DictConfig, data: SpeechTextDataModule) -> None:
    """Says which characters of the texts the tokenizer cannot write, in the splits that training reads."""
    assert data.collator is not None
    for split in ("train", "validation") if cfg.vocabulary_texts != 0 else ():
        texts = islice(data.texts(split), cfg.vocabulary_texts)
        report = VocabularyReport(data.collator.tokenizer, texts, data.collator.rewrite)
        logger.log(logging.INFO if report.finds_nothing else logging.WARNING, "%s: %s", split, report)


def joined(
    encoder: PreTrainedModel,
    decoder: PreTrainedModel,
    adapter: Callable[[int, int], Adapter | None],
    tokenizer: PreTrainedTokenizerBase,
) -> SpeechEncoderDecoder:
    """The model with the start token of the decoder's pretraining, else the tokenizer's."""
    if decoder.config.vocab_size < len(tokenizer):
        raise ConfigError.single(
            "decoder.checkpoint",
            decoder.config._name_or_path,
            f"its tokenizer writes {len(tokenizer)} tokens, its embeddings hold {decoder.config.vocab_size}",
            "write decoder.checkpoint=FOLDER whose tokenizer and weights belong together",
        )
    start, end, pad = start_end_pad(tokenizer)
    pretrained_start = getattr(decoder.config, "decoder_start_token_id", None)
    between = adapter(frame_width(encoder.config), decoder.config.hidden_size)
    model = SpeechEncoderDecoder(encoder=encoder, decoder=decoder, adapter=between)
    model.set_special_tokens(
        pretrained_start if decoder.config._name_or_path and pretrained_start is not None else start, end, pad
    )
    model.train()  # from_pretrained gives evaluation mode, which Lightning keeps: dropout would never act
    return model


def add_tags_of(data: SpeechTextDataModule, saved: SavedModel) -> None:
    """Gives a model a token for each language and task that it is to learn."""
    tags = add_tags(saved.tokenizer, data.learnt_pairs())
    if len(saved.tokenizer) > saved.model.decoder.config.vocab_size:
        saved.model.resize_token_embeddings(len(saved.tokenizer))
    saved.model.config.tags = tags.ids


def connect(data: SpeechTextDataModule, saved: SavedModel) -> None:
    """Hands the data what the model fixes: features, token ids, the start token, how texts are written."""
    name = (saved.training_normalizer or {"name": "none"})["name"]
    start = saved.model.config.decoder_start_token_id
    data.collator = Collator(saved.feature_extractor, saved.tokenizer, start, normalizer(name), saved.tags)


def loss_weights(weights: LossWeights, starts_random: bool) -> LossWeights:
    """The weights with the default of CTC filled in, which depends on how the encoder starts."""
    if weights.ctc_weight is not None:
        return weights
    return LossWeights(weights.label_smoothing, RANDOM_CTC_WEIGHT if starts_random else 0.0)


def metric_set(cfg: DictConfig) -> MetricSet:
    return MetricSet(METRICS_OF[cfg.target], normalizer(cfg.normalizer))


def decoding_options(cfg: DictConfig) -> DecodingOptions:
    options: DecodingOptions = create(cfg, "decoding")
    return options


def trainer(cfg: DictConfig, finetuning: FineTuning) -> lightning.Trainer:
    main_metric = METRICS_OF[cfg.target][0]
    mode = "max" if METRICS[main_metric].higher_is_better else "min"
    callbacks = {
        name: each(monitor=f"val/{main_metric}", mode=mode) if isinstance(each, partial) else each
        for name, each in create(cfg, "callbacks").items()
        if each is not None
    }
    checkpoints = callbacks.pop("checkpoints")
    bars = [each for each in callbacks.values() if isinstance(each, ProgressBar)]
    steps = cfg.trainer.get("val_check_interval")  # a duration is Lightning's
    every = [ValidateEvery(steps)] if isinstance(steps, int) else []
    shows_progress = cfg.trainer.get("enable_progress_bar") is not False
    for bar in [] if shows_progress else bars:
        bar.disable()  # it stays, since it counts what training consumes
    built: lightning.Trainer = create(cfg, "trainer")(
        default_root_dir=cfg.run_dir,
        callbacks=[*callbacks.values(), *every, Tracking(resolved(cfg)), finetuning, checkpoints],
        logger=loggers(cfg) or False,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=shows_progress or bool(bars),
        **({"val_check_interval": NEVER} if every else {}),
    )
    if built.max_steps == -1 and built.max_epochs in (None, -1):
        raise ConfigError.single(
            "trainer.max_steps",
            -1,
            "the learning rate falls until the end of training, and this has none",
            "write trainer.max_steps=NUMBER or trainer.max_epochs=NUMBER",
        )
    return built


def trainer_factory(cfg: DictConfig, world_size: int) -> Callable[..., lightning.Trainer]:
    """Makes the run's own Trainer with some arguments replaced; `strategy=auto` stays what it is for `world_size` processes."""
    several = {"strategy": "ddp"} if cfg.trainer.get("strategy", "auto") == "auto" and world_size > 1 else {}

    def make_trainer(**replaced: Any) -> lightning.Trainer:
        made: lightning.Trainer = create(cfg, "trainer")(**several, **replaced)  # a strategy serves one Trainer
        return made

    return make_trainer


def loggers(cfg: DictConfig) -> list[Tracker]:
    """One of each entry of `logger`."""
    for name, node in cfg.logger.items():
        if node is not None and not (isinstance(node, DictConfig) and "_target_" in node):
            write = "write +logger.NAME._target_=package.module.Name; in an option file, the name stands above _target_"
            raise ConfigError.single(f"logger.{name}", node, "a logger has a name of its own, and a _target_", write)
    return [Tracker(str(name), partial(create, cfg, f"logger.{name}")) for name, node in cfg.logger.items() if node]


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The whole configuration as plain values."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """The whole configuration as plain values that hold anywhere: absolute data paths, and the buckets of `data.batches`."""
    settings = resolved(cfg)
    data = settings["data"]
    for source in (data, *(data.get("mix") or {}).values()):
        if source.get("path"):
            source["path"] = absolute_path(source["path"])
    if data.get("batches"):  # what stands in the file may change
        data["batches"] = [bucket._asdict() for bucket in buckets_of(data["batches"])]
    return settings


def device(cfg: DictConfig) -> torch.device:
    """Where a model writes: the accelerator of this process, unless there is none or `trainer.accelerator` wants a CPU."""
    if cfg.trainer.accelerator == "cpu" or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def saved_model(cfg: DictConfig) -> SavedModel:
    """The model that `cfg.checkpoint` names; classes of the user's own register themselves when they are imported."""
    for group in ("encoder", "decoder", "adapter"):
        import_target(cfg, group)
    return SavedModel.load(cfg.checkpoint)


def restored(cfg: DictConfig) -> tuple[SavedModel, SpeechTextDataModule]:
    """A saved model and the data of `cfg`, connected."""
    saved = saved_model(cfg)
    data: SpeechTextDataModule = create(cfg, "data")
    connect(data, saved)
    data.refuse_unlearnt([cfg.split])
    return saved, data
