"""Which columns of a dataset hold what, and what they have to hold."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import datasets

from sedtrain.batch import UserError


@dataclass(frozen=True)
class Columns:
    """Which column of the dataset holds what; None where the dataset has no such column."""

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

        where: the options that they stand in, for messages
        """
        roles = ["audio", "transcription", "translation", *(each.name for each in fields(cls)[2:])]
        if unknown := [role for role in columns if role not in roles]:
            instead = f"{where}.columns.NAME, NAME one of {', '.join(roles)}"
            raise UserError(f"{where}.columns.{unknown[0]}: there is no such role", instead)
        for role in ("audio", target):
            if columns.get(role) is None:
                raise UserError(
                    f"{where}.columns.{role} is not set (target={target})", f"{where}.columns.{role}=COLUMN"
                )
        others = {role: columns.get(role) for role in roles[3:]}
        return cls(audio=str(columns["audio"]), text=str(columns[target]), **others)


def is_value(feature: Any, *kinds: str) -> bool:
    """Whether a column holds single values of one of these kinds of Arrow types, or nothing at all."""
    return isinstance(feature, datasets.Value) and feature.dtype.startswith((*kinds, "null"))


def is_number(feature: Any) -> bool:
    return is_value(feature, "int", "uint", "float", "decimal")


def is_text(feature: Any) -> bool:
    return is_number(feature) or is_value(feature, "string", "large_string", "bool")


def is_audio(feature: Any) -> bool:
    is_plain = is_value(feature, "binary", "large_binary", "string", "large_string")
    is_both = isinstance(feature, dict) and not feature.keys().isdisjoint({"bytes", "path"})
    return is_plain or is_both or isinstance(feature, datasets.Audio)


WANTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "audio": (is_audio, "bytes or the path of a file"),
    "text": (is_text, "text"),
    "id": (is_text, "text or numbers"),
    "seconds": (is_number, "numbers"),
    "start": (is_number, "numbers"),
    "end": (is_number, "numbers"),
}
"""By role."""


def check_columns(columns: Mapping[str, str | None], features: Mapping[str, Any], source: str) -> None:
    """Raises UserError for a column that is missing, listing those that are there, or that holds something else.

    columns: the column of each role; features: what each column holds; source: where that is, for the message
    """
    for role, column in columns.items():
        if column is None:
            continue
        if column not in features:
            raise UserError(
                f"data.columns: {source} has no column {column!r} for the {role}, it has {', '.join(features)}",
                "data.columns.NAME=ONE_OF_THESE, where NAME is audio, transcription, translation, id, speaker, "
                "language, seconds, start or end",
            )
        fits, wanted = WANTED.get(role, (None, ""))
        if fits is not None and not fits(features[column]):
            raise UserError(
                f"data.columns: {source} has {str(features[column])[:80]} in the column {column!r} for the {role}, "
                f"expected {wanted}",
                f"data.columns.NAME=COLUMN that holds {wanted}",
            )


def rows_by_id(ids: list[str], column: str | None, split: str) -> dict[str, int]:
    """The row of every id. Raises UserError where two rows have the same."""
    rows: dict[str, int] = {}
    for index, id in enumerate(ids):
        if (first := rows.setdefault(id, index)) != index:
            raise UserError(
                f"data.columns.id={column}: rows {first} and {index} of {split!r} have the same id, {id!r}",
                "data.columns.id=COLUMN of ids that differ, or data.columns.id=null to name rows by their number",
            )
    return rows
