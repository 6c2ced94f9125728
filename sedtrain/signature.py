"""The parameters of a dotted `_target_`, read from its source: to check a configuration imports no torch."""

from __future__ import annotations

import ast
import importlib
import inspect
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from typing import Any

from sedtrain.annotation import fits, last_name
from sedtrain.definition import (
    TargetError,
    Undecided,
    base_classes,
    binding,
    decorators,
    find_definition,
    split_module,
    suggest,
)


@dataclass(frozen=True)
class Parameter:
    name: str
    annotation: str | None
    has_default: bool


@dataclass(frozen=True)
class Signature:
    parameters: tuple[Parameter, ...]
    takes_kwargs: bool


def read_signature(target: str) -> Signature:
    """Parameters of a function, class or class method; imports it only where its source does not tell.

    Raises TargetError.
    """
    try:
        spec, node = find_definition(target)
        if isinstance(node, ast.ClassDef):
            return _class_signature(spec, node) or Signature((), takes_kwargs=False)
        return _function_signature(node, bound="classmethod" in decorators(node))
    except (Undecided, RecursionError):
        return _imported_signature(target)


def _function_signature(node: ast.FunctionDef, bound: bool) -> Signature:
    arguments = node.args
    positional = arguments.posonlyargs + arguments.args
    without_default = [None] * (len(positional) - len(arguments.defaults))
    rows = list(zip(positional, [*without_default, *arguments.defaults], strict=True))[int(bound) :]
    rows += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    parameters = tuple(_parameter(argument.arg, argument.annotation, default) for argument, default in rows)
    return Signature(parameters, takes_kwargs=arguments.kwarg is not None)


def _parameter(name: str, annotation: ast.expr | None, default: ast.expr | None) -> Parameter:
    text = None if annotation is None else ast.unparse(annotation)
    if text and isinstance(default, ast.Constant) and default.value is None and not fits(None, text):
        text = f"{text} | None"  # `x: int = None`, as much older code has it
    return Parameter(name, text, has_default=default is not None)


def _class_signature(spec: ModuleSpec, node: ast.ClassDef) -> Signature | None:
    """None where neither the class nor its bases define a constructor."""
    constructor = binding("__init__", node.body)
    if isinstance(constructor, ast.FunctionDef):
        return _function_signature(constructor, bound=True)
    metaclasses = [last_name(keyword.value) for keyword in node.keywords if keyword.arg == "metaclass"]
    if constructor or binding("__new__", node.body) or metaclasses not in ([], ["ABCMeta"]):
        raise Undecided
    if _is_dataclass(node):
        return Signature(tuple(_fields(spec, node).values()), takes_kwargs=False)
    if node.decorator_list:
        raise Undecided
    signatures = (_class_signature(*base) for base in base_classes(spec, node))
    return next((signature for signature in signatures if signature is not None), None)


def _is_dataclass(node: ast.ClassDef) -> bool:
    return "dataclass" in decorators(node) or any(last_name(base) == "NamedTuple" for base in node.bases)


def _fields(spec: ModuleSpec, node: ast.ClassDef) -> dict[str, Parameter]:
    fields: dict[str, Parameter] = {}
    for base in reversed(list(base_classes(spec, node))):
        if _is_dataclass(base[1]):
            fields |= _fields(*base)
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            fields |= _field(statement.target.id, statement.annotation, statement.value)
    return fields


def _field(name: str, annotation: ast.expr, value: ast.expr | None) -> dict[str, Parameter]:
    if last_name(annotation) in ("ClassVar", "KW_ONLY"):
        return {}
    parameter = _parameter(name, annotation, value)
    if isinstance(value, ast.Call) and last_name(value) == "field":
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in value.keywords}
        if options.get("init") == "False":
            return {}
        parameter = replace(parameter, has_default=bool({"default", "default_factory"} & options.keys()))
    return {name: parameter}


def _imported_signature(target: str) -> Signature:
    """The fall-back: what `inspect` says of the imported object."""
    spec, names = split_module(target)
    try:
        found: Any = importlib.import_module(spec.name)
    except Exception as error:
        wrong = f"importing {spec.name} fails with {type(error).__name__}: {error}"
        raise TargetError(wrong, "mend or install that module") from error
    for name in names:
        if not hasattr(found, name):
            owner = getattr(found, "__name__", target)
            raise TargetError(f"{owner} has no {name!r}", suggest(name, dir(found)))
        found = getattr(found, name)
    if not callable(found):
        raise TargetError(f"{target} is a {type(found).__name__}", "write the name of a class or function")
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):  # a builtin that tells nothing
        return Signature((), takes_kwargs=True)
    named = [each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    return Signature(
        tuple(_inspected(each) for each in named), any(each.kind is each.VAR_KEYWORD for each in parameters)
    )


def _inspected(parameter: inspect.Parameter) -> Parameter:
    unknown = parameter.annotation is parameter.empty
    annotation = None if unknown else inspect.formatannotation(parameter.annotation)
    return Parameter(parameter.name, annotation, parameter.default is not parameter.empty)
