"""Rules that no signature tells: limits of a single value, options that depend on each other, metrics by name."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import formatannotation
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sedtrain.annotations import misfits, suggest
from sedtrain.config.schema import ROOT, conf_dir, plain
from sedtrain.errors import UNSET, UserError
from sedtrain.ranges import BLEU_TOKENIZERS, Count, CountOrZero, NonNegative, Positive

TRANSCRIPT_FORMATS = ("text", "json", "srt", "vtt")
NAMED_GROUPS = ("augment", "callbacks", "logger")
"""Groups that hold several objects by name."""
DECIDED_ELSEWHERE = {
    "logger": "write logger=csv, logger=[csv,tensorboard] or logger=none",
    "callbacks": "add yours to the group: +callbacks.NAME._target_=package.module.Name",
    "default_root_dir": "write run_dir=FOLDER",
    "use_distributed_sampler": "leave it out: batches are shared among the devices when they are made",
    "enable_checkpointing": "leave it out: a run keeps its best and its last weights",
    "enable_model_summary": "leave it out: the components of the model are shown before training starts",
    "overfit_batches": "write trainer.limit_train_batches=NUMBER, or data.path=PATH of data with few utterances",
}
"""Options of the Trainer that follow from other options, and what to write instead."""
TRAINER_RANGES: dict[str, Any] = {
    "val_check_interval": Count,
    "accumulate_grad_batches": Count,
    "log_every_n_steps": CountOrZero,
    "gradient_clip_val": NonNegative,
}
"""Ranges of numbers that the Trainer does not check."""
READ_BY = {
    "audio": ("transcribe",),
    "format": ("transcribe",),
    "out": ("transcribe", "export"),
    "hub": ("export",),
    "dry_run": ("export",),
    "runs": ("compare",),
    "memory_gb": ("fit_batches",),
}
"""Options of the root that only these tasks read."""
TARGETS = ("transcription", "translation")
OF_METRICS = ("higher_is_better", "evaluate", "trust_remote_code", "key")
"""Options of a user's metric that are not its function's."""


def broken_rules(config: DictConfig) -> Iterator[UserError]:
    """One error for each rule that a composed configuration breaks."""
    task = config.get("task")
    yield from task_rules(config, task)
    if "format" in config:
        yield from format_rules(plain(config, "format"), config.get("out"))
    if "metrics" in config:
        yield from metric_problems(config)
    mix = plain(config.data, "mix") if isinstance(config.get("data"), DictConfig) else None
    for name, dataset in mix.items() if isinstance(mix, dict) else ():
        if isinstance(dataset, dict):
            weight = dataset.get("weight", 1.0)
            yield from misfits(f"data.mix.{name}.weight", weight, formatannotation(Positive))
    if task in ("train", "fit_batches"):
        yield from training_rules(config)


def task_rules(config: DictConfig, task: object) -> Iterator[UserError]:
    """Options that a task needs, and options that it would not read."""
    if task in ("evaluate", "transcribe", "serve", "export") and config.get("checkpoint") is None:
        write = "write checkpoint=RUN_FOLDER, a Hugging Face folder or a Hub id"
        yield UserError("checkpoint", None, f"task={task} needs a trained model", write)
    if task == "transcribe" and not config.get("audio"):
        write = "write audio=FILE, 'audio=FOLDER/*.wav' or audio=FOLDER"
        yield UserError("audio", None, "task=transcribe needs audio", write)
    if task == "export" and not config.get("out"):
        yield UserError("out", None, "task=export needs a folder to write", "write out=FOLDER")
    runs = plain(config, "runs") if "runs" in config else None
    if task == "compare" and (runs is None or (isinstance(runs, list) and len(runs) < 2)):
        yield UserError("runs", runs, "task=compare needs two runs or more", "write 'runs=[FOLDER,FOLDER]'")
    if task not in ROOT["task"].metadata["choices"]:
        return
    for option, readers in READ_BY.items():
        value = plain(config, option) if option in config else ROOT[option].default
        if task not in readers and value != ROOT[option].default:
            named = " or ".join(f"task={reader}" for reader in readers)
            wrong = f"only {named} reads it, and this is task={task}"
            yield UserError(option, value, wrong, f"write {named}, or leave {option} out")


def training_rules(config: DictConfig) -> Iterator[UserError]:
    """Rules for the tasks that build a Trainer."""
    for group in NAMED_GROUPS:
        yield from named_group_rules(config.get(group), group)
    if isinstance(config.get("trainer"), DictConfig):
        yield from trainer_rules(config.trainer)
    if isinstance(config.get("callbacks"), DictConfig) and not config.callbacks.get("checkpoints"):
        write = "leave callbacks.checkpoints as it is; other callbacks may go"
        yield UserError("callbacks.checkpoints", None, "this callback is required: it saves the best weights", write)
    attention = OmegaConf.select(config, "attention.implementation", default=None)
    precision = str(OmegaConf.select(config, "trainer.precision", default=None))
    if attention == "flash_attention_2" and precision.startswith("32"):
        wrong = f"it computes in 16 bits, and trainer.precision is {precision}"
        yield UserError("attention", attention, wrong, "write trainer.precision=bf16-mixed")


def metric_problems(config: DictConfig) -> Iterator[UserError]:
    own = sorted(file.stem for file in (conf_dir() / "metrics").glob("*.yaml") if file.stem != "auto")
    yield from metric_rules(plain(config, "metrics"), own, config.get("target"))


def named_group_rules(entries: Any, group: str) -> Iterator[UserError]:
    """Each name in such a group holds one object, or null."""
    name: Any
    for name in entries if isinstance(entries, DictConfig) else ():
        node = plain(entries, name)
        if node not in (None, UNSET) and not (isinstance(node, dict) and "_target_" in node):
            wrong = "each entry of this group needs a name, and a _target_ below it"
            write = f"write +{group}.NAME._target_=package.module.Name; in an option file, put the name above _target_"
            yield UserError(f"{group}.{name}", node, wrong, write)


def format_rules(value: object, out: object) -> Iterator[UserError]:
    """One format of texts, or a list of them; only files can hold several."""
    formats = value if isinstance(value, list) else [value]
    for unknown in [name for name in formats if name not in TRANSCRIPT_FORMATS] or ([value] if value == [] else []):
        yield UserError("format", value, f"format has no option {unknown!r}", suggest(str(unknown), TRANSCRIPT_FORMATS))
    if len(formats) > 1 and not out:
        yield UserError("out", out, "the terminal takes only one format", "write out=FOLDER")


def trainer_rules(trainer: DictConfig) -> Iterator[UserError]:
    """Values that Lightning's Trainer would accept, or refuse late."""
    for option in filter(trainer.__contains__, DECIDED_ELSEWHERE):
        wrong = f"{option} is decided elsewhere"
        yield UserError(f"trainer.{option}", plain(trainer, option), wrong, DECIDED_ELSEWHERE[option])
    if "precision" in trainer and plain(trainer, "precision") is None:
        write = "write trainer.precision=auto, 32-true, 16-mixed or bf16-mixed"
        yield UserError("trainer.precision", None, "training needs a precision", write)
    for option, hint in TRAINER_RANGES.items():
        value = plain(trainer, option)
        if type(value) is int or (type(value) is float and hint is NonNegative):
            yield from misfits(f"trainer.{option}", value, formatannotation(hint))
    max_time = plain(trainer, "max_time")
    if isinstance(max_time, int | float):
        write = 'write trainer.max_time="DD:HH:MM:SS", or trainer.max_time={minutes: NUMBER}'
        yield UserError("trainer.max_time", max_time, "this has no unit", write)


def metric_rules(metrics: object, named: list[str], target: object) -> Iterator[UserError]:
    """Mistakes in the group `metrics`.

    named: metrics of the package
    """
    if not isinstance(metrics, dict):
        if metrics not in (None, UNSET):
            yield UserError("metrics", metrics, "expected metrics by name", f"write metrics=[{','.join(named)}]")
        return
    nodes = {str(name): node for name, node in metrics.items() if node is not None}
    for name, node in nodes.items():
        yield from package_rules(name, node) if name in named else own_rules(name, node, named)
    applied = [name for name, node in nodes.items() if name not in named or target_of(node) in (None, target)]
    if not {*applied} & {*named}:
        wrong = f"target={target} needs one of {', '.join(named)}, since other metrics have no intervals"
        yield UserError("metrics", list(nodes), wrong, "write metrics=auto, or add one of them")
    elif applied[0] not in named and "higher_is_better" not in nodes[applied[0]]:
        option = f"metrics.{applied[0]}.higher_is_better"
        wrong = "the first metric chooses the best weights, so it must say which values are better"
        yield UserError(option, UNSET, wrong, f"write +{option}=true, or false for errors")


def target_of(node: object) -> object:
    return node.get("target") if isinstance(node, dict) else None


def package_rules(name: str, node: object) -> Iterator[UserError]:
    path, known = f"metrics.{name}", ["target", *["tokenize"] * (name == "bleu")]
    if not isinstance(node, dict):
        yield UserError(path, node, "expected options by name", f"leave it out, or write metrics=[{name}]")
        return
    for option in node.keys() - {*known}:
        yield UserError(f"{path}.{option}", node[option], f"{name} has no such option", suggest(str(option), known))
    tokenizers = ("auto", *BLEU_TOKENIZERS)
    if node.get("tokenize", UNSET) not in (*tokenizers, UNSET):
        wrong = "sacrebleu has no such tokenizer, or would download it"
        yield UserError(f"{path}.tokenize", node["tokenize"], wrong, suggest(str(node["tokenize"]), tokenizers))
    if target_of(node) not in (None, UNSET, *TARGETS):
        yield UserError(
            f"{path}.target", node["target"], "there is no such target", suggest(str(node["target"]), TARGETS)
        )


def own_rules(name: str, node: Any, named: list[str]) -> Iterator[UserError]:
    """A user's metric is a function or a folder of Hugging Face `evaluate`; with the user's consent, code of the Hub."""
    path, options = f"metrics.{name}", node if isinstance(node, dict) else {}
    if not options.keys() & {"_target_", "evaluate"}:
        write = f"{suggest(name, named)}; yours is +metrics.NAME._target_=package.module.function"
        yield UserError(path, node, f"there is no metric {name!r}", write)
    place = options.get("evaluate", UNSET)
    may_download = options.get("trust_remote_code") is True and isinstance(place, str)
    if not may_download and place != UNSET and not Path(str(place)).expanduser().exists():
        wrong = "there is no such folder, and code of that name would be downloaded from the Hub and run"
        yield UserError(
            f"{path}.evaluate", place, wrong, f"write a folder, or allow it by +{path}.trust_remote_code=true"
        )
    yield from misfits(f"{path}.higher_is_better", options.get("higher_is_better", UNSET), "bool")
