"""The error for mistakes that a user can repair, and the exception that ends an unfinished task."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

YAML = {"true": True, "false": False, "null": None}
UNSET = "???"  # OmegaConf's mark of a missing value
REFUSED = object()  # in place of a component that could not be made
COMPONENT = (
    r"((augment|callbacks)\.\w+|metrics\.bleu|adapter|data|decoding|(en|de)coder|"
    r"finetune|loss|optimizer|scheduler|tokenizer|trainer)"
)
IN_PYTHON = {
    r"(encoder|decoder)\.options\.(?=\w)": r"\1_",  # as from_encoder_decoder_pretrained takes them
    r"(encoder|decoder)\.attention\b": r"\1_attn_implementation",
    rf"{COMPONENT}\.(?=[a-z])": "",  # arguments of their class or function
}
"""Patterns of options on the command line, and the arguments of Python callers."""


class UserError(ValueError):
    """One mistake, or several reported together; prints without a traceback.

    option: dotted name as on the command line, such as `data.path`
    value:  the option's value
    wrong:  a sentence about what is wrong
    write:  what to write instead
    python: what Python callers write, if dropping component names from `write` does not give it
    errors: all mistakes, one each; a single mistake lists itself

    on_command_line: True names options as on the command line, False as Python arguments; the command sets it for all errors
    """

    on_command_line: bool = False

    def __init__(self, option: str, value: object, wrong: str, write: str, python: str = "") -> None:
        super().__init__(option, value, wrong, write, *filter(None, [python]))
        self.option, self.value, self.wrong, self.write, self.python = option, value, wrong, write, python
        self.errors: tuple[UserError, ...] = (self,)

    @classmethod
    def all_of(cls, errors: Iterable[UserError]) -> UserError:
        """One error that reports each of `errors` (at least one), without duplicates."""
        distinct = {error.entry(): error for several in errors for error in several.errors}
        first, *others = distinct.values()
        error = cls(first.option, first.value, first.wrong, first.write, first.python)
        error.errors = (first, *others)
        return error

    def entry(self) -> str:
        """This error's part of the message: option and value, then indented lines of text."""
        option, value, write = self.option, as_yaml(self.value), self.write
        if not self.on_command_line:
            option, value, write = in_python(option), shortened(self.value, repr), self.python or in_python(write)
        lines = [line for text in (self.wrong, write) for line in text.splitlines()]
        return "\n    ".join([f"  {option} = {value}", *lines])

    def __str__(self) -> str:
        number = len(self.errors)
        return "\n\n".join([f"{number} problem{'s' if number > 1 else ''}:", *(each.entry() for each in self.errors)])


class Attempts:
    """Makes components one after the other, and collects their UserErrors."""

    def __init__(self) -> None:
        self.errors: list[UserError] = []

    def __call__(self, make: Any, *needed: Any) -> Any:
        """The result of `make(*needed)`; REFUSED if it raises UserError, or if an argument is REFUSED."""
        if any(part is REFUSED for part in (make, *needed)):
            return REFUSED
        try:
            return make(*needed)
        except UserError as error:
            self.errors.append(error)
            return REFUSED

    def report(self) -> None:
        """Raises one UserError for all collected errors, if any."""
        if self.errors:
            raise UserError.all_of(self.errors) from self.errors[0]


class Unfinished(Exception):
    """A task ended early. The message says what exists and what does not.

    status: exit status of the command
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def in_python(text: str) -> str:
    """Text for Python callers: names of options become arguments, and values become Python literals."""
    for option, argument in IN_PYTHON.items():
        text = re.sub(rf"(?<![^\s('\[]){option}", argument, text)
    return re.sub(r"(?<=\w=)(?>[a-z](?:[\w./-]*\w)?)(?![(\[])", lambda word: repr(YAML.get(word[0], word[0])), text)


def as_yaml(value: object) -> str:
    """A value in YAML's notation, shortened to one line, or to a few for a text, which may be a path."""
    if value is None or isinstance(value, bool):
        return next(word for word, known in YAML.items() if known is value)
    return shortened(value, str if value == UNSET else repr)


def shortened(value: object, written: Callable[[object], str]) -> str:
    text, most = written(value), 400 if isinstance(value, str) else 100
    return text if len(text) <= most else f"{text[: most - 3]}..."


def one_line(error: BaseException, length: int = 200) -> str:
    """The beginning of an error's message, on one line."""
    return " ".join(str(error).split())[:length]
