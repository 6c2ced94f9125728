"""Describes each dataset by the options of `data`: its location, its splits and the roles of its columns."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from typing import Any, NoReturn

from sedtrain.data.buckets import buckets_of
from sedtrain.data.paths import absolute_path, is_pattern, local_path
from sedtrain.data.toolkits import COLUMNS, FORMATS, TRANSLATED, recognised
from sedtrain.errors import UserError
from sedtrain.text.tags import TASK_OF

SPLITS = {"train_split": "train", "validation_split": "validation", "test_split": "test"}
OPTIONS = ("path", "name", "format", "audio_folder", "columns", "target", "language", "weight", *SPLITS)
"""Options that a dataset of a mix may set."""


@dataclass(frozen=True)
class Columns:
    """Names of the dataset's columns by role; None if the dataset has no such column."""

    audio: str
    text: str
    id: str | None = None
    speaker: str | None = None
    language: str | None = None
    seconds: str | None = None
    start: str | None = None
    end: str | None = None

    @classmethod
    def of(cls, columns: Mapping[str, str | None], target: str, where: str = "data") -> "Columns":
        """The columns by role. `target`, transcription or translation, selects the column of the text.

        where: the option group, `data` or `data.mix.NAME`, for messages
        Raises UserError for an unknown role, and for a missing column of audio or text.
        """
        others = [field.name for field in fields(cls)[2:]]
        roles = ["audio", "transcription", "translation", *others]
        for role, column in columns.items():
            if role not in roles:
                write = f"write {where}.columns.NAME, NAME one of {', '.join(roles)}"
                raise UserError(f"{where}.columns.{role}", column, "there is no such role", write)
        for role in ("audio", target):
            if columns.get(role) is None:
                option = f"{where}.columns.{role}"
                raise UserError(option, None, f"target={target} needs this column", f"write {option}=COLUMN")
        return cls(str(columns["audio"]), str(columns[target]), **{role: columns.get(role) for role in others})


@dataclass(frozen=True)
class Source:
    """One dataset.

    path:   a file, a folder, a pattern of files, a URL or a Hub id
    splits: the dataset's names of train, validation and test; None for a split that it does not have
    name:   the configuration on the Hub
    audio_folder: the folder that relative audio paths start from and must not leave; None: the folder of `path`
    weight: visits of the training split in an epoch
    label:  the name in a mix; the dataset's ids begin with it
    language: language of the texts if no column gives it
    task:   relation of the texts to the speech, `transcribe` or `translate`
    format: a format of another toolkit, one of `toolkits.FORMATS`; None: the suffix tells the format
    """

    path: str
    columns: Columns
    splits: Mapping[str, str | None]
    name: str | None = None
    audio_folder: str | None = None
    weight: float = 1.0
    label: str = ""
    language: str | None = None
    task: str = "transcribe"
    format: str | None = None

    @property
    def folder(self) -> Path:
        """The folder that relative audio paths start from."""
        if self.audio_folder is not None:
            return Path(self.audio_folder).expanduser()
        where = local_path(self.path)
        return where if where.is_dir() else where.parent


def lasting(data: Mapping[str, Any]) -> dict[str, Any]:
    """The options with absolute paths, and with the buckets in place of their file, so that they hold in any folder."""
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


def refuse_same_for_all(sources: Iterable[Source]) -> None:
    """Raises UserError if training, validation and test data would be the same files."""
    errors = []
    for source in filter(is_same_for_all, sources):
        if names_several_files(source.path):
            wrong = "the same files would be training, validation and test data at once"
            write = "PATTERN with {split} where they differ (the same files for all splits are fine for task=evaluate)"
        else:
            wrong = "one file would be training, validation and test data at once"
            write = "FOLDER with train, validation and test files (a single file is fine for task=evaluate)"
        option = f"data.mix.{source.label}.path" if source.label else "data.path"
        errors.append(UserError(option, source.path, wrong, f"write {option}={write}"))
    if errors:
        raise UserError.all_of(errors)


def is_same_for_all(source: Source) -> bool:
    """True if several splits would be the same file, or the same files of a pattern or URL without `{split}`.

    Different slices of a file, such as `train[:90%]` and `train[90%:]`, are not the same.
    """
    path, splits = source.path, [str(split) for split in source.splits.values() if split is not None]
    slices = {split.partition("[")[2] for split in splits}
    if len(splits) < 2 or (len(slices) == len(splits) and "" not in slices):
        return False
    return Path(path).expanduser().is_file() or (names_several_files(path) and "{split}" not in path)


def names_several_files(path: str) -> bool:
    return is_pattern(path) or "://" in path


def sources_of(mix: Mapping[str, Mapping[str, Any]] | None, common: Mapping[str, Any]) -> list[Source]:
    """The datasets of a mix, or the only dataset. `common` holds the values of options that a dataset does not set."""
    if not mix:
        return [source_of(common, "data")]
    sources = []
    for label, options in mix.items():
        where = f"data.mix.{label}"
        for option, value in options.items():
            if option not in OPTIONS:
                write = f"write {where}.NAME, NAME one of {', '.join(OPTIONS)}"
                raise UserError(f"{where}.{option}", value, "there is no such option", write)
        columns = {**common["columns"], **options.get("columns", {})}
        sources.append(source_of({**common, **options, "columns": columns, "label": label}, where))
    return sources


def source_of(options: Mapping[str, Any], where: str) -> Source:
    """The dataset that `options` describe. Raises UserError for wrong values, since no signature checks a mix.

    where: the option group, `data` or `data.mix.NAME`, for messages
    """

    def refuse(option: str, value: object, wrong: str, write: str) -> NoReturn:
        raise UserError(f"{where}.{option}", value, wrong, f"write {where}.{write}")

    path, weight, target = options["path"], options.get("weight", 1.0), options["target"]
    columns, language = options["columns"], options["language"]
    if path is None:
        instead = ", or data.mix" if where == "data" else ""
        refuse("path", None, "no dataset is named", f"path=FOLDER_OR_FILE_OR_HUB_ID{instead}")
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < inf:
        refuse("weight", weight, "this has to be a number above 0", "weight=NUMBER, a number above 0")
    if target not in TASK_OF:
        refuse("target", target, "there is no such target", f"target=ONE_OF {', '.join(TASK_OF)}")
    if not isinstance(language, str | None):
        refuse("language", language, "this is no text", "language in quotes, as YAML reads no and on as values")
    if (format := options.get("format") or recognised(path)) is not None:
        if format not in FORMATS:
            refuse("format", format, "there is no such format", f"format=ONE_OF {', '.join(FORMATS)}")
        if target == "translation" and format not in TRANSLATED:
            write = f"format={TRANSLATED[0]}, or data=manifest with data.columns.translation=COLUMN"
            refuse("format", format, "target=translation: this format has no translations", write)
        columns = {name: name for name in COLUMNS if name != "text"} | {"transcription": "text"}
    return Source(
        columns=Columns.of(columns, target, where),
        format=format,
        splits={split: options[option] for option, split in SPLITS.items()},
        weight=float(weight),
        label=options.get("label", ""),
        task=TASK_OF[target],
        **{option: options[option] for option in ("path", "name", "audio_folder", "language")},
    )
