"""Values of a family's configuration: sizes, fractions and the like in the range that their default tells."""

import re
from collections.abc import Iterator, Mapping
from types import GenericAlias
from typing import Annotated, Any

from sedtrain.annotations import Unknown, as_plain, in_words, is_of
from sedtrain.errors import UserError
from sedtrain.ranges import Count, CountOrZero, Fraction, FractionBelowOne, NonNegative, Range

DROPPED = re.compile("drop")
FRACTIONS = re.compile(r"_prob(_|$)")
MAY_BE_ZERO = re.compile(r"_ids?$|_tokens$|min_|chunk|offset|encoder_layers$|first_k|max_window")
LAYERS = re.compile(r"layers?$")
NumLayers = Annotated[int, Range("a whole number from 1 to 1,000", low=1, high=1000)]
NumLayersOrZero = Annotated[int, Range("a whole number from 0 to 1,000", low=0, high=1000)]


def refuse_impossible(part: str, given: Mapping[str, Mapping[str, Any]], defaults: Any) -> None:
    """Raises UserError for values that no model of the family can have.

    given: values by the name of the option that holds them, such as {"options": {"hidden_size": 0}}
    defaults: a configuration of the family with its own values
    """
    errors = []
    for option, values in given.items():
        for name, value in values.items():
            if words := next(misfit(name, value, getattr(defaults, name, None)), None):
                path = f"{part}.{option}.{name}"
                errors.append(UserError(path, value, f"expected {words}", f"write {path}=VALUE, {words}"))
    if errors:
        raise UserError.all_of(errors)


def refuse_uneven(part: str, given: Mapping[str, Mapping[str, Any]], config: Any) -> None:
    """Raises UserError for numbers of heads that do not divide the width; many families find out in their first step."""
    width = getattr(config, "hidden_size", None) or 0
    for option, values in given.items():
        for name, value in values.items():
            if name.endswith("attention_heads") and value and width % value:
                path = f"{part}.{option}.{name}"
                most = max(heads for heads in range(1, min(value, width) + 1) if width % heads == 0)
                raise UserError(path, value, f"it does not divide the width, {width}", f"write {path}={most}")


def misfit(name: str, value: Any, default: Any) -> Iterator[str]:
    """The kind in words of which a value is not; what has no plain default fits, and null but for a fraction."""
    kind = kind_of(name, default)
    may_be_null = default is None or kind not in (FractionBelowOne, Fraction)
    if kind is not None and not (value is None and may_be_null) and not is_of(kind, as_plain(value)):
        yield in_words(kind)


def kind_of(name: str, default: Any) -> Any:
    if isinstance(default, bool | str):
        return type(default)
    if not isinstance(default, list | tuple):
        return range_of(name, default)
    alike = len({type(each) for each in default}) == 1 and not isinstance(default[0], list | tuple)
    return GenericAlias(list, (kind_of(name, min(default)) or Unknown,)) if alike else list


def range_of(name: str, default: Any) -> Any:
    """The range of a configuration's attribute, None where neither its name nor its default tells one."""
    if isinstance(default, bool):
        return None
    if DROPPED.search(name):
        return FractionBelowOne
    if FRACTIONS.search(name):
        return Fraction
    if not isinstance(default, int | float) or default < 0:
        return None
    if isinstance(default, float):
        return NonNegative
    may_be_zero = default == 0 or MAY_BE_ZERO.search(name)
    if LAYERS.search(name):
        return NumLayersOrZero if may_be_zero else NumLayers
    return CountOrZero if may_be_zero else Count
