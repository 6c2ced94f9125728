"""The one error for what a user can repair: which option, its value, what is wrong, what to write instead."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

UNSET = "???"  # how YAML writes a value that nobody has given yet


class UserError(ValueError):
    """One mistake, or several that are reported together; prints without a traceback.

    option: dotted name as written on the command line, such as `data.path`
    value:  what the option holds
    wrong:  a sentence about what is wrong
    write:  what to write instead
    errors: the mistakes, one each; a single one is its own only element
    """

    def __init__(self, option: str, value: object, wrong: str | None = None, write: str | None = None) -> None:
        if wrong is None or write is None:  # TRANSITIONAL: UserError(wrong, write)
            option, value, wrong, write = "", UNSET, option, str(value)
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
        if not self.option:  # TRANSITIONAL
            return f"{self.wrong}\n  write instead: {self.write}"
        return "\n    ".join([f"  {self.option} = {_as_yaml(self.value)}", *lines])

    def __str__(self) -> str:
        number = len(self.errors)
        if not self.option:  # TRANSITIONAL
            return self.entry()
        return "\n\n".join([f"{number} problem{'s' if number > 1 else ''}:", *(each.entry() for each in self.errors)])

    @property
    def what_is_wrong(self) -> str:  # TRANSITIONAL
        return self.wrong

    @property
    def write_instead(self) -> str:  # TRANSITIONAL
        return self.write


# TRANSITIONAL from here to _as_yaml: gone once every file raises UserError(option, value, wrong, write)
def require(holds: bool, option: str, value: object, wanted: str) -> None:
    """Raises UserError where a number is not what its option wants, such as `a number above 0`."""
    if not holds:
        raise UserError(f"{option}={value}: this has to be {wanted}", f"{option}=NUMBER, {wanted}")


@dataclass(frozen=True)
class Problem:
    """One mistake: where, the value there, what is wrong with it, and what to write instead."""

    path: str
    value: object
    wrong: str
    write: str

    def __str__(self) -> str:
        return f"  {self.path} = {_as_yaml(self.value)}\n    {self.wrong}\n    {self.write}"


class ConfigError(Exception):
    """Everything the user has to repair; prints as one message."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(problems)
        self.problems = problems

    @classmethod
    def single(cls, path: str, value: object, wrong: str, write: str) -> ConfigError:
        return cls([Problem(path, value, wrong, write)])

    def __str__(self) -> str:
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        return "\n\n".join([f"{count} in the configuration:", *map(str, self.problems)])


def _as_yaml(value: object) -> str:
    """A value the way YAML writes it, cut to one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value) if value == UNSET else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
