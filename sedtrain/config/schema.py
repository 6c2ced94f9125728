"""The typed root of the configuration, the resolvers of its YAML files, and the folder that holds them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from inspect import formatannotation
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sedtrain.errors import UNSET
from sedtrain.ranges import Count, CountOrZero, Positive, Range

MAX_LINE = 200  # characters of another package's message
Seed = Annotated[int, Range("a whole number from 0 to 4294967295", low=0, high=2**32 - 1)]


def one_of(*choices: str) -> Any:
    """A field of the root with a few choices; the first is the default."""
    return field(default=choices[0], metadata={"choices": choices})


@dataclass
class Config:
    """The root of the configuration. Types plain values; the signatures of targets type the groups."""

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


ROOT = {option.name: option for option in fields(Config)}


def register() -> None:
    """Registers the root in Hydra, as `schema` in a defaults list, and the resolvers in OmegaConf."""
    from hydra.core.config_store import ConfigStore

    store: Any = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.__deepcopy__ = lambda memo: store  # Hydra copies it each time it lists a group, 140 times for --help
    OmegaConf.register_new_resolver("by_size", by_size, replace=True)
    OmegaConf.register_new_resolver("for_demo", for_demo, replace=True)


def by_size(tiny: Any, base: Any, large: Any, *, _root_: DictConfig) -> Any:
    """`${by_size:1e-3,1e-4,3e-5}` in YAML: the value for the root's `size`.

    With a checkpoint, size=tiny gets the value of base, because the model is then not tiny.
    """
    checkpoints = ("checkpoint", "encoder.checkpoint", "decoder.checkpoint")
    starts_random = all(OmegaConf.select(_root_, name, default=None) is None for name in checkpoints)
    return {"base": base, "large": large}.get(_root_.size, tiny if starts_random else base)


def for_demo(value: Any, *, _root_: DictConfig) -> Any:
    """`${for_demo:VALUE}` in YAML: the value if size=tiny starts random and trains only on the embedded corpus, else null."""
    common = OmegaConf.select(_root_, "data.path", default=None)
    mix = OmegaConf.select(_root_, "data.mix", default=None) or {"": {}}
    paths = {source.get("path", common) for source in mix.values()}
    return by_size(value, None, None, _root_=_root_) if paths == {"spoken_digits"} else None


def conf_dir() -> Path:
    """The folder of option files: inside an installed package, beside the package in a checkout."""
    packaged = Path(__file__).parents[1] / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "conf"


def plain(node: DictConfig, key: Any) -> object:
    """A node's value as plain Python; UNSET if it is missing or cannot be resolved yet."""
    try:
        value = UNSET if OmegaConf.is_missing(node, key) else node.get(key)
        is_node = isinstance(value, DictConfig | ListConfig)
        return OmegaConf.to_container(value, resolve=True) if is_node else value
    except (OmegaConfBaseException, RecursionError):
        return UNSET


def first_line(error: BaseException) -> str:
    """The first line of its message, shortened: some messages quote whole groups."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}..."
