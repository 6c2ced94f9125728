"""Makes the model of a training run, and fits it to its data."""

import logging
from functools import partial
from typing import cast

from omegaconf import DictConfig, OmegaConf

from sedtrain.build_saved import connect
from sedtrain.config.hydra_calls import create
from sedtrain.data.buckets import Bounds
from sedtrain.data.corpus import learnt_pairs, pairs_of
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.decoding.collator import positions_of_audio
from sedtrain.errors import REFUSED, Attempts, UserError
from sedtrain.models.decoder import tokenizer_of
from sedtrain.models.losses import LossWeights
from sedtrain.models.saved import SavedModel, join, to_finetune
from sedtrain.text.normalizers import normalizer
from sedtrain.text.spacing import with_spacing
from sedtrain.text.tags import WholePrompt
from sedtrain.training.finetune import FineTuning

RANDOM_CTC_WEIGHT = 0.3

logger = logging.getLogger(__name__)


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
    # Not kept by `data.split`: training reads this split with augmentation, and would keep it twice.
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
