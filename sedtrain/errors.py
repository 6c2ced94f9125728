"""The one error for what a user can repair, and the end of a task that is done in part."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar

UNSET = "???"  # how YAML writes a value that nobody has given yet
IN_PYTHON = {
    r"\b(encoder|decoder)\.options\.(?=\w)": r"\1_",  # as from_encoder_decoder_pretrained takes them
    r"\b(encoder|decoder)\.attention\b": r"\1_attn_implementation",
    r"\battention=auto\b": "no attn_implementation",
    r"\b(encoder|decoder)\.checkpoint\b": r"\1_pretrained_model_name_or_path",
    r"\b(?:adapter|augment\.\w+|decoding|tokenizer)\.(?=\w+\b)": "",  # arguments of their classes
    r"\btask=evaluate checkpoint=(\S+)": r"sedtrain.load('\1')",
}
"""Options of the command line as expressions, and what Python's callers write for them."""


class UserError(ValueError):
    """One mistake, or several that are reported together; prints without a traceback.

    option: dotted name as written on the command line, such as `data.path`
    value:  what the option holds
    wrong:  a sentence about what is wrong
    write:  what to write instead
    errors: the mistakes, one each; a single one is its own only element

    The command line sets `on_command_line`; elsewhere the message names the arguments of Python's classes and functions.
    """

    on_command_line: ClassVar[bool] = False

    def __init__(self, option: str, value: object, wrong: str, write: str) -> None:
        super().__init__(option, value, wrong, write)
        self.option, self.value, self.wrong, self.write = option, value, wrong, write
        self.errors: tuple[UserError, ...] = (self,)

    @classmethod
    def all_of(cls, errors: Iterable[UserError]) -> UserError:
        """One error that reports each of `errors`, which must not be empty; equal ones once."""
        distinct = {error.entry(): error for several in errors for error in several.errors}
        first, *others = distinct.values()
        error = cls(first.option, first.value, first.wrong, first.write)
        error.errors = (first, *others)
        return error

    def entry(self) -> str:
        """Its part of the message: option and value, then indented lines of text."""
        lines = [line for text in (self.wrong, self.write) for line in text.splitlines()]
        entry = "\n    ".join([f"  {self.option} = {as_yaml(self.value)}", *lines])
        return entry if self.on_command_line else in_python(entry)

    def __str__(self) -> str:
        number = len(self.errors)
        return "\n\n".join([f"{number} problem{'s' if number > 1 else ''}:", *(each.entry() for each in self.errors)])


class Unfinished(Exception):
    """A task is done in part; the message says what exists and what does not. `status` is that of the command."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def in_python(text: str) -> str:
    """The text of an error with the names that Python's callers give to options of the command line."""
    for option, argument in IN_PYTHON.items():
        text = re.sub(option, argument, text)
    return text


def as_yaml(value: object) -> str:
    """A value the way YAML writes it, shortened to one line; a text, which may be a path, to a few."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value) if value == UNSET else repr(value)
    most = 400 if isinstance(value, str) else 100
    return text if len(text) <= most else f"{text[: most - 3]}..."
