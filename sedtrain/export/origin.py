"""Reads from a run's options, which may be a stranger's, what a model card says about training."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sedtrain.data.paths import is_here, public_name
from sedtrain.text.tags import Tags, WholePrompt

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_DATA = re.compile(rf"hf://datasets/({HUB_ID.pattern})[@/].+|({HUB_ID.pattern})(?:@.+)?")
"""A dataset of the Hub as `data.path` names it: a URL of its files, or an id; both may name a revision."""
NO_NAME = re.compile(r"[^\w.-]+")
LANGUAGE = re.compile(r"[a-z]{2,3}(-\w+)*")
SHOWN: dict[str, tuple[str, ...] | None] = {
    **dict.fromkeys(("seed", "size", "training_normalizer", "adapter", "finetune", "loss", "optimizer", "scheduler")),
    "augment": None,
    "data": ("batch_seconds", "batch_tokens", "max_seconds"),
    "trainer": ("max_steps", "max_epochs", "precision", "accumulate_grad_batches", "gradient_clip_val"),
}
"""Options that a card shows, by group; None: all options of the group."""


@dataclass(frozen=True)
class Origin:
    """Facts about a model's training for its card.

    data:        names of the training data; empty if unknown
    datasets, base_models: Hub ids
    languages:   language codes of the texts
    settings:    options of the training, without paths of a machine
    """

    data: str
    datasets: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    license: str | None = None


def origin_of(
    settings: Mapping[str, Any], language: str | None, license: str | None, tags: Tags | WholePrompt | None
) -> Origin:
    """The origin of a model.

    settings: its run's configuration as plain values; empty if there is none
    language: language of the texts, in addition to those that the model's tags name
    """
    paths = list(data_paths(settings))
    languages = [language] if language else []
    languages += [each for of_task in tags.ids.values() for each in of_task] if isinstance(tags, Tags) else []
    return Origin(
        data=" + ".join(dict.fromkeys(map(public_name, paths))),
        datasets=tuple(dict.fromkeys(filter(None, map(hub_dataset, paths)))),
        base_models=tuple(dict.fromkeys(filter(is_on_hub, checkpoints(settings)))),
        languages=tuple(dict.fromkeys(each for each in languages if LANGUAGE.fullmatch(each))),
        settings=dict(shown(settings)),
        license=license,
    )


def is_on_hub(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not is_here(name)


def hub_dataset(path: str) -> str | None:
    """The id of a dataset of the Hub; None for files of this machine or of other servers."""
    found = HUB_DATA.fullmatch(path)
    if not found or (found[2] and is_here(found[2])):
        return None
    return found[1] or found[2]


def hub_data(described: str) -> tuple[str, str | None] | None:
    """Id and configuration from `Corpus.described`, for one split of one dataset of the Hub; None for other data."""
    path, *rest = described.split(", ")
    found = HUB_DATA.fullmatch(path)
    if not found or "+" in described or len(rest) not in (1, 2):
        return None
    return found[1] or found[2], rest[0] if len(rest) == 2 else None


def table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def data_paths(settings: Mapping[str, Any]) -> Iterator[str]:
    data = table(settings.get("data"))
    for source in [*table(data.get("mix")).values()] or [{}]:
        path = {**data, **table(source)}.get("path")
        yield from [path] if isinstance(path, str) else []


def checkpoints(settings: Mapping[str, Any]) -> Iterator[str]:
    """Names of the pretrained models that training started from."""
    size, pretrained = settings.get("size"), settings.get("pretrained")
    for part in (settings, table(settings.get("encoder")), table(settings.get("decoder"))):
        name = part.get("checkpoint") or (part.get(str(size)) if pretrained and size != "tiny" else None)
        yield from [name] if isinstance(name, str) else []


def shown(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, keys in SHOWN.items():
        value = settings.get(name)
        if keys is not None:
            value = {key: table(value)[key] for key in keys if key in table(value)}
        if value not in (None, {}):
            yield name, without_places(value)


def without_places(value: Any) -> Any:
    """The value with paths shortened to their last names."""
    if isinstance(value, dict):
        return {str(key): without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_places(each) for each in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~", ".")) else value
