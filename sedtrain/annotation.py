"""Whether plain YAML values fit a parameter's annotation, read as text."""

from __future__ import annotations

import ast

_ACCEPTED: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(["None", "NoneType"], (type(None),)),
    **dict.fromkeys(["str", "Path", "PathLike", "PurePath"], (str,)),
    **dict.fromkeys(["list", "List", "Sequence", "Iterable", "Collection", "tuple", "Tuple"], (list,)),
    **dict.fromkeys(["set", "Set", "frozenset"], (list,)),
    **dict.fromkeys(["dict", "Dict", "Mapping", "MutableMapping"], (dict,)),
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "Tensor": (),  # no plain value is one: lr is `float | Tensor` in torch.optim
}


def fits(value: object, annotation: str) -> bool:
    """Whether a plain YAML value fits an annotation; unknown names and nodes with `_target_` always do."""
    try:
        return _fits(value, ast.parse(annotation, mode="eval").body)
    except (SyntaxError, ValueError):
        return True


def literals(annotation: str) -> list[object]:
    """The values that `Literal[...]` parts of an annotation list, in order."""
    try:
        nodes = [node for node in ast.walk(ast.parse(annotation)) if isinstance(node, ast.Subscript)]
        elements = [each for node in nodes if last_name(node) == "Literal" for each in _elements(node)]
        return [ast.literal_eval(each) for each in elements]
    except (SyntaxError, ValueError):
        return []


def _fits(value: object, node: ast.expr) -> bool:
    if isinstance(value, dict) and "_target_" in value:
        return True
    match node:
        case ast.Constant(value=None):
            return value is None
        case ast.Constant(value=str() as quoted):
            return fits(value, quoted)
        case ast.BinOp(op=ast.BitOr()):
            return _fits(value, node.left) or _fits(value, node.right)
        case ast.Subscript():
            return _fits_subscript(value, last_name(node), _elements(node))
        case ast.Name() | ast.Attribute():
            accepted = _ACCEPTED.get(last_name(node), (object,))
            return isinstance(value, accepted) and not (isinstance(value, bool) and int in accepted)
    return True


def _elements(node: ast.Subscript) -> list[ast.expr]:
    return node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]


def _fits_subscript(value: object, name: str, elements: list[ast.expr]) -> bool:
    match name:
        case "Union":
            return any(_fits(value, element) for element in elements)
        case "Optional":
            return value is None or _fits(value, elements[0])
        case "Annotated" | "Required" | "Final" | "InitVar":
            return _fits(value, elements[0])
        case "Literal":
            allowed = [ast.literal_eval(element) for element in elements]
            return any(type(value) is type(each) and value == each for each in allowed)
    if isinstance(value, dict) and dict in _ACCEPTED.get(name, ()):
        return all(_fits(each, elements[-1]) for each in value.values())
    if isinstance(value, list) and list in _ACCEPTED.get(name, ()):
        if name in ("tuple", "Tuple") and ast.unparse(elements[-1]) != "...":
            return len(value) == len(elements) and all(map(_fits, value, elements))
        return all(_fits(each, elements[0]) for each in value)
    return name not in _ACCEPTED


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
