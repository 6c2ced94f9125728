"""Names close to one that does not exist."""

import difflib
from collections.abc import Iterable

MAX_NAMES = 12  # listed after a close one


def closest(name: str, names: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), None)


def suggest(name: str, names: Iterable[str]) -> str:
    """The close name, where there is one, and all public names, unless so many would hide the close one."""
    available = [each for each in names if each != "*" and not each.startswith("_")]
    match = closest(name, available)
    if match and len(available) > MAX_NAMES:
        return f"did you mean {match!r}?"
    question = f"did you mean {match!r}? " if match else ""
    return f"{question}available: {', '.join(available) or 'none'}"
