"""Errors as tuples, which compare by what they say."""

from typing import NamedTuple


class Problem(NamedTuple):
    option: str
    value: object
    wrong: str
    write: str


def told(errors):
    return [Problem(*each.args[:4]) for each in errors]
