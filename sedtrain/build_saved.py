"""Connects the components around a saved model: data, metrics, scoring, export."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from sedtrain.config.hydra_calls import create
from sedtrain.data.corpus import refuse_unlearnt
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.data.limits import WHOLE
from sedtrain.decoding.collator import collator_of
from sedtrain.decoding.generate import refuse_impossible
from sedtrain.devices import device
from sedtrain.errors import Attempts
from sedtrain.evaluation.evaluate import Scoring
from sedtrain.evaluation.metric_set import MetricSet, OwnMetric
from sedtrain.evaluation.metrics import METRICS, chosen
from sedtrain.evaluation.metrics_of_run import metric_set, of_evaluate, of_function
from sedtrain.evaluation.results import Results
from sedtrain.evaluation.scored_runs import read_results
from sedtrain.export.card_facts import CardFacts, card_facts_of
from sedtrain.export.folder import ExportOptions
from sedtrain.models.saved import SavedModel
from sedtrain.plain import plain_value
from sedtrain.run_dir import config_of
from sedtrain.text.normalizers import normalizer
from sedtrain.transcribe import saved_model


def rewritten_data(cfg: DictConfig) -> SpeechTextDataModule:
    """The data with its texts rewritten by the training normalizer."""
    data: SpeechTextDataModule = create(cfg, "data")
    data.corpus.rewrite = normalizer(cfg.training_normalizer, "training_normalizer")
    return data


def connect(data: SpeechTextDataModule, saved: SavedModel, splits: list[str], detects: bool = False) -> None:
    """Gives the data the model's collator and clip length. Raises UserError if a split needs tags that the model never learnt.

    detects: True lets a model that can detect languages do so where the data name none
    """
    rewrite = normalizer((saved.training_normalizer or {"name": "none"})["name"])
    data.collator = collator_of(saved, rewrite, detects)
    data.bounds = replace(data.bounds, shortest_seconds=data.collator.shortest_seconds)
    if (tags := data.collator.tags) is not None:
        refuse_unlearnt(data.corpus, splits, tags)


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The whole configuration as plain values."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))


def metrics_of(cfg: DictConfig, data: SpeechTextDataModule, splits: list[str]) -> MetricSet:
    """The metrics of the target. Tries the user's own on a pair of texts."""
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
    scores_on = device(cfg.trainer.get("accelerator"))
    return Scoring(cfg.target, cfg.split, metrics, options, scores_on, Path(cfg.run_dir), checkpoint)


def evaluation(cfg: DictConfig) -> tuple[Scoring, SavedModel, SpeechTextDataModule]:
    """The connected components of `task=evaluate`. Raises one UserError for everything that they refuse."""
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


def export_parts(
    cfg: DictConfig,
) -> tuple[SavedModel, ExportOptions, dict[str, Any], Results | None, CardFacts, str]:
    """The arguments of `write_folder`. Raises one UserError for everything that the components refuse."""
    attempt = Attempts()
    saved, options, search = attempt(saved_model, cfg), attempt(create, cfg, "export"), attempt(create, cfg, "decoding")
    write = "write checkpoint=RUN of a whole run, or checkpoint=RUN/model for a card without scores"
    run, file = Path(cfg.checkpoint).expanduser(), config_of(cfg.checkpoint)
    settings = attempt(plain_value, file, "checkpoint", cfg.checkpoint, write) if file.is_file() else {}
    has_scores = (run / "results.json").is_file()
    results = attempt(read_results, run, "checkpoint", cfg.checkpoint, write) if has_scores else None
    attempt.report()
    return saved, options, search.generation_kwargs(), results, card_facts(cfg, settings, saved), cfg.target


def card_facts(cfg: DictConfig, settings: dict[str, Any], saved: SavedModel) -> CardFacts:
    """Facts about the training of a model, for its card.

    settings: of its training
    """
    return card_facts_of(settings, cfg.data.get("language"), cfg.export.license, saved.tags)


def inspected_data(cfg: DictConfig) -> SpeechTextDataModule:
    """The data of `task=inspect`, which counts bad utterances and never stops at one."""
    tolerant = {"on_bad_utterance": "skip", "max_bad_fraction": 1.0}
    cfg.data.update({option: value for option, value in tolerant.items() if option in cfg.data})
    return rewritten_data(cfg)
