"""Reads small files of unknown origin as plain values: no tags, no aliases, limited size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from sedtrain.errors import UserError, one_line

MAX_BYTES = {".json": 10_000_000, ".txt": 10_000_000}
MAX_YAML_BYTES = 500_000  # half a gigabyte in memory, if every other byte is a value


class WithoutAliases(yaml.SafeLoader):
    """Refuses aliases, which repeat values: nine lines of them can stand for a billion values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "it has an alias", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def plain_value(file: Path, option: str, value: object, write: str) -> Any:
    """The plain values of a YAML or JSON file.

    Raises UserError(option, value, ..., write) if the file is unreadable, too large, or holds anything else.
    """
    try:
        return parsed(file)
    except OSError as error:
        raise UserError(option, value, f"this file cannot be read: {error}", write) from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        kind = "JSON" if file.suffix == ".json" else "YAML"
        wrong = f"{file.name} is no {kind} of plain values: {one_line(error)}"
        raise UserError(option, value, wrong, write) from error


def parsed(file: Path) -> Any:
    text = content(file)
    return json.loads(text) if file.suffix == ".json" else yaml.load(text, WithoutAliases)


def content(file: Path) -> str:
    """The text of a file. Raises ValueError if it is too large, not a regular file, or not UTF-8."""
    limit = MAX_BYTES.get(file.suffix, MAX_YAML_BYTES)
    if file.exists() and not file.is_file():
        raise ValueError("it is no file, but a folder, a pipe or a device")
    with file.open("rb") as opened:
        data = opened.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than {limit:,} bytes")
    return data.decode("utf-8")
