"""One dataset: where it is, the names of its splits, and which of its columns hold what."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from sedtrain.data.paths import local_path
from sedtrain.errors import UserError


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
        """`columns` by role, where `target`, transcription or translation, names the role of the text.

        where: the option that they belong to, for messages
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
    splits: its own names of train, validation and test; None for a split that it does not have
    name:   the Hub's name of a configuration
    audio_folder: where relative paths of audio files begin, which must not leave it; else the folder of `path`
    weight: how often its training split is seen in an epoch
    label:  its name in a mix, which its ids begin with
    language, task: of its texts where no column says it; how they came from the speech, `transcribe` or `translate`
    format: of another toolkit, a name of `toolkits.FORMATS`; None for files that say it themselves
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
        """The folder that paths of audio are relative to."""
        if self.audio_folder is not None:
            return Path(self.audio_folder).expanduser()
        where = local_path(self.path)
        return where if where.is_dir() else where.parent
