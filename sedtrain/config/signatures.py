"""The parameters of a dotted `_target_`, read from its source: to check a configuration imports no torch."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from sedtrain import ranges
from sedtrain.config.annotations import fits, last_name
from sedtrain.config.suggest import closest, suggest

WITHOUT_CONSTRUCTOR = ("object", "ABC", "Generic", "Protocol")

Definition = tuple[ModuleSpec, ast.FunctionDef | ast.ClassDef]


class TargetError(Exception):
    """A target that does not exist or cannot be called: what is wrong, and what to write instead."""

    def __init__(self, wrong: str, write: str) -> None:
        super().__init__(wrong, write)
        self.wrong, self.write = wrong, write


class Undecided(Exception):
    """The source alone does not tell; importing does."""


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
            return class_signature(spec, node) or Signature((), takes_kwargs=False)
        return function_signature(spec, node, bound="classmethod" in map(last_name, node.decorator_list))
    except (Undecided, RecursionError):
        return imported_signature(target)


# --- from a name to its definition


def find_definition(target: str) -> Definition:
    """A function, class or method and the module that defines it. Raises TargetError, Undecided."""
    return member(*split_module(target))


def split_module(target: str) -> tuple[ModuleSpec, list[str]]:
    """The deepest module in a dotted name and the names behind it, at least one; no parent is imported."""
    first, *names = target.split(".")
    if not names or not all(part.isidentifier() for part in (first, *names)):
        raise TargetError(f"{target!r} is no dotted name", "write package.module.Name")
    spec = importlib.util.find_spec(first)
    if spec is None:
        match = closest(first, (module.name for module in pkgutil.iter_modules()))
        write = f"did you mean {match!r}?" if match else "install it, or run in the folder that holds it"
        raise TargetError(f"no module {first!r} can be imported", write)
    while len(names) > 1 and (child := submodule(spec, names[0])):
        spec, names = child, names[1:]
    return spec, names


def submodule(spec: ModuleSpec, name: str) -> ModuleSpec | None:
    folders = spec.submodule_search_locations
    return None if folders is None else PathFinder.find_spec(f"{spec.name}.{name}", folders)


def member(spec: ModuleSpec, names: list[str]) -> Definition:
    """The definition that `names` mean inside a module, imports and aliases followed."""
    statement = binding(names[0], parsed(spec).body)
    match statement:
        case ast.FunctionDef() | ast.ClassDef() if len(names) == 1:
            return spec, statement
        case ast.ClassDef() if len(names) == 2:
            if isinstance(method := binding(names[1], statement.body), ast.FunctionDef):
                return spec, method
        case ast.Import() | ast.ImportFrom():
            source = imported_name(spec, statement, names[0])
            if source != f"{spec.name}.{names[0]}":  # a package may import its own module
                return find_definition(".".join([source, *names[1:]]))
        case ast.Assign(value=ast.Name() | ast.Attribute() as value):
            return member(spec, ast.unparse(value).split(".") + names[1:])
    raise Undecided


def imported_name(spec: ModuleSpec, statement: ast.Import | ast.ImportFrom, name: str) -> str:
    original = next((alias.name for alias in statement.names if (alias.asname or alias.name) == name), name)
    if isinstance(statement, ast.Import):
        return original
    module = importlib.util.resolve_name("." * statement.level + (statement.module or ""), spec.parent)
    return f"{module}.{original}"


def parsed(spec: ModuleSpec) -> ast.Module:
    if not (spec.origin or "").endswith(".py"):
        raise Undecided
    assert spec.origin is not None
    return parsed_file(spec.origin, Path(spec.origin).stat().st_mtime_ns)


@lru_cache(maxsize=64)
def parsed_file(file: str, mtime_ns: int) -> ast.Module:
    try:
        return ast.parse(Path(file).read_bytes())
    except SyntaxError as error:
        raise TargetError(f"{file}, line {error.lineno}: {error.msg}", "mend the Python there") from None


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
            case ast.Assign() if any(isinstance(each, ast.Name) and each.id == name for each in statement.targets):
                return statement
    return None


# --- from a definition to its parameters


def function_signature(spec: ModuleSpec, node: ast.FunctionDef, bound: bool) -> Signature:
    arguments, named = node.args, named_ranges(parsed(spec))
    positional = arguments.posonlyargs + arguments.args
    without_default = [None] * (len(positional) - len(arguments.defaults))
    rows = list(zip(positional, [*without_default, *arguments.defaults], strict=True))[int(bound) :]
    rows += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    parameters = [parameter(each.arg, each.annotation, default, named) for each, default in rows]
    return Signature(tuple(parameters), takes_kwargs=arguments.kwarg is not None)


def named_ranges(module: ast.Module) -> dict[str, str]:
    """The ranges of numbers that annotations of a module may name, written out."""
    found = {}
    for statement in module.body:
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


def parameter(name: str, annotation: ast.expr | None, default: ast.expr | None, named: dict[str, str]) -> Parameter:
    text = None if annotation is None else ast.unparse(annotation)
    if text and named:
        text = ast.unparse(WrittenOut(named).visit(ast.parse(text, mode="eval")))
    if text and isinstance(default, ast.Constant) and default.value is None and not fits(None, text):
        text = f"{text} | None"  # `x: int = None`, as much older code has it
    return Parameter(name, text, has_default=default is not None)


def class_signature(spec: ModuleSpec, node: ast.ClassDef) -> Signature | None:
    """None where neither the class nor its bases define a constructor."""
    constructor = binding("__init__", node.body)
    if isinstance(constructor, ast.FunctionDef):
        return function_signature(spec, constructor, bound=True)
    if constructor or node.keywords or binding("__new__", node.body):
        raise Undecided
    if is_dataclass(node):
        return Signature(tuple(dataclass_fields(spec, node).values()), takes_kwargs=False)
    if node.decorator_list:
        raise Undecided
    signatures = (class_signature(*base) for base in base_classes(spec, node))
    return next((each for each in signatures if each is not None), None)


def base_classes(spec: ModuleSpec, node: ast.ClassDef) -> Iterator[tuple[ModuleSpec, ast.ClassDef]]:
    for base in node.bases:
        expression = base.value if isinstance(base, ast.Subscript) else base
        if last_name(expression) in WITHOUT_CONSTRUCTOR:
            continue
        try:
            base_spec, definition = member(spec, ast.unparse(expression).split("."))
        except TargetError:
            raise Undecided from None
        if not isinstance(definition, ast.ClassDef):
            raise Undecided
        yield base_spec, definition


def is_dataclass(node: ast.ClassDef) -> bool:
    return "dataclass" in map(last_name, node.decorator_list)


def dataclass_fields(spec: ModuleSpec, node: ast.ClassDef) -> dict[str, Parameter]:
    found: dict[str, Parameter] = {}
    for base in reversed([each for each in base_classes(spec, node) if is_dataclass(each[1])]):
        found |= dataclass_fields(*base)
    for statement in node.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=value):
                is_special = last_name(annotation) in ("ClassVar", "KW_ONLY") or isinstance(value, ast.Call)
                if is_special:  # such as field(init=False)
                    raise Undecided
                found[name] = parameter(name, annotation, value, named_ranges(parsed(spec)))
    return found


# --- from an imported object


def imported_signature(target: str) -> Signature:
    """The fall-back: what `inspect` says of the imported object."""
    found = imported(target)
    if not callable(found):
        raise TargetError(f"{target} is a {type(found).__name__}", "write the name of a class or function")
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):  # a builtin that tells nothing
        return Signature((), takes_kwargs=True)
    named = [each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    return Signature(tuple(map(inspected, named)), any(each.kind is each.VAR_KEYWORD for each in parameters))


def imported(target: str) -> Any:
    spec, names = split_module(target)
    if submodule(spec, names[0]):
        raise TargetError(f"{spec.name}.{names[0]} is a module", "write the class or function in it")
    try:
        found: Any = importlib.import_module(spec.name)
    except Exception as error:
        wrong = f"importing {spec.name} fails with {type(error).__name__}: {error}"
        raise TargetError(wrong, "mend or install that module") from error
    for name in names:
        if not hasattr(found, name):
            modules = [each.name for each in pkgutil.iter_modules(getattr(found, "__path__", []))]
            owner = getattr(found, "__name__", target)
            raise TargetError(f"{owner} has no {name!r}", suggest(name, dict.fromkeys([*vars(found), *modules])))
        found = getattr(found, name)
    return found


def inspected(each: inspect.Parameter) -> Parameter:
    annotation = None if each.annotation is each.empty else inspect.formatannotation(each.annotation)
    return Parameter(each.name, annotation, each.default is not each.empty)
