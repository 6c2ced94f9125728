"""The typed root of the configuration, and the check that finds every mistake before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from sedtrain.config.signatures import Signature, TargetError, fits, literals, read_signature, suggest
from sedtrain.errors import UNSET, Problem, _as_yaml


def one_of(*choices: str) -> Any:
    """A root field that holds one of a few words, the first by default."""
    return field(default=choices[0], metadata={"choices": choices})


@dataclass
class Config:
    """The root: plain values are typed here, groups by the signatures of their targets."""

    task: str = one_of("train", "evaluate", "transcribe", "inspect", "fit_batches")
    seed: int = 0
    size: str = one_of("tiny", "base", "large")
    pretrained: bool = True
    target: str = one_of("transcription", "translation")
    normalizer: str = one_of("lowercase", "none", "whisper_english", "whisper_basic")
    training_normalizer: str = one_of("none", "lowercase", "whisper_english", "whisper_basic")
    vocabulary_texts: int | None = 100_000
    inspect_utterances: int | None = 20_000
    memory_gb: float | None = None
    activation_checkpointing: bool = False
    compile: str = one_of("none", "inductor", "aot_eager", "eager")
    run_dir: str = MISSING
    resume: str = "none"
    checkpoint: str | None = None
    audio: Any = None
    split: str = one_of("test", "validation", "train")

    encoder: Any = None
    decoder: Any = None
    adapter: Any = None
    attention: Any = None
    tokenizer: Any = None
    data: Any = None
    augment: Any = None
    finetune: Any = None
    loss: Any = None
    optimizer: Any = None
    scheduler: Any = None
    decoding: Any = None
    trainer: Any = None
    strategy: Any = None
    logger: Any = None
    callbacks: Any = None


def register() -> None:
    """Makes the typed root known to Hydra, as `schema` in a defaults list, and `${by_size:...}` to OmegaConf."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("by_size", by_size, replace=True)


def by_size(tiny: Any, base: Any, large: Any, *, _root_: DictConfig) -> Any:
    """`${by_size:1e-3,1e-4,3e-5}` in YAML: the value that goes with the root's `size`.

    A model of size=tiny that starts from a checkpoint is not tiny: it gets the value of base.
    """
    parts = ("encoder.checkpoint", "decoder.checkpoint")
    starts_random = all(OmegaConf.select(_root_, part, default=None) is None for part in parts)
    return {"base": base, "large": large}.get(_root_.size, tiny if starts_random else base)


def conf_dir() -> Path:
    """The folder of option files: inside the package once installed, beside it in a checkout."""
    packaged = Path(__file__).parents[1] / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "conf"


def find_problems(config: DictConfig) -> list[Problem]:
    """Every value of a composed configuration that cannot work, found without building anything."""
    problems = list(_check_root(config))
    for key in config:
        if key != "hydra":
            problems += _check_value(config, key, str(key))
    if OmegaConf.select(config, "hydra.sweeper") is not None:
        problems += _check_value(config.hydra, "sweeper", "hydra.sweeper")
    return problems


def _check_root(config: DictConfig) -> Iterator[Problem]:
    for each in fields(Config):
        value = _plain(config, each.name) if each.name in config else None
        choices = each.metadata.get("choices")
        if choices and value not in choices and each.name in config:
            wrong = f"{each.name} has no option {value!r}"
            yield Problem(each.name, value, wrong, suggest(str(value), choices))
        elif each.name in config and value != UNSET and not fits(value, str(each.type)):
            yield misfit(each.name, value, str(each.type))
    if config.get("task") in ("evaluate", "transcribe") and config.get("checkpoint") is None:
        wrong = f"task={config.task} needs a trained model"
        yield Problem("checkpoint", None, wrong, "write checkpoint=RUN_FOLDER, a Hugging Face folder or a Hub id")
    if config.get("task") == "transcribe" and not config.get("audio"):
        yield Problem(
            "audio", None, "task=transcribe needs audio", "write audio=FILE, 'audio=FOLDER/*.wav' or audio=FOLDER"
        )


def _check_value(node: DictConfig | ListConfig, key: Any, path: str) -> Iterator[Problem]:
    """Problems at one key and below it."""
    if OmegaConf.is_missing(node, key):
        yield Problem(path, UNSET, "no value is given", f"write {path}=VALUE")
        return
    try:
        value = node[key]
    except InterpolationToMissingValueError:
        return  # reported where the value is missing
    except (OmegaConfBaseException, RecursionError) as error:
        text = cast(Any, OmegaConf.to_container(node, resolve=False))[key]
        yield Problem(
            path,
            text,
            f"this reference fails: {first_line(error)}",
            "write a value, or refer to a key that has one",
        )
        return
    if OmegaConf.is_interpolation(node, key):
        return  # what it points to is checked in its own place
    if isinstance(value, DictConfig):
        if "_target_" in value:
            yield from _check_target(value, path)
        for name in map(str, value):
            yield from _check_value(value, name, f"{path}.{name}")
    elif isinstance(value, ListConfig):
        for index in range(len(value)):
            yield from _check_value(value, index, f"{path}[{index}]")


def _check_target(node: DictConfig, path: str) -> Iterator[Problem]:
    """A node's options against the signature of its `_target_`."""
    target = _plain(node, "_target_")
    try:
        if not isinstance(target, str):
            raise TargetError(f"expected a dotted name, not {_as_yaml(target)}", "write package.module.Name")
        signature = read_signature(target)
    except TargetError as error:
        yield Problem(f"{path}._target_", target, error.wrong, error.write)
        return
    yield from _check_options(node, path, signature, target.rpartition(".")[2])
    if not node.get("_partial_", False):
        yield from _missing_options(node, path, signature, target.rpartition(".")[2])


def _check_options(node: DictConfig, path: str, signature: Signature, name: str) -> Iterator[Problem]:
    annotations = {each.name: each.annotation for each in signature.parameters}
    for key in map(str, node):
        if key.startswith("_"):
            continue  # Hydra's: _target_, _partial_, _args_, ...
        value = _plain(node, key)
        if key not in annotations and not signature.takes_kwargs:
            yield Problem(f"{path}.{key}", value, f"{name} has no option {key!r}", suggest(key, annotations))
        elif (annotation := annotations.get(key)) and value != UNSET and not fits(value, annotation):
            yield misfit(f"{path}.{key}", value, annotation)


def _missing_options(node: DictConfig, path: str, signature: Signature, name: str) -> Iterator[Problem]:
    positional = len(node.get("_args_", []))
    for each in signature.parameters[positional:]:
        if not each.has_default and each.name not in node.keys():  # noqa: SIM118 - `in node` hides missing values
            option = f"{path}.{each.name}"
            yield Problem(option, UNSET, f"{name} needs {each.name!r}", example(option, each.annotation or ""))


def _plain(node: DictConfig, key: str) -> object:
    """A node's value as plain Python; UNSET where it is missing or refers to nothing yet."""
    try:
        value = UNSET if OmegaConf.is_missing(node, key) else node[key]
        is_node = isinstance(value, DictConfig | ListConfig)
        return OmegaConf.to_container(value, resolve=True) if is_node else value
    except (OmegaConfBaseException, RecursionError):
        return UNSET


def misfit(path: str, value: object, annotation: str) -> Problem:
    """A value that its annotation does not allow."""
    if choices := literals(annotation):
        names = ["null" if choice is None else str(choice) for choice in choices]
        return Problem(path, value, f"expected {annotation}", suggest(str(value), names))
    return Problem(path, value, f"expected {annotation}", example(path, annotation, value))


_EXAMPLES: list[tuple[object, str]] = [
    (True, "write {path}=true or {path}=false"),
    (0.5, "write a number, e.g. {path}=0.1"),
    (1, "write a whole number, e.g. {path}={whole}"),
    ([], "write a list, e.g. '{path}=[first,second]'"),
    ({}, "write named values, e.g. '{path}={{first: 1}}'"),
]


def example(path: str, annotation: str, value: object = None) -> str:
    """What to write for an annotation, as an override of `path`."""
    if fits("", annotation):  # also where there is no annotation
        is_number = isinstance(value, int | float)
        return f"write it in quotes: '{path}=\"{value}\"'" if is_number else f"write {path}=VALUE"
    whole = int(value) if isinstance(value, float) and value.is_integer() else 1000
    texts = (text for sample, text in _EXAMPLES if fits(sample, annotation))
    return next(texts, "write {path}=VALUE").format(path=path, whole=whole)


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
