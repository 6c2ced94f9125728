"""Checks values by the annotation of their option: type, choices, range of numbers."""

from __future__ import annotations

import ast
import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, lru_cache, wraps
from inspect import formatannotation, signature
from math import inf, isfinite
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ForwardRef, Literal, Optional, TypeVar, Union, get_args, get_origin, get_type_hints

from sedtrain.errors import UNSET, UserError, as_yaml
from sedtrain.ranges import Range

MAX_NAMES = 12
"""With more names than this, `suggest` shows only the closest."""
GENERIC: dict[str, Any] = {
    **dict.fromkeys(["list", "List", "Sequence", "Iterable", "Collection", "set", "Set", "frozenset"], list),
    **dict.fromkeys(["tuple", "Tuple"], tuple),
    **dict.fromkeys(["dict", "Dict", "Mapping", "MutableMapping"], dict),
    **dict.fromkeys(["Union", "Required", "Final", "InitVar"], Union),  # Union[X] is X
    **{"Optional": Optional, "Literal": Literal, "Annotated": Annotated},
}
PLAIN: dict[str, Any] = {
    **dict.fromkeys(["str", "Path", "PathLike", "PurePath"], str),
    **{"bool": bool, "int": int, "float": float, "NoneType": None, "Range": Range, "inf": inf},
    "Tensor": type("Tensor", (), {}),  # in torch.optim lr is `float | Tensor`; no YAML value is a Tensor
}
EXAMPLES = {
    bool: "write {0}=true or {0}=false",
    int: "write a whole number, e.g. {0}={1}",
    float: "write a number, e.g. {0}={1}",
    list: "write a list, e.g. '{0}=[first,second]'",
    dict: "write named values, e.g. '{0}={{first: 1}}'",
    NoneType: "write {0}=VALUE",
}

EXAMPLES_IN_PYTHON = {
    "write a list": "write a list, e.g. {0}=['first', 'second']",
    "write named values": "write named values, e.g. {0}={{'first': 1}}",
    "write it in quotes": "write it in quotes: {0}='{1}'",
    "write its texts in quotes": "write a list of texts, e.g. {0}=['first', 'second']",
}
Checked = TypeVar("Checked", bound=Callable[..., Any])


class Unknown:
    """The type behind any name that is not listed above; every value fits it."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...


NAMES = defaultdict[str, Any](lambda: Unknown, GENERIC | PLAIN)


class Shortened(ast.NodeTransformer):
    """Drops packages from names, and the arguments of unknown generic types."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        return ast.Name(node.attr, ast.Load())

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        return self.generic_visit(node) if last_name(node) in GENERIC else self.visit(node.value)


def last_name(node: ast.expr) -> str:
    """The last identifier of an expression: `field` of `dataclasses.field()`, `list` of `list[int]`."""
    return re.split(r"[\[(]", ast.unparse(node))[0].rpartition(".")[2]


@lru_cache(maxsize=1024)
def evaluated(annotation: str) -> Any:
    """The type that an annotation means. Imports nothing: names of other packages become Unknown."""
    try:
        expression = ast.fix_missing_locations(Shortened().visit(ast.parse(annotation, mode="eval")))
        return eval(compile(expression, annotation, "eval"), {"__builtins__": {}}, NAMES)
    except (SyntaxError, TypeError, ValueError, ArithmeticError):
        return Unknown


def fits(value: object, annotation: str) -> bool:
    """True if a plain YAML value fits an annotation. Everything fits an unknown name; a node with `_target_` always fits."""
    return is_of(evaluated(annotation), value)


def is_of(kind: Any, value: Any) -> bool:
    """True if a plain YAML value fits a type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, str | ForwardRef):
        return fits(value, kind if isinstance(kind, str) else kind.__forward_arg__)
    is_known = origin or kind is None or (isinstance(kind, type) and kind is not Unknown)
    if not is_known or (isinstance(value, dict) and "_target_" in value):
        return True
    if origin in (Union, UnionType):
        return any(is_of(member, value) for member in arguments)
    if origin is Annotated:
        is_number = isinstance(value, int | float)
        in_ranges = all(value in found for found in arguments if is_number and isinstance(found, Range))
        return in_ranges and is_of(arguments[0], value)
    if origin is Literal:
        return any(choice is Unknown or (type(value), value) == (type(choice), choice) for choice in arguments)
    if isinstance(value, dict) and origin is dict:
        return all(is_of(arguments[-1], item) for item in value.values())
    if isinstance(value, list) and origin is tuple and ... not in arguments:
        return len(value) == len(arguments) and all(map(is_of, arguments, value))
    if isinstance(value, list) and origin in (list, tuple):
        return all(is_of(arguments[0], item) for item in value)
    if kind is float and isinstance(value, float) and not isfinite(value):
        return False
    accepted: Any = {None: NoneType, float: (int, float), tuple: list}.get(kind, origin or kind)
    return origin is None and isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))


def nested_types(kind: Any) -> Iterator[Any]:
    """A type and, in order, all types inside its arguments."""
    yield kind
    for argument in get_args(kind):
        yield from nested_types(argument)


def literals(annotation: str) -> list[object]:
    """The values of every `Literal[...]` in an annotation, in order."""
    kinds = nested_types(evaluated(annotation))
    return [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]


def misfits(option: str, value: object, annotation: str) -> Iterator[UserError]:
    """Errors of a value that does not fit its annotation; for a mapping, one for each misfitting entry."""
    if value == UNSET or fits(value, annotation):
        return
    entry_types = [get_args(kind)[-1] for kind in nested_types(evaluated(annotation)) if get_origin(kind) is dict]
    if isinstance(value, dict) and entry_types:
        for name, entry in value.items():
            yield from misfits(f"{option}.{name}", entry, formatannotation(entry_types[0]))
    elif choices := literals(annotation):
        names = ["null" if choice is None else str(choice) for choice in choices]
        yield UserError(option, value, f"expected {annotation}", suggest(str(value), names))
    else:
        words = in_words(evaluated(annotation)) if "Range(" in annotation else annotation
        if isinstance(value, float) and not isfinite(value) and "Range(" not in annotation:
            words = "a finite number"
        yield UserError(option, value, f"expected {words}", example(option, annotation, value))


def in_words(kind: Any) -> str:
    """A type in the words of an error message, such as `a list, each a number above 0`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return next((found.words for found in arguments if isinstance(found, Range)), in_words(arguments[0]))
    if origin in (Union, UnionType):
        return ", or ".join(map(in_words, arguments))
    if origin is dict:
        return f"named values, each {in_words(arguments[-1])}"
    if origin in (list, tuple):
        return f"a list, each {in_words(arguments[0])}"
    return "null" if kind in (None, NoneType) else formatannotation(kind)


def example(option: str, annotation: str, value: object = None) -> str:
    """Advice with an override of `option` that fits its annotation."""
    if isinstance(value, list) and fits([""], annotation) and all(type(number) in (int, float) for number in value):
        texts = ",".join(f'"{number}"' for number in value)
        return f"write its texts in quotes: '{option}=[{texts}]'"
    if fits("", annotation):  # texts, and options without annotation
        is_number = isinstance(value, int | float)
        return f"write it in quotes: '{option}=\"{as_yaml(value)}\"'" if is_number else f"write {option}=VALUE"
    sample = next((found for found in samples(annotation, value) if fits(found, annotation)), None)
    return EXAMPLES[type(sample)].format(option, sample)


def samples(annotation: str, value: object) -> Iterator[object]:
    """Candidates for an example, of all kinds, the best first."""
    yield True
    for kind in nested_types(evaluated(annotation)):
        if isinstance(kind, Range):
            yield from [*([0.1, 1.0] if isfinite(kind.high) else [1.0]), 1, kind.low, kind.high]
    yield from [0.1, int(value) if isinstance(value, float) and value.is_integer() else 1000, [], {}]


def closest(name: str, names: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), None)


def suggest(name: str, names: Iterable[str]) -> str:
    """Advice for an unknown name: the closest one, if any is close, and all public names unless there are many."""
    available = [known for known in names if known != "*" and not known.startswith("_")]
    match = closest(name, available)
    if match and len(available) > MAX_NAMES:
        return f"did you mean {match!r}?"
    question = f"did you mean {match!r}? " if match else ""
    return f"{question}available: {', '.join(available) or 'none'}"


# --- arguments of Python callers


def checked(component: str) -> Callable[[Checked], Checked]:
    """Decorator: the function raises one UserError for arguments that do not fit their annotations.

    component: prefix of its options on the command line, such as `adapter.`
    """

    def decorate(function: Checked) -> Checked:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            refuse_misfits(component, function, signature(function).bind(*args, **kwargs).arguments)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def refuse_misfits(component: str, target: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raises one UserError for all arguments of a function or class that do not fit their annotations."""
    hints = hints_of(target)
    errors = [
        UserError(error.option, error.value, error.wrong, error.write, in_python(name, error))
        for name, value in given.items()
        for error in misfits(f"{component}{name}", as_plain(value), hints.get(name, "Any"))
    ]
    if errors:
        raise UserError.all_of(errors)


@cache
def hints_of(target: Callable[..., Any]) -> dict[str, str]:
    """Annotations by parameter; none if they name something imported only for type checkers."""
    function = getattr(target, "__init__") if isinstance(target, type) else target  # noqa: B009 - mypy allows no other way
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError:
        return {}
    return {name: re.sub(r"\b(collections\.abc|typing)\.", "", formatannotation(hint)) for name, hint in hints.items()}


def in_python(name: str, error: UserError) -> str:
    """The advice in Python's notation, if it differs from the command line's; else empty."""
    texts = (text for start, text in EXAMPLES_IN_PYTHON.items() if error.write.startswith(start))
    return next(texts, "").format(name, error.value)


def as_plain(value: Any) -> Any:
    """The value in types of YAML; for other types UNSET, which fits any annotation."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list | set | range):
        return [as_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: as_plain(item) for key, item in value.items()}
    if getattr(value, "shape", None) == ():  # a scalar of NumPy or PyTorch
        value = value.item()
    return value if isinstance(value, str | int | float | None) else UNSET
