"""Group choices composed by Hydra; what it refuses becomes a UserError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from sedtrain.config.annotations import example, misfits, suggest
from sedtrain.config.schema import ANNOTATIONS, first_line
from sedtrain.errors import UserError

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError)


def compose_choices(
    config_name: str, search: list[str], choices: dict[str, str]
) -> tuple[DictConfig | None, dict[str, UserError]]:
    """The configuration of those group choices that compose, and by key why the others do not.

    search:  the override of Hydra's search path, or nothing
    choices: override by key, such as {"encoder": "encoder=hubert"}
    """
    try:
        return composed(config_name, [*search, *choices.values()]), {}
    except COMPOSITION_ERRORS as error:
        failure = composition_error(error, "--config-name", config_name)
    try:
        config = composed(config_name, search)
    except COMPOSITION_ERRORS:
        return None, {"": failure}
    good: list[str] = []
    failures: dict[str, UserError] = {}
    for key, choice in choices.items():
        try:
            config = composed(config_name, [*search, *good, choice])
            good.append(choice)
        except COMPOSITION_ERRORS as error:
            failures[key] = composition_error(error, key, choice.partition("=")[2])
    return config, failures


def composed(config_name: str, overrides: list[str]) -> DictConfig:
    return compose(config_name, overrides, return_hydra_config=True)


@contextmanager
def hydra_known(config: DictConfig) -> Iterator[None]:
    """While it lasts, references such as ${hydra:runtime.output_dir} can be resolved."""
    for key, value in {"runtime.output_dir": ".", "job.num": 0, "job.id": "0"}.items():
        OmegaConf.update(config, f"hydra.{key}", value)
    instance = HydraConfig.instance()
    before = instance.cfg
    instance.set_config(config)
    try:
        yield
    finally:
        instance.cfg = before


def composition_error(error: BaseException, option: str, value: object) -> UserError:
    """The error of Hydra, OmegaConf or the YAML parser as one at `option`, or where the error says."""
    if isinstance(error, yaml.MarkedYAMLError):
        return yaml_error(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        name = error.missing_cfg_file.rpartition("/")[2]
        write = suggest(name, error.options) if error.options else "name a file of the configuration folder"
        return UserError(option, value, first_line(error), write)
    for each in (error.__cause__, error.__context__, error):
        if isinstance(each, OmegaConfBaseException) and each.full_key:
            return typed_error(each, option, value)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    write = f"write {option.lstrip('+')}={value}" if option.startswith("+") else f"mend or leave out {option}"
    return UserError(option, value, lines[0], " ".join(lines[1:]) or write)


def yaml_error(error: yaml.MarkedYAMLError) -> UserError:
    mark = error.problem_mark
    lines = Path(mark.name).read_text(encoding="utf-8").rstrip().splitlines()
    index = min(mark.line, len(lines) - 1)  # a mark at the end of the file stands behind its last line
    wrong = f"this is no YAML: {error.problem}"
    return UserError(f"{mark.name}, line {index + 1}", lines[index].strip(), wrong, "mend that line")


def typed_error(error: OmegaConfBaseException, option: str, value: object) -> UserError:
    """A key or value that the composed configuration refuses: an override's own, or one in a chosen file."""
    key = str(error.full_key)
    set_by = "" if key == option else f" (set by {option}={value})"
    refused = value if key == option else error.value
    for misfit in misfits(key, refused, ANNOTATIONS.get(key, "Any")):
        return UserError(misfit.option, misfit.value, f"{misfit.wrong}{set_by}", misfit.write)
    write = example(key, "")
    if isinstance(error, ConfigAttributeError | ConfigKeyError) and isinstance(error.parent_node, DictConfig):
        write = suggest(str(error.key), map(str, error.parent_node.keys()))
    return UserError(key, refused, f"{first_line(error)}{set_by}", write)
