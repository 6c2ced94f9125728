"""Checks a composed configuration: finds every mistake before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import Signature
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from sedtrain.annotations import example, misfits, suggest
from sedtrain.config.rules import OF_METRICS, broken_rules
from sedtrain.config.schema import ANNOTATIONS, ROOT, first_line, plain
from sedtrain.config.signatures import read_signature
from sedtrain.errors import UNSET, UserError, as_yaml

DIRECTIVES = {
    "_partial_": "bool",
    "_args_": "list",
    "_recursive_": "bool",
    "_convert_": "Literal['none', 'partial', 'object', 'all']",
}
"""Hydra's own keys beside `_target_`, and their types."""


def find_problems(config: DictConfig) -> list[UserError]:
    """All mistakes in a composed configuration, found without building anything."""
    problems = [*check_root(config), *broken_rules(config)]
    for key in config:
        if key != "hydra":
            problems += check_value(config, key, str(key))
    if OmegaConf.select(config, "hydra.sweeper") is not None:
        problems += check_value(config.hydra, "sweeper", "hydra.sweeper")
    return problems


def check_references(node: DictConfig, path: str) -> Iterator[UserError]:
    """References at any depth that cannot be resolved. A missing value is no mistake here."""
    for key in cast(Any, node):
        name = f"{path}.{key}"
        if OmegaConf.is_interpolation(node, key):
            yield from broken_reference(node, key, name)
        elif not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
            yield from check_references(node[key], name)


def check_root(config: DictConfig) -> Iterator[UserError]:
    """Mistakes in the plain values of the root."""
    for name, field in ROOT.items():
        if name not in config:
            continue
        value, choices = plain(config, name), field.metadata.get("choices")
        if choices and value not in choices:
            yield UserError(name, value, f"{name} has no option {value!r}", suggest(str(value), choices))
        else:
            yield from misfits(name, value, field.metadata.get("takes", ANNOTATIONS[name]))


def check_value(node: DictConfig | ListConfig, key: Any, path: str) -> Iterator[UserError]:
    """Mistakes at one key and below it."""
    if OmegaConf.is_missing(node, key):
        yield UserError(path, UNSET, "no value is given", f"write {path}=VALUE")
    elif OmegaConf.is_interpolation(node, key):  # its target is checked in its own place
        yield from broken_reference(node, key, path)
    elif isinstance(value := node[key], ListConfig):
        for index in range(len(value)):
            yield from check_value(value, index, f"{path}[{index}]")
    elif isinstance(value, DictConfig):
        if "_target_" in value:
            is_metric = path.startswith("metrics.")  # a user's function, which is given the texts later
            yield from check_target(as_partial(value) if is_metric else value, path)
        for name in cast(Any, value):
            yield from check_value(value, name, f"{path}.{name}")


def broken_reference(node: DictConfig | ListConfig, key: Any, path: str) -> Iterator[UserError]:
    try:
        node[key]
    except InterpolationToMissingValueError:
        pass  # reported at the missing value
    except (OmegaConfBaseException, RecursionError) as error:
        reference = cast(Any, OmegaConf.to_container(node, resolve=False))[key]
        wrong = f"this reference fails: {first_line(error)}"
        yield UserError(path, reference, wrong, "write a value, or refer to a key that has one")


def check_target(node: DictConfig, path: str) -> Iterator[UserError]:
    """Mistakes in a node's options, by the signature of its `_target_`."""
    target = plain(node, "_target_")
    if not isinstance(target, str):
        wrong = f"expected a dotted name, not {as_yaml(target)}"
        yield UserError(f"{path}._target_", target, wrong, "write package.module.Name")
        return
    try:
        signature = read_signature(target)
    except UserError as error:
        yield UserError(f"{path}._target_", target, error.wrong, error.write)
        return
    yield from check_options(node, path, signature, target.rpartition(".")[2])


def as_partial(node: DictConfig) -> DictConfig:
    """A metric's node as a partial of its function, with only the function's options."""
    options = [option for option in cast(Any, node) if option not in OF_METRICS]
    return cast(DictConfig, OmegaConf.merge(OmegaConf.masked_copy(node, options), {"_partial_": True}))


def check_options(node: DictConfig, path: str, signature: Signature, name: str) -> Iterator[UserError]:
    """Unknown options, misfitting values and missing arguments of the target `name`."""
    parameters = signature.parameters.values()
    known = {parameter.name: parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    given: list[Any] = [key for key in node.keys() if not str(key).startswith("_")]  # noqa: SIM118 - also missing values
    for directive, annotation in DIRECTIVES.items():
        yield from misfits(f"{path}.{directive}", plain(node, directive), annotation) if directive in node else ()
    for key in given:
        option, value = f"{path}.{key}", plain(node, key)
        if key in known and known[key].annotation is not Signature.empty:
            yield from misfits(option, value, known[key].annotation)
        elif key not in known and (len(known) == len(parameters) or not isinstance(key, str)):
            yield UserError(option, value, f"{name} has no option {str(key)!r}", suggest(str(key), known))
    if plain(node, "_partial_") in (True, UNSET):
        return  # the remaining arguments come later
    positional = plain(node, "_args_")
    for parameter in list(known.values())[len(positional) if isinstance(positional, list) else 0 :]:
        if parameter.default is parameter.empty and parameter.name not in given:
            option, annotation = f"{path}.{parameter.name}", parameter.annotation
            advice = example(option, "" if annotation is parameter.empty else annotation)
            yield UserError(option, UNSET, f"{name} needs {parameter.name!r}", advice)
