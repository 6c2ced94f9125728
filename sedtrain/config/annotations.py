"""Values against the annotation of an option: its type, its choices, its range of numbers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from math import isfinite

from sedtrain.config.suggest import suggest
from sedtrain.errors import UNSET, UserError
from sedtrain.ranges import Range

SEQUENCES = ("list", "List", "Sequence", "Iterable", "Collection", "tuple", "Tuple", "set", "Set", "frozenset")
MAPPINGS = ("dict", "Dict", "Mapping", "MutableMapping")
ACCEPTED: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(["None", "NoneType"], (type(None),)),
    **dict.fromkeys(["str", "Path", "PathLike", "PurePath"], (str,)),
    **dict.fromkeys(SEQUENCES, (list,)),
    **dict.fromkeys(MAPPINGS, (dict,)),
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "Tensor": (),  # no plain value is one: lr is `float | Tensor` in torch.optim
}


def fits(value: object, annotation: str) -> bool:
    """Whether a plain YAML value fits an annotation; unknown names and nodes with `_target_` always do."""
    try:
        return node_fits(value, ast.parse(annotation, mode="eval").body)
    except (SyntaxError, ValueError):
        return True


def node_fits(value: object, node: ast.expr) -> bool:
    if isinstance(value, dict) and "_target_" in value:
        return True
    match node:
        case ast.Constant(value=None):
            return value is None
        case ast.Constant(value=str() as quoted):
            return fits(value, quoted)
        case ast.BinOp(op=ast.BitOr()):
            return node_fits(value, node.left) or node_fits(value, node.right)
        case ast.Subscript():
            return subscript_fits(value, last_name(node), elements(node))
        case ast.Name() | ast.Attribute():
            accepted = ACCEPTED.get(last_name(node), (object,))
            return isinstance(value, accepted) and not (isinstance(value, bool) and int in accepted)
    return True


def subscript_fits(value: object, name: str, arguments: list[ast.expr]) -> bool:
    """Whether a value fits `name[arguments]`."""
    if name == "Union":
        return any(node_fits(value, each) for each in arguments)
    if name == "Optional":
        return value is None or node_fits(value, arguments[0])
    if name in ("Annotated", "Required", "Final", "InitVar"):
        in_ranges = not isinstance(value, int | float) or all(value in each for each in ranges_in(arguments[1:]))
        return node_fits(value, arguments[0]) and in_ranges
    if name == "Literal":
        allowed = [ast.literal_eval(each) for each in arguments]
        return any(type(value) is type(each) and value == each for each in allowed)
    if isinstance(value, dict) and name in MAPPINGS:
        return all(node_fits(each, arguments[-1]) for each in value.values())
    if isinstance(value, list) and name in ("tuple", "Tuple") and ast.unparse(arguments[-1]) != "...":
        return len(value) == len(arguments) and all(map(node_fits, value, arguments))
    if isinstance(value, list) and name in SEQUENCES:
        return all(node_fits(each, arguments[0]) for each in value)
    return name not in ACCEPTED


def last_name(node: ast.expr) -> str:
    """The last identifier of an expression: `field` of `dataclasses.field()`, `list` of `list[int]`."""
    match node:
        case ast.Name():
            return node.id
        case ast.Attribute():
            return node.attr
        case ast.Call():
            return last_name(node.func)
        case ast.Subscript():
            return last_name(node.value)
    return ""


def elements(node: ast.Subscript) -> list[ast.expr]:
    return node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]


def subscripts(annotation: str, *names: str) -> list[list[ast.expr]]:
    """The arguments of each `NAME[...]` in an annotation, in order."""
    try:
        nodes = list(ast.walk(ast.parse(annotation)))
    except SyntaxError:
        return []
    return [elements(node) for node in nodes if isinstance(node, ast.Subscript) and last_name(node) in names]


def literals(annotation: str) -> list[object]:
    """The values that `Literal[...]` in an annotation list, in order."""
    return [ast.literal_eval(each) for listed in subscripts(annotation, "Literal") for each in listed]


def ranges_in(metadata: list[ast.expr]) -> list[Range]:
    """The ranges among the metadata of `Annotated[type, metadata]`; infinite ends are their defaults."""
    calls = [each for each in metadata if isinstance(each, ast.Call) and last_name(each) == "Range"]
    infinite = ("inf", "-inf", "math.inf", "-math.inf")
    return [
        Range(
            *map(ast.literal_eval, call.args),
            **{
                str(each.arg): ast.literal_eval(each.value)
                for each in call.keywords
                if ast.unparse(each.value) not in infinite
            },
        )
        for call in calls
    ]


def misfits(option: str, value: object, annotation: str) -> Iterator[UserError]:
    """An error where a value does not fit its annotation; of named values, one for each that does not."""
    if value == UNSET or fits(value, annotation):
        return
    named_values = subscripts(annotation, *MAPPINGS)
    if isinstance(value, dict) and named_values:
        for name, each in value.items():
            yield from misfits(f"{option}.{name}", each, ast.unparse(named_values[0][-1]))
    elif choices := literals(annotation):
        names = ["null" if choice is None else str(choice) for choice in choices]
        yield UserError(option, value, f"expected {annotation}", suggest(str(value), names))
    else:
        yield UserError(option, value, f"expected {in_words(annotation)}", example(option, annotation, value))


def in_words(annotation: str) -> str:
    """An annotation as it is; with ranges, in their words."""
    return node_in_words(ast.parse(annotation, mode="eval").body) if "Range(" in annotation else annotation


def node_in_words(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=None):
            return "null"
        case ast.BinOp(op=ast.BitOr()):
            return f"{node_in_words(node.left)}, or {node_in_words(node.right)}"
        case ast.Subscript():
            name, arguments = last_name(node), elements(node)
            if name == "Annotated":
                return next((each.words for each in ranges_in(arguments[1:])), node_in_words(arguments[0]))
            if name in ("Optional", "Union"):
                return ", or ".join([*map(node_in_words, arguments), *(["null"] if name == "Optional" else [])])
            if name in MAPPINGS:
                return f"named values, each {node_in_words(arguments[-1])}"
            if name in SEQUENCES:
                return f"a list, each {node_in_words(arguments[0])}"
    return ast.unparse(node)


def example(option: str, annotation: str, value: object = None) -> str:
    """What to write for an annotation, as an override of `option`."""
    if fits("", annotation):  # also where there is no annotation
        is_number = isinstance(value, int | float)
        return f"write it in quotes: '{option}=\"{value}\"'" if is_number else f"write {option}=VALUE"
    match next((each for each in samples(annotation, value) if fits(each, annotation)), None):
        case bool():
            return f"write {option}=true or {option}=false"
        case int() as number:
            return f"write a whole number, e.g. {option}={number}"
        case float() as number:
            return f"write a number, e.g. {option}={number}"
        case list():
            return f"write a list, e.g. '{option}=[first,second]'"
        case dict():
            return f"write named values, e.g. '{option}={{first: 1}}'"
    return f"write {option}=VALUE"


def samples(annotation: str, value: object) -> Iterator[object]:
    """Values of all kinds; numbers fit for an example come first."""
    yield True
    ranges = [each for found in subscripts(annotation, "Annotated") for each in ranges_in(found[1:])]
    for each in ranges:
        yield from [0.1, 1.0] if isfinite(each.high) else [1.0]
        yield from [1, each.low, each.high]
    yield from [0.1, int(value) if isinstance(value, float) and value.is_integer() else 1000, [], {}]
