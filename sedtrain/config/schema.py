"""The typed root of the configuration, and the check that finds every mistake before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from inspect import Signature, formatannotation
from pathlib import Path
from typing import Annotated, Any, cast, get_type_hints

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from sedtrain.annotations import example, misfits, suggest
from sedtrain.config.metric_rules import OF_METRICS, metric_rules
from sedtrain.config.signatures import read_signature
from sedtrain.errors import UNSET, UserError, as_yaml
from sedtrain.ranges import Count, CountOrZero, NonNegative, Positive, Range

MOST_OF_LINE = 200  # characters of another package's message
Seed = Annotated[int, Range("a whole number from 0 to 4294967295", low=0, high=2**32 - 1)]
FORMATS = ("text", "json", "srt", "vtt")
DECIDED = {
    "logger": "write logger=csv, logger=[csv,tensorboard] or logger=none",
    "callbacks": "add yours to the group: +callbacks.NAME._target_=package.module.Name",
    "default_root_dir": "write run_dir=FOLDER",
    "use_distributed_sampler": "leave it out: batches are shared among the devices when they are made",
    "enable_checkpointing": "leave it out: a run keeps its best and its last weights",
    "enable_model_summary": "leave it out: the components of the model are shown before training starts",
    "overfit_batches": "write trainer.limit_train_batches=NUMBER, or data.path=PATH of data with few utterances",
}
"""Options of the Trainer that follow from others, and what to write instead."""


ENTRIES = ("augment", "callbacks", "logger")
"""Groups of several objects by name."""
HYDRAS = {
    "_partial_": "bool",
    "_args_": "list",
    "_recursive_": "bool",
    "_convert_": "Literal['none', 'partial', 'object', 'all']",
}
"""Keys of Hydra in a node with `_target_`."""


OF_TRAINER: dict[str, Any] = {
    "val_check_interval": Count,
    "accumulate_grad_batches": Count,
    "log_every_n_steps": CountOrZero,
    "gradient_clip_val": NonNegative,
}
"""Ranges of numbers that the Trainer does not check."""


OF_ONE_TASK = {
    "audio": "transcribe",
    "format": "transcribe",
    "out": "transcribe or task=export",
    "hub": "export",
    "dry_run": "export",
    "runs": "compare",
    "memory_gb": "fit_batches",
}
"""Options of the root that one task alone reads, or two."""


def one_of(*choices: str) -> Any:
    """A root field that holds one of a few words, the first by default."""
    return field(default=choices[0], metadata={"choices": choices})


@dataclass
class Config:
    """The root: plain values are typed here, groups by the signatures of their targets."""

    task: str = one_of("train", "evaluate", "transcribe", "serve", "compare", "export", "inspect", "fit_batches")
    seed: Seed = 0
    size: str = one_of("tiny", "base", "large")
    pretrained: bool = True
    target: str = one_of("transcription", "translation")
    normalizer: str = one_of("lowercase", "none", "whisper_english", "whisper_basic")
    training_normalizer: str = one_of("none", "lowercase", "whisper_english", "whisper_basic")
    vocabulary_texts: CountOrZero | None = 100_000
    inspect_utterances: Count | None = 20_000
    memory_gb: Positive | None = None
    activation_checkpointing: bool = False
    compile: str = one_of("none", "inductor", "aot_eager", "eager")
    packing: str = one_of("auto", "never", "always")
    run_dir: str = MISSING
    resume: str = "none"
    checkpoint: str | None = None
    audio: Any = field(default=None, metadata={"takes": "str | Sequence[str] | None"})
    runs: Any = field(default=None, metadata={"takes": "Sequence[str] | None"})
    format: Any = "text"
    out: str | None = None
    hub: str | None = None
    dry_run: bool = True
    split: str = one_of("test", "validation", "train")

    metrics: Any = None
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
    serve: Any = None
    trainer: Any = None
    strategy: Any = None
    logger: Any = None
    callbacks: Any = None
    export: Any = None


ANNOTATIONS = {name: formatannotation(hint) for name, hint in get_type_hints(Config, include_extras=True).items()}


ROOT = {each.name: each for each in fields(Config)}


def register() -> None:
    """Makes the typed root known to Hydra, as `schema` in a defaults list, and our resolvers to OmegaConf."""
    from hydra.core.config_store import ConfigStore

    store: Any = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.__deepcopy__ = lambda memo: store  # Hydra copies it for each question about its groups, 140 times for --help
    OmegaConf.register_new_resolver("by_size", by_size, replace=True)
    OmegaConf.register_new_resolver("for_demo", for_demo, replace=True)


def by_size(tiny: Any, base: Any, large: Any, *, _root_: DictConfig) -> Any:
    """`${by_size:1e-3,1e-4,3e-5}` in YAML: the value that goes with the root's `size`.

    A model of size=tiny that starts from a checkpoint is not tiny: it gets the value of base.
    """
    checkpoints = ("checkpoint", "encoder.checkpoint", "decoder.checkpoint")
    starts_random = all(OmegaConf.select(_root_, each, default=None) is None for each in checkpoints)
    return {"base": base, "large": large}.get(_root_.size, tiny if starts_random else base)


def for_demo(value: Any, *, _root_: DictConfig) -> Any:
    """`${for_demo:VALUE}` in YAML: the value for random weights of size=tiny on the embedded corpus alone, else null."""
    common = OmegaConf.select(_root_, "data.path", default=None)
    mix = OmegaConf.select(_root_, "data.mix", default=None) or {"": {}}
    paths = {source.get("path", common) for source in mix.values()}
    return by_size(value, None, None, _root_=_root_) if paths == {"spoken_digits"} else None


def conf_dir() -> Path:
    """The folder of option files: inside the package once installed, beside it in a checkout."""
    packaged = Path(__file__).parents[1] / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "conf"


def find_problems(config: DictConfig) -> list[UserError]:
    """Every value of a composed configuration that cannot work, found without building anything."""
    problems = [*check_root(config), *broken_rules(config)]
    for key in config:
        if key != "hydra":
            problems += check_value(config, key, str(key))
    if OmegaConf.select(config, "hydra.sweeper") is not None:
        problems += check_value(config.hydra, "sweeper", "hydra.sweeper")
    return problems


def check_references(node: DictConfig, path: str) -> Iterator[UserError]:
    """The references at any depth that cannot be resolved; a missing value is no fault here."""
    for key in cast(Any, node):
        name = f"{path}.{key}"
        if OmegaConf.is_interpolation(node, key):
            yield from broken_reference(node, key, name)
        elif not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
            yield from check_references(node[key], name)


def check_root(config: DictConfig) -> Iterator[UserError]:
    for each in ROOT.values():
        if each.name not in config:
            continue
        value, choices = plain(config, each.name), each.metadata.get("choices")
        if choices and value not in choices:
            wrong = f"{each.name} has no option {value!r}"
            yield UserError(each.name, value, wrong, suggest(str(value), choices))
        else:
            yield from misfits(each.name, value, each.metadata.get("takes", ANNOTATIONS[each.name]))


def check_value(node: DictConfig | ListConfig, key: Any, path: str) -> Iterator[UserError]:
    """Problems at one key and below it."""
    if OmegaConf.is_missing(node, key):
        yield UserError(path, UNSET, "no value is given", f"write {path}=VALUE")
    elif OmegaConf.is_interpolation(node, key):  # what it points to is checked in its own place
        yield from broken_reference(node, key, path)
    elif isinstance(value := node[key], ListConfig):
        for index in range(len(value)):
            yield from check_value(value, index, f"{path}[{index}]")
    elif isinstance(value, DictConfig):
        if "_target_" in value:
            of_user = path.startswith("metrics.")  # a function of texts, which are not known yet
            yield from check_target(completed_later(value) if of_user else value, path)
        for name in cast(Any, value):
            yield from check_value(value, name, f"{path}.{name}")


def broken_reference(node: DictConfig | ListConfig, key: Any, path: str) -> Iterator[UserError]:
    try:
        node[key]
    except InterpolationToMissingValueError:
        pass  # reported where the value is missing
    except (OmegaConfBaseException, RecursionError) as error:
        reference = cast(Any, OmegaConf.to_container(node, resolve=False))[key]
        wrong = f"this reference fails: {first_line(error)}"
        yield UserError(path, reference, wrong, "write a value, or refer to a key that has one")


def check_target(node: DictConfig, path: str) -> Iterator[UserError]:
    """A node's options against the signature of its `_target_`."""
    target = plain(node, "_target_")
    if not isinstance(target, str):
        wrong = f"expected a dotted name, not {as_yaml(target)}"
        yield UserError(f"{path}._target_", target, wrong, "write package.module.Name")
        return
    try:
        signature = read_signature(target)
    except UserError as error:
        yield UserError(f"{path}._target_", target, error.wrong, error.write)
        return
    yield from check_options(node, path, signature, target.rpartition(".")[2])


def completed_later(node: DictConfig) -> DictConfig:
    """A metric's node as a partial of its function, without what is not the function's."""
    options = [each for each in cast(Any, node) if each not in OF_METRICS]
    return cast(DictConfig, OmegaConf.merge(OmegaConf.masked_copy(node, options), {"_partial_": True}))


def check_options(node: DictConfig, path: str, signature: Signature, name: str) -> Iterator[UserError]:
    known = {each.name: each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD}
    given: list[Any] = [key for key in node.keys() if not str(key).startswith("_")]  # noqa: SIM118 - also missing values
    for directive, annotation in HYDRAS.items():
        yield from misfits(f"{path}.{directive}", plain(node, directive), annotation) if directive in node else ()
    for key in given:
        option, value = f"{path}.{key}", plain(node, key)
        if key in known and known[key].annotation is not Signature.empty:
            yield from misfits(option, value, known[key].annotation)
        elif key not in known and (len(known) == len(signature.parameters) or not isinstance(key, str)):
            yield UserError(option, value, f"{name} has no option {str(key)!r}", suggest(str(key), known))
    placed = plain(node, "_args_")
    completed = plain(node, "_partial_") in (True, UNSET)
    for each in [] if completed else list(known.values())[len(placed) if isinstance(placed, list) else 0 :]:
        if each.default is each.empty and each.name not in given:
            option, annotation = f"{path}.{each.name}", "" if each.annotation is each.empty else each.annotation
            yield UserError(option, UNSET, f"{name} needs {each.name!r}", example(option, annotation))


# --- rules about options that no signature tells: about a single value, or one that another option asks for


def broken_rules(config: DictConfig) -> Iterator[UserError]:
    """An error for each rule that a composed configuration breaks."""
    task = config.get("task")
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
    for option, reader in OF_ONE_TASK.items():
        value = plain(config, option) if option in config else ROOT[option].default
        if (
            task in ROOT["task"].metadata["choices"]
            and task not in reader.split(" or task=")
            and value != ROOT[option].default
        ):
            wrong = f"task={reader} alone reads it, and this is task={task}"
            yield UserError(option, value, wrong, f"write task={reader}, or leave {option} out")
    if "format" in config:
        yield from format_rules(plain(config, "format"), config.get("out"))
    if "metrics" in config:
        yield from metric_problems(config)
    mix = plain(config.data, "mix") if isinstance(config.get("data"), DictConfig) else None
    for name, dataset in mix.items() if isinstance(mix, dict) else ():
        if isinstance(dataset, dict):
            weight = dataset.get("weight", 1.0)
            yield from misfits(f"data.mix.{name}.weight", weight, formatannotation(Positive))
    if task not in ("train", "fit_batches"):
        return
    for group in ENTRIES:
        yield from entry_rules(config.get(group), group)
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
    named = sorted(file.stem for file in (conf_dir() / "metrics").glob("*.yaml") if file.stem != "auto")
    yield from metric_rules(plain(config, "metrics"), named, config.get("target"))


def entry_rules(entries: Any, group: str) -> Iterator[UserError]:
    """A group of several objects has names, and under each of them one object or null."""
    name: Any
    for name in entries if isinstance(entries, DictConfig) else ():
        node = plain(entries, name)
        if node not in (None, UNSET) and not (isinstance(node, dict) and "_target_" in node):
            write = (
                f"write +{group}.NAME._target_=package.module.Name; in an option file, the name stands above _target_"
            )
            yield UserError(f"{group}.{name}", node, "this has a name of its own, and a _target_", write)


def format_rules(value: object, out: object) -> Iterator[UserError]:
    """Formats of texts, one or a list; only files hold several."""
    formats = value if isinstance(value, list) else [value]
    for unknown in [each for each in formats if each not in FORMATS] or ([value] if value == [] else []):
        yield UserError("format", value, f"format has no option {unknown!r}", suggest(str(unknown), FORMATS))
    if len(formats) > 1 and not out:
        yield UserError("out", out, "several formats do not go to the terminal together", "write out=FOLDER")


def trainer_rules(trainer: DictConfig) -> Iterator[UserError]:
    """Lightning's Trainer would take these, or refuse them late."""
    for option in filter(trainer.__contains__, DECIDED):
        wrong = f"{option} is decided elsewhere"
        yield UserError(f"trainer.{option}", plain(trainer, option), wrong, DECIDED[option])
    if "precision" in trainer and plain(trainer, "precision") is None:
        write = "write trainer.precision=auto, 32-true, 16-mixed or bf16-mixed"
        yield UserError("trainer.precision", None, "training has a precision", write)
    for option, hint in OF_TRAINER.items():
        value = plain(trainer, option)
        if type(value) is int or (type(value) is float and hint is NonNegative):
            yield from misfits(f"trainer.{option}", value, formatannotation(hint))
    max_time = plain(trainer, "max_time")
    if isinstance(max_time, int | float):
        write = 'write trainer.max_time="DD:HH:MM:SS", or trainer.max_time={minutes: NUMBER}'
        yield UserError("trainer.max_time", max_time, "this has no unit", write)


# --- values of a configuration


def plain(node: DictConfig, key: Any) -> object:
    """A node's value as plain Python; UNSET where it is missing or refers to nothing yet."""
    try:
        value = UNSET if OmegaConf.is_missing(node, key) else node.get(key)
        is_node = isinstance(value, DictConfig | ListConfig)
        return OmegaConf.to_container(value, resolve=True) if is_node else value
    except (OmegaConfBaseException, RecursionError):
        return UNSET


def first_line(error: BaseException) -> str:
    """The first line of its message, or the beginning of one that holds whole groups."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) <= MOST_OF_LINE else f"{line[:MOST_OF_LINE]}..."
