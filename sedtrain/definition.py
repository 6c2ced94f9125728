"""From a dotted name to the source of the function or class that it means; nothing is imported on the way."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import pkgutil
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from sedtrain.annotation import last_name

Definition = tuple[ModuleSpec, ast.FunctionDef | ast.ClassDef]
MAX_NAMES = 12  # listed after a close one


class TargetError(Exception):
    """A target that does not exist or cannot be called: what is wrong, and what to write instead."""

    def __init__(self, wrong: str, write: str) -> None:
        super().__init__(f"{wrong}; {write}")
        self.wrong = wrong
        self.write = write


class Undecided(Exception):
    """The source alone does not tell; importing does."""


def find_definition(target: str) -> Definition:
    """A function, class or method and the module that defines it. Raises TargetError, Undecided."""
    spec, names = split_module(target)
    return _member(spec, names)


def split_module(target: str) -> tuple[ModuleSpec, list[str]]:
    """The deepest module in a dotted name and the names behind it, at least one; no parent is imported."""
    parts = target.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise TargetError(f"{target!r} is no dotted name", "write package.module.Name")
    first, *names = parts
    try:
        spec = importlib.util.find_spec(first)
    except ValueError:  # a module without a spec, such as __main__
        raise Undecided from None
    if spec is None:
        raise TargetError(f"no module {first!r} can be imported", _suggest_module(first, None))
    while len(names) > 1 and (places := spec.submodule_search_locations) is not None:
        child = PathFinder.find_spec(f"{spec.name}.{names[0]}", places)
        if child is None:
            break
        spec, names = child, names[1:]
    return spec, names


def _suggest_module(name: str, places: list[str] | None) -> str:
    match = closest(name, (module.name for module in pkgutil.iter_modules(places)))
    return f"did you mean {match!r}?" if match else "install it, or run in the folder that holds it"


def _member(spec: ModuleSpec, names: list[str]) -> Definition:
    """The definition that `names` mean inside a module, imports and aliases followed."""
    body = _tree(spec).body
    match statement := binding(names[0], body):
        case ast.ClassDef() if len(names) == 2:
            if isinstance(method := binding(names[1], statement.body), ast.FunctionDef):
                return spec, method
        case ast.FunctionDef() | ast.ClassDef() if len(names) == 1:
            return spec, statement
        case ast.Import() | ast.ImportFrom():
            source = _imported_name(spec, statement, names[0])
            if source == f"{spec.name}.{names[0]}":
                return _star_member(spec, body, names)  # a package that imports its own module
            return find_definition(".".join([source, *names[1:]]))
        case ast.Assign(value=ast.Name() | ast.Attribute() as value):
            return _member(spec, ast.unparse(value).split(".") + names[1:])
        case None:
            return _star_member(spec, body, names)
    raise Undecided


def _star_member(spec: ModuleSpec, body: list[ast.stmt], names: list[str]) -> Definition:
    for statement in _statements(body):
        if isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*":
            try:
                return find_definition(".".join([_absolute(spec, statement), *names]))
            except TargetError:
                continue
    modules = [module.name for module in pkgutil.iter_modules(spec.submodule_search_locations or [])]
    if names[0] in modules:
        raise TargetError(f"{spec.name}.{names[0]} is a module", "write the class or function in it")
    if _is_dynamic(spec):
        raise Undecided
    candidates = [*dict.fromkeys(_bound_names(body)), *modules]
    raise TargetError(f"{spec.name} has no {names[0]!r}", suggest(names[0], candidates))


def _imported_name(spec: ModuleSpec, statement: ast.Import | ast.ImportFrom, name: str) -> str:
    if isinstance(statement, ast.ImportFrom):
        original = next(alias.name for alias in statement.names if (alias.asname or alias.name) == name)
        return f"{_absolute(spec, statement)}.{original}"
    return next((alias.name for alias in statement.names if alias.asname == name), name)


def _absolute(spec: ModuleSpec, statement: ast.ImportFrom) -> str:
    return importlib.util.resolve_name("." * statement.level + (statement.module or ""), spec.parent)


def _tree(spec: ModuleSpec) -> ast.Module:
    if spec.origin is None:  # a folder without __init__.py
        return ast.Module(body=[], type_ignores=[])
    if not spec.origin.endswith(".py"):
        raise Undecided
    return _parsed(spec.origin, Path(spec.origin).stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _parsed(file: str, mtime_ns: int) -> ast.Module:
    try:
        return ast.parse(Path(file).read_bytes())
    except SyntaxError as error:
        raise TargetError(f"{file}, line {error.lineno}: {error.msg}", "mend the Python there") from None


def _is_dynamic(spec: ModuleSpec) -> bool:
    """Whether a module may hold names that its source does not spell out."""
    if spec.origin is None:
        return False
    text = Path(spec.origin).read_bytes()
    return any(mark in text for mark in (b"__getattr__", b"globals()", b"sys.modules[", b"setattr("))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """A scope's statements, the last first; of `if` and `try`, the main branch before the others."""
    for statement in reversed(body):
        match statement:
            case ast.If() | ast.With() | ast.Try():
                yield from _statements(statement.body)
                for handler in getattr(statement, "handlers", []):
                    yield from _statements(handler.body)
                yield from _statements(getattr(statement, "orelse", []))
            case ast.FunctionDef() if "overload" in decorators(statement):
                continue
            case _:
                yield statement


def _names_bound(statement: ast.stmt) -> list[str]:
    match statement:
        case ast.FunctionDef() | ast.ClassDef():
            return [statement.name]
        case ast.Import() | ast.ImportFrom():
            return [alias.asname or alias.name.split(".")[0] for alias in statement.names]
        case ast.Assign():
            return [target.id for target in statement.targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name() as target):
            return [target.id]
    return []


def binding(name: str, body: list[ast.stmt]) -> ast.stmt | None:
    return next((each for each in _statements(body) if name in _names_bound(each)), None)


def _bound_names(body: list[ast.stmt]) -> list[str]:
    return [name for statement in _statements(body) for name in _names_bound(statement)][::-1]


def decorators(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    return [last_name(decorator) for decorator in node.decorator_list]


def base_classes(spec: ModuleSpec, node: ast.ClassDef) -> Iterator[tuple[ModuleSpec, ast.ClassDef]]:
    for base in node.bases:
        expression = base.value if isinstance(base, ast.Subscript) else base
        if last_name(expression) in ("object", "ABC", "Generic", "Protocol", "NamedTuple"):
            continue
        try:
            base_spec, definition = _member(spec, ast.unparse(expression).split("."))
        except TargetError:
            raise Undecided from None
        if not isinstance(definition, ast.ClassDef):
            raise Undecided
        yield base_spec, definition


def suggest(name: str, names: Iterable[str]) -> str:
    """The close name, where there is one, and the names to choose from unless they would hide it."""
    available = [each for each in names if each != "*" and not each.startswith("_")]
    match = closest(name, available)
    if match and len(available) > MAX_NAMES:
        return f"did you mean {match!r}?"
    question = f"did you mean {match!r}? " if match else ""
    return f"{question}available: {', '.join(available) or 'none'}"


def closest(name: str, names: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), None)
