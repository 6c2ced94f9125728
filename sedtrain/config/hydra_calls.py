"""Composes configurations and makes the objects that they describe, by Hydra; its errors become UserErrors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from sedtrain.annotations import example, misfits, suggest
from sedtrain.config.schema import ANNOTATIONS, first_line, plain
from sedtrain.errors import UNSET, UserError

logger = logging.getLogger(__name__)

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError)
REFUSALS = (ValueError, TypeError, ImportError)


def compose_choices(
    config_name: str, search: list[str], choices: dict[str, str]
) -> tuple[DictConfig | None, dict[str, UserError]]:
    """The configuration of all group choices that compose, and an error for each other one, by key.

    search:  the override of Hydra's search path, if any
    choices: override by key, such as {"encoder": "encoder=hubert"}
    """
    config, good, failures = None, search, {}
    with suppress(*COMPOSITION_ERRORS):
        return compose(config_name, [*search, *choices.values()], return_hydra_config=True), {}
    for key, choice in {"--config-name": None, **choices}.items():
        attempt = [*good, choice] if choice else good
        try:
            config, good = compose(config_name, attempt, return_hydra_config=True), attempt
        except COMPOSITION_ERRORS as error:
            failures[key] = composition_error(error, key, choice.partition("=")[2] if choice else config_name)
            if config is None:
                break
    return config, failures


@contextmanager
def hydra_known(config: DictConfig) -> Iterator[None]:
    """Inside, references such as ${hydra:runtime.output_dir} can be resolved."""
    for key, value in {"runtime.output_dir": ".", "job.num": 0, "job.id": "0"}.items():
        parent = f"hydra.{key.partition('.')[0]}"
        if not isinstance(OmegaConf.select(config, parent), DictConfig):
            raise UserError(
                parent, plain(config.hydra, parent.partition(".")[2]), "this holds named values", f"leave {parent} out"
            )
        OmegaConf.update(config, f"hydra.{key}", value)
    instance = HydraConfig.instance()
    before = instance.cfg
    instance.set_config(config)
    try:
        yield
    finally:
        instance.cfg = before


def composition_error(error: BaseException, option: str, value: object) -> UserError:
    """Turns an error of Hydra, OmegaConf or the YAML parser into one at `option`, or at the place that the error names."""
    if isinstance(error, yaml.MarkedYAMLError):
        return yaml_error(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        name = error.missing_cfg_file.rpartition("/")[2]
        write = suggest(name, error.options) if error.options else "name a file of the configuration folder"
        return UserError(option, value, first_line(error), write)
    for cause in (error.__cause__, error.__context__, error):
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            return typed_error(cause, option, value)
    write = f"write {option.lstrip('+')}={value}" if option.startswith("+") else f"correct or leave out {option}"
    advice = map(str.strip, str(error).strip().splitlines()[1:])
    return UserError(option, value, first_line(error), " ".join(filter(None, advice)) or write)


def yaml_error(error: yaml.MarkedYAMLError) -> UserError:
    mark = error.problem_mark
    lines = Path(mark.name).read_text(encoding="utf-8").rstrip().splitlines()
    index = min(mark.line, len(lines) - 1)  # a mark at the end of the file is one line too far
    wrong = f"this is no YAML: {error.problem}"
    return UserError(f"{mark.name}, line {index + 1}", lines[index].strip(), wrong, "correct that line")


def typed_error(error: OmegaConfBaseException, option: str, value: object) -> UserError:
    """The error for a key or value that the configuration refuses: an override's own, or one in a chosen file."""
    key = str(error.full_key)
    refused, set_by = (value, "") if key == option else (error.value, f" (set by {option}={value})")
    if value == UNSET:
        set_by = ""
    write = example(key, "")
    if isinstance(error, ConfigAttributeError | ConfigKeyError) and isinstance(error.parent_node, DictConfig):
        write = suggest(str(error.key), map(str, error.parent_node.keys()))
    found = UserError(key, refused, first_line(error), write)
    found = next(misfits(key, refused, ANNOTATIONS.get(key, "Any")), found)
    return UserError(found.option, found.value, f"{found.wrong}{set_by}", found.write)


def create(cfg: DictConfig, path: str) -> Any:
    """The object of the node at the dotted `path`, or a partial if the node says `_partial_`.

    Raises UserError for values that the target refuses, now or when the partial is called.
    """
    node = OmegaConf.select(cfg, path)
    made = guarded(node, path, instantiate, node, _convert_="all")
    is_partial = isinstance(node, DictConfig) and node.get("_partial_", False)
    return partial(guarded, node, path, made) if is_partial else made


def import_target(cfg: DictConfig, path: str) -> None:
    """Imports the target of the node at `path`, without calling it."""
    node = OmegaConf.select(cfg, path)
    guarded(node, path, get_object, node["_target_"])


def guarded(node: Any, path: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls the function; a refusal that is not yet a UserError becomes one at `path`."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        cause = (isinstance(error, InstantiationException) and error.__cause__) or error
        if isinstance(cause, UserError):
            raise cause from None
        if not isinstance(cause, REFUSALS) and type(cause).__name__ != "MisconfigurationException":  # Lightning's
            raise
        logger.debug("%s is refused", path, exc_info=cause)
        target = str(node.get("_target_", path))
        write = f"write values that {target.rpartition('.')[2]} takes, such as {path}.OPTION=VALUE"
        raise UserError(path, target, first_line(cause), write) from error
