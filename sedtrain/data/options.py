"""The options of the group `data`, checked before anything is read, and the datasets that they name."""

from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Any

from sedtrain.data.buckets import buckets_of
from sedtrain.data.paths import absolute_path, is_pattern
from sedtrain.data.source import Columns, Source
from sedtrain.data.toolkits import COLUMNS, FORMATS, TRANSLATED, recognised
from sedtrain.errors import UserError
from sedtrain.text.tags import TASK_OF

SPLITS = {"train_split": "train", "validation_split": "validation", "test_split": "test"}
OPTIONS = ("path", "name", "format", "audio_folder", "columns", "target", "language", "weight", *SPLITS)
"""Options that each dataset of a mix may set for itself."""


def lasting(data: Mapping[str, Any]) -> dict[str, Any]:
    """The options with absolute paths and the buckets themselves as `batches`, so that they mean the same in any folder."""
    lasting = dict(data)
    if lasting.get("path"):
        lasting["path"] = absolute_path(lasting["path"])
    if lasting.get("mix"):
        lasting["mix"] = {
            name: {**source, "path": absolute_path(source["path"])} if source.get("path") else source
            for name, source in lasting["mix"].items()
        }
    if lasting.get("batches"):
        lasting["batches"] = [bucket._asdict() for bucket in buckets_of(lasting["batches"])]
    return lasting


def refuse_same_for_all(data: Mapping[str, Any]) -> None:
    """Raises UserError where training, validation and test data would be the same files."""
    errors = []
    for name, source in options_by_dataset(data).items():
        if not is_same_for_all(source):
            continue
        if names_several_files(source["path"]):
            wrong = "the same files would be training, validation and test data at once"
            write = "PATTERN with {split} where they differ (the same files for all splits are fine for task=evaluate)"
        else:
            wrong = "one file would be training, validation and test data at once"
            write = "FOLDER with train, validation and test files (a single file is fine for task=evaluate)"
        errors.append(UserError(f"{name}.path", source["path"], wrong, f"write {name}.path={write}"))
    if errors:
        raise UserError.all_of(errors)


def options_by_dataset(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of each dataset of the group `data`, by the dotted name in front of them."""
    common = {name: data.get(name) for name in OPTIONS}
    mix = data.get("mix") or {}
    return {f"data.mix.{name}": {**common, **options} for name, options in mix.items()} or {"data": common}


def is_same_for_all(source: Mapping[str, Any]) -> bool:
    """True where several splits would be one file or, by a pattern or URL without `{split}`, the same files.

    Different slices of a file, such as `train[:90%]` and `train[90%:]`, are not the same.
    """
    path, splits = source["path"], [str(source[split]) for split in SPLITS if source[split] is not None]
    slices = {split.partition("[")[2] for split in splits}
    if path is None or len(splits) < 2 or (len(slices) == len(splits) and "" not in slices):
        return False
    return Path(path).expanduser().is_file() or (names_several_files(path) and "{split}" not in path)


def names_several_files(path: str) -> bool:
    return is_pattern(path) or "://" in path


def sources_of(mix: Mapping[str, Mapping[str, Any]] | None, common: Mapping[str, Any]) -> list[Source]:
    """The datasets of a mix by name, or the only one; `common` has the options that a dataset leaves out."""
    if mix:
        return [mixed_source(name, options, common) for name, options in mix.items()]
    if common["path"] is None:
        wrong, write = "no dataset is named", "write data.path=FOLDER_OR_FILE_OR_HUB_ID, or data.mix"
        raise UserError("data.path", None, wrong, write)
    return [source_of(common, "data")]


def mixed_source(name: str, options: Mapping[str, Any], common: Mapping[str, Any]) -> Source:
    """One dataset of a mix. Raises UserError for an option that no signature checks, since a mix holds any names."""
    where = f"data.mix.{name}"

    def refuse(option: str, value: object, wrong: str, write: str) -> None:
        raise UserError(f"{where}.{option}", value, wrong, f"write {where}.{write}")

    for option, value in options.items():
        if option not in OPTIONS:
            refuse(option, value, "there is no such option", f"NAME, NAME one of {', '.join(OPTIONS)}")
    columns = {**common["columns"], **options.get("columns", {})}
    chosen = {"weight": 1.0, **common, **options, "columns": columns, "label": name}
    weight, target, language = chosen["weight"], chosen["target"], chosen["language"]
    if chosen["path"] is None:
        refuse("path", None, "no dataset is named", "path=FOLDER_OR_FILE_OR_HUB_ID")
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < inf:
        refuse("weight", weight, "this has to be a number above 0", "weight=NUMBER, a number above 0")
    if target not in TASK_OF:
        refuse("target", target, "there is no such target", f"target=ONE_OF {', '.join(TASK_OF)}")
    if not isinstance(language, str | None):
        refuse("language", language, "this is no text", "language in quotes, as YAML reads no and on as values")
    return source_of(chosen, where)


def source_of(options: Mapping[str, Any], where: str) -> Source:
    format = options.get("format") or recognised(options["path"])
    return Source(
        columns=columns_of(format, options, where),
        format=format,
        splits={split: options[option] for option, split in SPLITS.items()},
        weight=float(options.get("weight", 1.0)),
        label=options.get("label", ""),
        task=TASK_OF[options["target"]],
        **{option: options[option] for option in ("path", "name", "audio_folder", "language")},
    )


def columns_of(format: str | None, options: Mapping[str, Any], where: str) -> Columns:
    """The columns that the options name, or the columns of a format. Raises UserError for a format that lacks one."""
    if format is None:
        return Columns.of(options["columns"], options["target"], where)
    if format not in FORMATS:
        write = f"write {where}.format=ONE_OF {', '.join(FORMATS)}"
        raise UserError(f"{where}.format", format, "there is no such format", write)
    if options["target"] == "translation" and format not in TRANSLATED:
        write = f"write {where}.format={TRANSLATED[0]}, or data=manifest with data.columns.translation=COLUMN"
        raise UserError(f"{where}.format", format, "target=translation: this format has no translations", write)
    roles = {name: name for name in COLUMNS if name != "text"} | {"transcription": "text"}
    return Columns.of(roles, options["target"], where)
