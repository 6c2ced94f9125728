"""Several datasets as one, each with its own columns and its share of an epoch."""

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

from sedtrain.batch import UserError, require
from sedtrain.data.columns import Columns
from sedtrain.data.formats import is_pattern
from sedtrain.data.parts import Source
from sedtrain.tags import TASK_OF

SPLITS = {"train_split": "train", "validation_split": "validation", "test_split": "test"}
OWN = ("path", "name", "audio_folder", "columns", "target", "language", "weight", *SPLITS)


def sources_of(mix: Mapping[str, Mapping[str, Any]] | None, common: Mapping[str, Any]) -> list[Source]:
    """The datasets of a mix by name, or the only one; what one does not say itself is taken from `common`."""
    if mix:
        return [named_source(name, options, common) for name, options in mix.items()]
    if common["path"] is None:
        raise UserError("data.path is not set", "data.path=FOLDER_OR_FILE_OR_HUB_ID, or data.mix")
    return [source_of(common, "data")]


def each_source(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of the datasets that the group `data` names, by where they stand."""
    common = {name: data.get(name) for name in OWN}
    mix = data.get("mix") or {}
    return {f"data.mix.{name}": {**common, **options} for name, options in mix.items()} or {"data": common}


def is_same_for_all(source: Mapping[str, Any]) -> bool:
    """Whether several splits would be the same file or, by a pattern or URL without `{split}`, the same files.

    Splits that are each cut differently, such as `train[:90%]` and `train[90%:]`, are not.
    """
    path, splits = source["path"], [str(source[split]) for split in SPLITS if source[split] is not None]
    cuts = {split.partition("[")[2] for split in splits}
    if path is None or len(splits) < 2 or (len(cuts) == len(splits) and "" not in cuts):
        return False
    return Path(path).expanduser().is_file() or (stands_for_several(path) and "{split}" not in path)


def stands_for_several(path: str) -> bool:
    return is_pattern(path) or "://" in path


def named_source(name: str, options: Mapping[str, Any], common: Mapping[str, Any]) -> Source:
    where = f"data.mix.{name}"
    if unknown := [key for key in options if key not in OWN]:
        raise UserError(f"{where}.{unknown[0]}: there is no such option", f"{where}.NAME, NAME one of {', '.join(OWN)}")
    if options.get("path", common["path"]) is None:
        raise UserError(f"{where}.path is not set", f"{where}.path=FOLDER_OR_FILE_OR_HUB_ID")
    weight = options.get("weight", 1.0)
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    require(is_number and 0 < weight < inf, f"{where}.weight", weight, "a number above 0")
    if options.get("target", common["target"]) not in TASK_OF:
        raise UserError(
            f"{where}.target={options['target']}: there is no such target",
            f"{where}.target=ONE_OF {', '.join(TASK_OF)}",
        )
    if not isinstance(language := options.get("language"), str | None):
        raise UserError(
            f"{where}.language={language}: this is no text",
            f"{where}.language in quotes, as YAML reads no and on as values",
        )
    columns = {**common["columns"], **options.get("columns", {})}
    return source_of({**common, **options, "columns": columns, "label": name}, where)


def source_of(options: Mapping[str, Any], where: str) -> Source:
    return Source(
        path=options["path"],
        columns=Columns.of(options["columns"], options["target"], where),
        splits={split: options[option] for option, split in SPLITS.items()},
        name=options["name"],
        audio_folder=options["audio_folder"],
        weight=float(options.get("weight", 1.0)),
        label=options.get("label", ""),
        language=options["language"],
        task=TASK_OF[options["target"]],
    )


def heated(sizes: Sequence[int], temperature: float) -> list[float]:
    """How often each of several datasets is seen in an epoch, so that their shares are those of size ** (1 / temperature).

    An epoch stays as long as all of them together (arXiv 1907.05019, where the shares come from).
    """
    powers = [size ** (1 / temperature) for size in sizes]
    return [sum(sizes) * power / (sum(powers) * size) for size, power in zip(sizes, powers, strict=True)]
