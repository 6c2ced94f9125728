"""The parameters of a dotted `_target_`, read from its source: to check a configuration imports no torch."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, resolve_name
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

from sedtrain import ranges
from sedtrain.config.annotations import closest, fits, last_name, suggest
from sedtrain.errors import UserError

Definition = tuple[ModuleSpec, ast.FunctionDef | ast.ClassDef]


class Undecided(Exception):
    """The source alone does not tell; importing does."""


def read_signature(target: str) -> Signature:
    """The signature of a function or class; imports it only where its source does not tell.

    Annotations are texts; parameters read from source are keyword-only, in their order. Raises UserError.
    """
    try:
        return signature_of(*find_definition(target))
    except (Undecided, RecursionError):
        return imported_signature(target)


# --- from a name to its definition


def find_definition(target: str) -> Definition:
    return member(*split_module(target))


def split_module(target: str) -> tuple[ModuleSpec, list[str]]:
    """The deepest module in a dotted name and the names behind it, at least one; no parent is imported."""
    first, *names = target.split(".")
    if not names or not all(part.isidentifier() for part in (first, *names)):
        raise refused(target, f"{target!r} is no dotted name", "write package.module.Name")
    spec = find_spec(first)
    if spec is None:
        match = closest(first, (module.name for module in pkgutil.iter_modules()))
        write = f"did you mean {match!r}?" if match else "install it, or run in the folder that holds it"
        raise refused(target, f"no module {first!r} can be imported", write)
    while len(names) > 1 and (child := submodule(spec, names[0])):
        spec, names = child, names[1:]
    return spec, names


def submodule(spec: ModuleSpec, name: str) -> ModuleSpec | None:
    folders = spec.submodule_search_locations
    return None if folders is None else PathFinder.find_spec(f"{spec.name}.{name}", folders)


def refused(target: str, wrong: str, write: str) -> UserError:
    return UserError("_target_", target, wrong, write)


def member(spec: ModuleSpec, names: list[str]) -> Definition:
    """The definition that `names` mean inside a module, imports and aliases followed."""
    match binding(names[0], parsed(spec).body):
        case ast.FunctionDef() | ast.ClassDef() as definition if len(names) == 1:
            return spec, definition
        case ast.Import() | ast.ImportFrom() as statement:
            source = imported_name(spec, statement, names[0])
            if source != f"{spec.name}.{names[0]}":  # a package may import its own module
                return find_definition(".".join([source, *names[1:]]))
        case ast.Assign(value=ast.Name() | ast.Attribute() as value):
            return member(spec, ast.unparse(value).split(".") + names[1:])
    raise Undecided


def parsed(spec: ModuleSpec) -> ast.Module:
    if not spec.origin or not spec.origin.endswith(".py"):
        raise Undecided
    return parsed_file(spec.origin, Path(spec.origin).stat().st_mtime_ns)


@lru_cache(maxsize=64)
def parsed_file(file: str, mtime_ns: int) -> ast.Module:
    try:
        return ast.parse(Path(file).read_bytes())
    except SyntaxError:
        raise Undecided from None


def binding(name: str, body: list[ast.stmt]) -> ast.stmt | None:
    """The last statement of a scope that binds a name; of `if` and `try`, the main branch counts."""
    for statement in reversed(body):
        match statement:
            case ast.If() | ast.Try() | ast.With():
                if found := binding(name, statement.body):
                    return found
            case ast.FunctionDef() | ast.ClassDef() if statement.name == name:
                return statement
            case ast.Import() | ast.ImportFrom():
                if any((alias.asname or alias.name.split(".")[0]) == name for alias in statement.names):
                    return statement
            case ast.Assign() if name in map(ast.unparse, statement.targets):
                return statement
    return None


def imported_name(spec: ModuleSpec, statement: ast.Import | ast.ImportFrom, name: str) -> str:
    original = next((alias.name for alias in statement.names if (alias.asname or alias.name) == name), name)
    if isinstance(statement, ast.Import):
        return original
    return f"{resolve_name('.' * statement.level + (statement.module or ''), spec.parent)}.{original}"


# --- from a definition to its parameters


def signature_of(spec: ModuleSpec, node: ast.FunctionDef | ast.ClassDef) -> Signature:
    if isinstance(node, ast.FunctionDef):
        return function_signature(spec, node)
    constructor = binding("__init__", node.body)
    if isinstance(constructor, ast.FunctionDef):
        signature = function_signature(spec, constructor)
        return signature.replace(parameters=list(signature.parameters.values())[1:])  # without `self`
    is_dataclass = [last_name(each) for each in node.decorator_list] == ["dataclass"]
    if constructor or node.keywords or binding("__new__", node.body) or (node.decorator_list and not is_dataclass):
        raise Undecided
    if is_dataclass:
        return Signature(list(fields(spec, node)))
    bases = (signature_of(*member(spec, ast.unparse(base).split("."))) for base in node.bases)
    return next((each for each in bases if each.parameters), Signature())


def function_signature(spec: ModuleSpec, node: ast.FunctionDef) -> Signature:
    arguments, named = node.args, named_ranges(spec)
    positional = arguments.posonlyargs + arguments.args
    defaults = [*[None] * (len(positional) - len(arguments.defaults)), *arguments.defaults, *arguments.kw_defaults]
    rows = zip(positional + arguments.kwonlyargs, defaults, strict=True)
    parameters = [parameter(each.arg, each.annotation, default, named) for each, default in rows]
    if arguments.kwarg:
        parameters.append(Parameter(arguments.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(parameters)


def fields(spec: ModuleSpec, node: ast.ClassDef) -> Iterator[Parameter]:
    """The parameters of a dataclass without bases or special fields."""
    for statement in node.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=value):
                if node.bases or last_name(annotation) in ("ClassVar", "KW_ONLY") or isinstance(value, ast.Call):
                    raise Undecided
                yield parameter(name, annotation, value, named_ranges(spec))


def parameter(name: str, annotation: ast.expr | None, default: ast.expr | None, named: dict[str, str]) -> Parameter:
    """named: the ranges that the annotation may name, written out"""
    kind, empty = Parameter.KEYWORD_ONLY, Parameter.empty
    value = empty if default is None else ast.unparse(default)
    if annotation is None:
        return Parameter(name, kind, default=value)
    text = ast.unparse(annotation)
    if named:
        text = ast.unparse(WrittenOut(named).visit(ast.parse(text, mode="eval")))
    if value == "None" and not fits(None, text):
        text = f"{text} | None"  # `x: int = None`, as much older code has it
    return Parameter(name, kind, default=value, annotation=text)


def named_ranges(spec: ModuleSpec) -> dict[str, str]:
    """The ranges of numbers that annotations of a module may name, written out."""
    found = {}
    for statement in parsed(spec).body:
        match statement:
            case ast.ImportFrom(module="sedtrain.ranges"):
                for alias in statement.names:
                    found[alias.asname or alias.name] = inspect.formatannotation(getattr(ranges, alias.name, Any))
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Subscript() as value):
                if last_name(value) == "Annotated":
                    found[name] = ast.unparse(value)
    return found


class WrittenOut(ast.NodeTransformer):
    """An annotation with the ranges that it names written out."""

    def __init__(self, named: dict[str, str]) -> None:
        self.named = named

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.parse(self.named[node.id], mode="eval").body if node.id in self.named else node


# --- from an imported object


def imported_signature(target: str) -> Signature:
    """The signature that `inspect` finds, annotations as texts."""
    found = imported(target)
    if not callable(found):
        raise refused(target, f"{target} is a {type(found).__name__}", "write the name of a class or function")
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # a builtin that tells nothing
        return Signature([Parameter("options", Parameter.VAR_KEYWORD)])
    known = [each for each in signature.parameters.values() if each.kind is not each.VAR_POSITIONAL]
    return Signature([each.replace(annotation=annotation_text(each)) for each in known])


def annotation_text(each: Parameter) -> Any:
    return each.empty if each.annotation is each.empty else inspect.formatannotation(each.annotation)


def imported(target: str) -> Any:
    spec, names = split_module(target)
    try:
        found: Any = importlib.import_module(spec.name)
    except Exception as error:
        wrong = f"importing {spec.name} fails with {type(error).__name__}: {error}"
        raise refused(target, wrong, "mend or install that module") from error
    for name in names:
        if not hasattr(found, name):
            if submodule(spec, name):
                raise refused(target, f"{target} is a module", "write the name of a class or function")
            modules = [each.name for each in pkgutil.iter_modules(getattr(found, "__path__", []))]
            known = dict.fromkeys([*vars(found), *modules])
            raise refused(target, f"{getattr(found, '__name__', target)} has no {name!r}", suggest(name, known))
        found = getattr(found, name)
    return found
