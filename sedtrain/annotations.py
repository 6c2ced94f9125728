"""Values against the annotation of an option: its type, its choices, its range of numbers."""

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

MAX_NAMES = 12  # listed after a close one
GENERIC: dict[str, Any] = {
    **dict.fromkeys(["list", "List", "Sequence", "Iterable", "Collection", "set", "Set", "frozenset"], list),
    **dict.fromkeys(["tuple", "Tuple"], tuple),
    **dict.fromkeys(["dict", "Dict", "Mapping", "MutableMapping"], dict),
    **dict.fromkeys(["Union", "Required", "Final", "InitVar"], Union),  # of a single type, Union is that type
    **{"Optional": Optional, "Literal": Literal, "Annotated": Annotated},
}
PLAIN: dict[str, Any] = {
    **dict.fromkeys(["str", "Path", "PathLike", "PurePath"], str),
    **{"bool": bool, "int": int, "float": float, "NoneType": None, "Range": Range, "inf": inf},
    "Tensor": type("Tensor", (), {}),  # no plain value is one: lr is `float | Tensor` in torch.optim
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
    """Any name that is not listed above; it takes every value."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...


NAMES = defaultdict[str, Any](lambda: Unknown, GENERIC | PLAIN)


class Short(ast.NodeTransformer):
    """Names without their packages, and without arguments where they do not count."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        return ast.Name(node.attr, ast.Load())

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        return self.generic_visit(node) if last_name(node) in GENERIC else self.visit(node.value)


def last_name(node: ast.expr) -> str:
    """The last identifier of an expression: `field` of `dataclasses.field()`, `list` of `list[int]`."""
    return re.split(r"[\[(]", ast.unparse(node))[0].rpartition(".")[2]


@lru_cache(maxsize=1024)
def evaluated(annotation: str) -> Any:
    """The type that an annotation means; nothing is imported for it."""
    try:
        expression = ast.fix_missing_locations(Short().visit(ast.parse(annotation, mode="eval")))
        return eval(compile(expression, annotation, "eval"), {"__builtins__": {}}, NAMES)
    except (SyntaxError, TypeError, ValueError, ArithmeticError):
        return Unknown


def fits(value: object, annotation: str) -> bool:
    """True if a plain YAML value fits an annotation; unknown names and nodes with `_target_` always do."""
    return is_of(evaluated(annotation), value)


def is_of(kind: Any, value: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, str | ForwardRef):
        return fits(value, kind if isinstance(kind, str) else kind.__forward_arg__)
    is_known = origin or kind is None or (isinstance(kind, type) and kind is not Unknown)
    if not is_known or (isinstance(value, dict) and "_target_" in value):
        return True
    if origin in (Union, UnionType):
        return any(is_of(each, value) for each in arguments)
    if origin is Annotated:
        is_number = isinstance(value, int | float)
        in_ranges = all(value in each for each in arguments if is_number and isinstance(each, Range))
        return in_ranges and is_of(arguments[0], value)
    if origin is Literal:
        return any(each is Unknown or (type(value), value) == (type(each), each) for each in arguments)
    if isinstance(value, dict) and origin is dict:
        return all(is_of(arguments[-1], each) for each in value.values())
    if isinstance(value, list) and origin is tuple and ... not in arguments:
        return len(value) == len(arguments) and all(map(is_of, arguments, value))
    if isinstance(value, list) and origin in (list, tuple):
        return all(is_of(arguments[0], each) for each in value)
    if kind is float and isinstance(value, float) and not isfinite(value):
        return False
    accepted: Any = {None: NoneType, float: (int, float), tuple: list}.get(kind, origin or kind)
    return origin is None and isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))


def within(kind: Any) -> Iterator[Any]:
    """A type and all that its arguments are made of, in order."""
    yield kind
    for each in get_args(kind):
        yield from within(each)


def literals(annotation: str) -> list[object]:
    """The values that `Literal[...]` in an annotation list, in order."""
    return [each for kind in within(evaluated(annotation)) if get_origin(kind) is Literal for each in get_args(kind)]


def misfits(option: str, value: object, annotation: str) -> Iterator[UserError]:
    """The errors of a value that does not fit its annotation: one, or one for each named value that does not fit."""
    if value == UNSET or fits(value, annotation):
        return
    named_values = [get_args(kind)[-1] for kind in within(evaluated(annotation)) if get_origin(kind) is dict]
    if isinstance(value, dict) and named_values:
        for name, each in value.items():
            yield from misfits(f"{option}.{name}", each, formatannotation(named_values[0]))
    elif choices := literals(annotation):
        names = ["null" if choice is None else str(choice) for choice in choices]
        yield UserError(option, value, f"expected {annotation}", suggest(str(value), names))
    else:
        words = in_words(evaluated(annotation)) if "Range(" in annotation else annotation
        if isinstance(value, float) and not isfinite(value) and "Range(" not in annotation:
            words = "a finite number"
        yield UserError(option, value, f"expected {words}", example(option, annotation, value))


def in_words(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return next((each.words for each in arguments if isinstance(each, Range)), in_words(arguments[0]))
    if origin in (Union, UnionType):
        return ", or ".join(map(in_words, arguments))
    if origin in (dict, list, tuple):
        return (
            f"named values, each {in_words(arguments[-1])}"
            if origin is dict
            else f"a list, each {in_words(arguments[0])}"
        )
    return "null" if kind in (None, NoneType) else formatannotation(kind)


def example(option: str, annotation: str, value: object = None) -> str:
    """Example of an override of `option` that fits an annotation."""
    if isinstance(value, list) and fits([""], annotation) and all(type(each) in (int, float) for each in value):
        texts = ",".join(f'"{each}"' for each in value)
        return f"write its texts in quotes: '{option}=[{texts}]'"
    if fits("", annotation):  # also where there is no annotation
        is_number = isinstance(value, int | float)
        return f"write it in quotes: '{option}=\"{as_yaml(value)}\"'" if is_number else f"write {option}=VALUE"
    sample = next((each for each in samples(annotation, value) if fits(each, annotation)), None)
    return EXAMPLES[type(sample)].format(option, sample)


def samples(annotation: str, value: object) -> Iterator[object]:
    """Values of all kinds; numbers fit for an example come first."""
    yield True
    for each in within(evaluated(annotation)):
        if isinstance(each, Range):
            yield from [*([0.1, 1.0] if isfinite(each.high) else [1.0]), 1, each.low, each.high]
    yield from [0.1, int(value) if isinstance(value, float) and value.is_integer() else 1000, [], {}]


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


# --- the same for arguments that Python's callers give


def checked(component: str) -> Callable[[Checked], Checked]:
    """Decorator: the function raises one UserError for arguments that do not fit their annotations.

    component: what the names of its options begin with on the command line, such as `adapter.`
    """

    def decorate(function: Checked) -> Checked:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            refuse_misfits(component, function, signature(function).bind(*args, **kwargs).arguments)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def refuse_misfits(component: str, target: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raises one UserError for the arguments `given` to a function or class that do not fit their annotations."""
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
    """Annotations by parameter; none where they name what is imported for type checkers alone."""
    function = getattr(target, "__init__") if isinstance(target, type) else target  # noqa: B009 - mypy allows no other way
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError:
        return {}
    return {name: re.sub(r"\b(collections\.abc|typing)\.", "", formatannotation(hint)) for name, hint in hints.items()}


def in_python(name: str, error: UserError) -> str:
    """The example as Python writes it, where that is another than the command line's."""
    texts = (text for start, text in EXAMPLES_IN_PYTHON.items() if error.write.startswith(start))
    return next(texts, "").format(name, error.value)


def as_plain(value: Any) -> Any:
    """The value in types of YAML; UNSET, which fits any annotation, where YAML has no such type."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list | set | range):
        return [as_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {key: as_plain(each) for key, each in value.items()}
    if getattr(value, "shape", None) == ():  # a number of NumPy or PyTorch
        value = value.item()
    return value if isinstance(value, str | int | float | None) else UNSET
