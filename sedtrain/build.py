"""From a checked configuration to connected objects: the only place where components meet."""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Timer
from omegaconf import DictConfig
from torch import nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from sedtrain.batch import UserError
from sedtrain.config import ConfigError
from sedtrain.data.collate import Collator
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.decoding.generate import DecodingOptions
from sedtrain.evaluation.metrics import METRICS, TRANSCRIPTION, TRANSLATION, MetricSet
from sedtrain.evaluation.normalisers import normaliser
from sedtrain.evaluation.results import TrainingTotals
from sedtrain.export import SavedModel
from sedtrain.finetune import Freeze
from sedtrain.losses import LossWeights
from sedtrain.models.decoder import tokenizer_of
from sedtrain.models.encoder import feature_extractor_of
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder, make_known
from sedtrain.module import SpeechSeq2SeqModule
from sedtrain.progress import Checkpoints, ProgressBar, StopOnInterrupt
from sedtrain.text import start_end_pad

RANDOM_CTC_WEIGHT = 0.3
METRICS_OF = {"transcription": TRANSCRIPTION, "translation": TRANSLATION}


@dataclass(frozen=True)
class TrainingRun:
    """Everything that one training needs, connected."""

    trainer: lightning.Trainer
    module: SpeechSeq2SeqModule
    data: SpeechTextDataModule
    saved: SavedModel
    folder: Path

    @property
    def callbacks(self) -> list[lightning.Callback]:
        callbacks: list[lightning.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return callbacks

    def plan(self) -> tuple[dict[str, nn.Module], dict[str, str]]:
        """The parts of the model by name, and what a person wants to know before training starts."""
        parts = dict(self.saved.model.named_children())
        if self.module.ctc_head is not None:
            parts["ctc_head"] = self.module.ctc_head
        train = self.data.split("train")
        facts = {
            "training audio": f"{train.total_seconds() / 3600:.2f} hours, {len(train):,} utterances",
            "batches": f"{self.data.batch_seconds:g} s of audio, {len(self.data.train_dataloader()):,} in an epoch",
            "steps": f"{self.trainer.max_steps:,}" + (f", at most {self.time_limit()}" if self.time_limit() else ""),
            "vocabulary": f"{len(self.saved.tokenizer):,} tokens",
            "ctc weight": f"{self.module.weights.ctc_weight:g}",
            "run folder": str(self.folder),
        }
        return parts, facts

    def time_limit(self) -> str | None:
        timers = [callback for callback in self.callbacks if isinstance(callback, Timer)]
        return str(timedelta(seconds=timers[0].time_remaining() or 0)) if timers else None

    def load_best(self) -> None:
        """Takes the weights of the best validation, where there was one."""
        best = next(each.best_model_path for each in self.callbacks if isinstance(each, Checkpoints))
        if best:
            checkpoint = torch.load(best, map_location="cpu", weights_only=True)
            self.module.load_state_dict(checkpoint["state_dict"])

    def interrupted(self) -> bool:
        return any(isinstance(each, StopOnInterrupt) and each.interrupted for each in self.callbacks)

    def totals(self) -> TrainingTotals | None:
        """What training consumed, as the progress bar counted it."""
        for callback in self.callbacks:
            if isinstance(callback, ProgressBar):
                return callback.totals()
        return None


def create(node: Any) -> Any:
    """The object of a `_target_` node, or its partial; a UserError raised in it comes out as it is."""
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def training_run(cfg: DictConfig) -> TrainingRun:
    """Builds what `task=train` needs; raises ConfigError or UserError for what the user can repair."""
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    data: SpeechTextDataModule = create(cfg.data)
    refuse_single_file(cfg.data.path)
    tokenizer = tokenizer_for(cfg, data)
    encoder: PreTrainedModel = create(cfg.encoder)
    decoder: PreTrainedModel = create(cfg.decoder)(tokenizer)
    check_widths(cfg.adapter.kind, encoder, decoder)
    saved = SavedModel(joined(encoder, decoder, tokenizer), tokenizer, feature_extractor_of(encoder))
    connect(data, saved)
    freeze: Freeze = create(cfg.finetune)
    freeze.freeze(saved.model)
    module = SpeechSeq2SeqModule(
        saved.model,
        tokenizer,
        loss_weights(
            create(cfg.loss), starts_random=not (encoder.config._name_or_path and cfg.encoder.get("pretrained", True))
        ),
        metric_set(cfg),
        decoding_options(cfg),
        create(cfg.optimizer),
        create(cfg.scheduler),
    )
    return TrainingRun(trainer(cfg, freeze), module, data, saved, Path(cfg.run_dir))


def refuse_single_file(path: str) -> None:
    if Path(path).expanduser().is_file():
        raise ConfigError.single(
            "data.path",
            path,
            "one file would be training, validation and test data at once",
            "write data.path=FOLDER with train, validation and test files (a single file serves task=evaluate)",
        )


def tokenizer_for(cfg: DictConfig, data: SpeechTextDataModule) -> PreTrainedTokenizerBase:
    """The pretrained decoder's own tokenizer; where the decoder starts random, one trained from the training texts."""
    decoder = cfg.decoder
    published = {size: decoder.get(size) for size in ("base", "large")}
    own = tokenizer_of(cfg.size, decoder.get("checkpoint"), published)
    return create(cfg.tokenizer)(data.rows("train").texts()) if own is None else own


def joined(
    encoder: PreTrainedModel, decoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
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
    model = SpeechEncoderDecoder(encoder=encoder, decoder=decoder)
    model.set_special_tokens(
        pretrained_start if decoder.config._name_or_path and pretrained_start is not None else start, end, pad
    )
    model.train()  # from_pretrained gives evaluation mode, which Lightning keeps: dropout would never act
    return model


def check_widths(adapter: str, encoder: PreTrainedModel, decoder: PreTrainedModel) -> None:
    widths = encoder.config.hidden_size, decoder.config.hidden_size
    if adapter == "none" and widths[0] != widths[1]:
        raise ConfigError.single(
            "adapter",
            "none",
            f"the encoder is {widths[0]} wide and the decoder {widths[1]}",
            "write adapter=linear, which projects one to the other",
        )


def connect(data: SpeechTextDataModule, saved: SavedModel) -> None:
    """Hands the data what the model fixes: features, token ids, the start token."""
    data.collator = Collator(saved.feature_extractor, saved.tokenizer, saved.model.config.decoder_start_token_id)


def loss_weights(weights: LossWeights, starts_random: bool) -> LossWeights:
    """The weights with the default of CTC filled in, which depends on how the encoder starts."""
    if weights.ctc_weight is not None:
        return weights
    return LossWeights(weights.label_smoothing, RANDOM_CTC_WEIGHT if starts_random else 0.0)


def metric_set(cfg: DictConfig) -> MetricSet:
    return MetricSet(METRICS_OF[cfg.target], normaliser(cfg.normaliser))


def decoding_options(cfg: DictConfig) -> DecodingOptions:
    options: DecodingOptions = create(cfg.decoding)
    return options


def trainer(cfg: DictConfig, freeze: Freeze) -> lightning.Trainer:
    main_metric = METRICS_OF[cfg.target][0]
    mode = "max" if METRICS[main_metric].higher_is_better else "min"
    callbacks = create(cfg.callbacks)
    checkpoints = callbacks.pop("checkpoints")(monitor=f"val/{main_metric}", mode=mode)
    steps_between = min(cfg.trainer.val_check_interval, cfg.trainer.max_steps) if cfg.trainer.max_steps > 0 else None
    options = {} if steps_between is None else {"val_check_interval": steps_between}
    built: lightning.Trainer = create(cfg.trainer)(
        default_root_dir=cfg.run_dir,
        callbacks=[*callbacks.values(), freeze, checkpoints],
        logger=create(cfg.logger) or False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        **options,
    )
    return built


def saved_model(cfg: DictConfig) -> SavedModel:
    """The model that `cfg.checkpoint` names; an encoder class of the user's own is imported first."""
    if not cfg.encoder._target_.startswith("sedtrain."):
        make_known(create(cfg.encoder), AutoModel)
    return SavedModel.load(cfg.checkpoint)


def restored(cfg: DictConfig) -> tuple[SavedModel, SpeechTextDataModule]:
    """A saved model and the data of `cfg`, connected."""
    saved = saved_model(cfg)
    data: SpeechTextDataModule = create(cfg.data)
    connect(data, saved)
    return saved, data
