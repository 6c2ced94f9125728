"""What travels between the parts: utterances, batches, and the error that a user can repair.

B batch, S samples, F features, T frames, U target tokens.
"""

from __future__ import annotations

from dataclasses import dataclass


class UserError(ValueError):
    """A fault that the user can repair: what is wrong, and what to write instead."""

    def __init__(self, what_is_wrong: str, write_instead: str) -> None:
        super().__init__(what_is_wrong, write_instead)
        self.what_is_wrong = what_is_wrong
        self.write_instead = write_instead

    def __str__(self) -> str:
        return f"{self.what_is_wrong}\n  write instead: {self.write_instead}"


def require(holds: bool, option: str, value: object, wanted: str) -> None:
    """Raises UserError where a number is not what its option wants, such as `a number above 0`."""
    if not holds:
        raise UserError(f"{option}={value}: this has to be {wanted}", f"{option}=NUMBER, {wanted}")


UNSET = "???"  # how YAML writes a value that someone has yet to give


@dataclass(frozen=True)
class Problem:
    """One mistake: where, the value there, what is wrong with it, and what to write instead."""

    path: str
    value: object
    wrong: str
    write: str

    def __str__(self) -> str:
        return f"  {self.path} = {_shown(self.value)}\n    {self.wrong}\n    {self.write}"


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


def _shown(value: object) -> str:
    """A value the way YAML writes it, cut to one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value) if value == UNSET else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
