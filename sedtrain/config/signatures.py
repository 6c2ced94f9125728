"""The parameters of a dotted `_target_`, read from its source: to check a configuration imports no torch."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

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
