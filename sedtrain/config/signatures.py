"""Reads the parameters of a dotted `_target_` from source, so that checking a configuration imports no torch."""

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
from sedtrain.annotations import closest, fits, last_name, suggest
from sedtrain.errors import UserError


class Undecided(Exception):
    """The source does not show the signature; only importing does."""


def read_signature(target: str) -> Signature:
    """The signature of a function or class; imports it only if the source does not show it.

    Annotations are texts. Parameters from source are keyword-only, in their order. Raises UserError.
    """
    try:
        return source_signature(target)
    except UserError:
        raise
    except (Undecided, SyntaxError, RecursionError, ValueError, OSError):
        return imported_signature(target)


# --- from a name to its definition


def split_module(target: str) -> tuple[ModuleSpec, list[str]]:
    """The deepest module in a dotted name, and the names after it (at least one). Imports no parent package."""
    first, *names = target.split(".")
    if not names or not all(part.isidentifier() for part in (first, *names)):
        raise refused(target, f"{target!r} is no dotted name", "write package.module.Name")
    try:
        spec = find_spec(first)
    except ValueError:  # already imported, without a spec
        spec = ModuleSpec(first, None)
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


def definition(target: str) -> tuple[ModuleSpec, ast.FunctionDef | ast.ClassDef]:
    """The module of a function or class, and the statement that defines it. Follows imports."""
    spec, names = split_module(target)
    statement = binding(names[0], parsed(spec).body)
    if isinstance(statement, ast.FunctionDef | ast.ClassDef) and len(names) == 1:
        return spec, statement
    if not isinstance(statement, ast.Import | ast.ImportFrom):
        raise Undecided
    source = next((alias.name for alias in statement.names if (alias.asname or alias.name) == names[0]), names[0])
    if isinstance(statement, ast.ImportFrom):
        source = f"{resolve_name('.' * statement.level + (statement.module or ''), spec.parent)}.{source}"
    return definition(".".join([source, *names[1:]]))


def binding(name: str, body: list[ast.stmt]) -> ast.stmt | None:
    """The last unconditional statement that binds a name in a scope."""
    return next((statement for statement in reversed(body) if name in bound_names(statement)), None)


def bound_names(statement: ast.stmt) -> list[str]:
    match statement:
        case ast.FunctionDef() | ast.ClassDef():
            return [statement.name]
        case ast.Import() | ast.ImportFrom():
            return [alias.asname or alias.name.split(".")[0] for alias in statement.names]
        case ast.Assign():
            return [ast.unparse(target) for target in statement.targets]
    return []


def parsed(spec: ModuleSpec) -> ast.Module:
    if not spec.origin or not spec.origin.endswith(".py"):
        raise Undecided
    return parsed_file(spec.origin, Path(spec.origin).stat().st_mtime_ns)


@lru_cache(maxsize=64)
def parsed_file(file: str, mtime_ns: int) -> ast.Module:
    return ast.parse(Path(file).read_bytes())


# --- from a definition to its parameters


def source_signature(target: str) -> Signature:
    spec, node = definition(target)
    if isinstance(node, ast.FunctionDef):
        return Signature(list(parameters(spec, node.args)))
    constructor = binding("__init__", node.body)
    if isinstance(constructor, ast.FunctionDef):
        return Signature(list(parameters(spec, constructor.args))[1:])  # without `self`
    decorators = [last_name(decorator) for decorator in node.decorator_list]
    if constructor or node.keywords or binding("__new__", node.body) or decorators not in ([], ["dataclass"]):
        raise Undecided
    if decorators:
        return Signature(list(fields(spec, node)))
    bases = (source_signature(f"{spec.name}.{ast.unparse(base)}") for base in node.bases)
    return next((signature for signature in bases if signature.parameters), Signature())


def parameters(spec: ModuleSpec, arguments: ast.arguments) -> Iterator[Parameter]:
    positional = arguments.posonlyargs + arguments.args
    defaults = [*[None] * (len(positional) - len(arguments.defaults)), *arguments.defaults, *arguments.kw_defaults]
    for argument, default in zip(positional + arguments.kwonlyargs, defaults, strict=True):
        yield parameter(spec, argument.arg, argument.annotation, default)
    if arguments.kwarg:
        yield Parameter(arguments.kwarg.arg, Parameter.VAR_KEYWORD)


def fields(spec: ModuleSpec, node: ast.ClassDef) -> Iterator[Parameter]:
    """The parameters of a dataclass without bases or special fields."""
    for statement in node.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=value):
                if node.bases or last_name(annotation) in ("ClassVar", "KW_ONLY") or isinstance(value, ast.Call):
                    raise Undecided
                yield parameter(spec, name, annotation, value)


def parameter(spec: ModuleSpec, name: str, annotation: ast.expr | None, default: ast.expr | None) -> Parameter:
    """The parameter with its annotation as text; names of ranges are written out."""
    kind, value = Parameter.KEYWORD_ONLY, Parameter.empty if default is None else ast.unparse(default)
    if annotation is None:
        return Parameter(name, kind, default=value)
    named, tree = named_ranges(spec), ast.parse(ast.unparse(annotation))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = named.get(node.id, node.id)  # ast.unparse writes any text
    text = ast.unparse(tree)
    if value == "None" and not fits(None, text):
        text = f"{text} | None"  # older code writes `x: int = None`
    return Parameter(name, kind, default=value, annotation=text)


def named_ranges(spec: ModuleSpec) -> dict[str, str]:
    """Ranges of numbers that a module imports or defines, as written-out annotations by name."""
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


# --- from an imported object


def imported_signature(target: str) -> Signature:
    """The signature that `inspect` finds, with annotations as texts."""
    found = imported(target)
    if not callable(found):
        raise refused(target, f"{target} is a {type(found).__name__}", "write the name of a class or function")
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # a builtin without signature
        return Signature([Parameter("options", Parameter.VAR_KEYWORD)])
    return Signature(
        [with_text(found) for found in signature.parameters.values() if found.kind is not found.VAR_POSITIONAL]
    )


def with_text(found: Parameter) -> Parameter:
    """The parameter with its annotation as text."""
    is_bare = found.annotation is Parameter.empty
    return found if is_bare else found.replace(annotation=inspect.formatannotation(found.annotation))


def imported(target: str) -> Any:
    """Imports a function or class. Raises UserError if that fails."""
    spec, names = split_module(target)
    try:
        found: Any = importlib.import_module(spec.name)
    except (Exception, SystemExit) as error:
        wrong = f"importing {spec.name} fails with {type(error).__name__}: {error}"
        raise refused(target, wrong, "repair or install that module") from error
    for name in names:
        if not hasattr(found, name):
            if submodule(spec, name):
                raise refused(target, f"{target} is a module", "write the name of a class or function")
            modules = [module.name for module in pkgutil.iter_modules(getattr(found, "__path__", []))]
            known = dict.fromkeys([*vars(found), *modules])
            raise refused(target, f"{getattr(found, '__name__', target)} has no {name!r}", suggest(name, known))
        found = getattr(found, name)
    return found
