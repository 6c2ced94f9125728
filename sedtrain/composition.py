"""Hydra's composition for the check: what fails in it comes back as problems."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from sedtrain.config import Config, Problem, example, misfit
from sedtrain.definition import suggest

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError)


def compose_choices(
    config_name: str, search: list[str], choices: dict[str, str]
) -> tuple[DictConfig | None, dict[str, Problem]]:
    """The configuration of those group choices that compose, and by key why the others do not.

    search:  the override of Hydra's search path, or nothing
    choices: override by key, such as {"encoder": "encoder=hubert"}
    """
    try:
        return _composed(config_name, [*search, *choices.values()]), {}
    except COMPOSITION_ERRORS as error:
        failure = composition_problem(error, "--config-name", config_name)
    try:
        config = _composed(config_name, search)
    except COMPOSITION_ERRORS:
        return None, {"": failure}
    good: list[str] = []
    problems: dict[str, Problem] = {}
    for key, choice in choices.items():
        try:
            config = _composed(config_name, [*search, *good, choice])
            good.append(choice)
        except COMPOSITION_ERRORS as error:
            problems[key] = composition_problem(error, key, choice.partition("=")[2])
    return config, problems


def _composed(config_name: str, overrides: list[str]) -> DictConfig:
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


def composition_problem(error: BaseException, path: str, value: object) -> Problem:
    """What Hydra, OmegaConf or the YAML parser raised, as a problem at `path` or where the error says."""
    if isinstance(error, yaml.MarkedYAMLError):
        return _yaml_problem(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        name = error.missing_cfg_file.rpartition("/")[2]
        write = suggest(name, error.options) if error.options else "name a file of the configuration folder"
        return Problem(path, value, str(error).splitlines()[0], write)
    for each in (error.__cause__, error.__context__, error):
        if isinstance(each, OmegaConfBaseException) and each.full_key:
            return _typed_problem(each, path, value)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    plain = f"write {path.lstrip('+')}={value}" if path.startswith("+") else f"mend or leave out {path}"
    return Problem(path, value, lines[0], " ".join(lines[1:]) or plain)


def _yaml_problem(error: Any) -> Problem:
    mark = error.problem_mark
    lines = Path(mark.name).read_text(encoding="utf-8").rstrip().splitlines()
    index = min(mark.line, len(lines) - 1)  # a mark at the end of the file stands behind its last line
    wrong = f"this is no YAML: {error.problem}"
    return Problem(f"{mark.name}, line {index + 1}", lines[index].strip(), wrong, "mend that line")


def _typed_problem(error: OmegaConfBaseException, path: str, value: object) -> Problem:
    """A key or value that the composed configuration refuses: an override's own, or one in a chosen file."""
    key = str(error.full_key)
    problem = _refusal(error, key, value if key == path else error.value)
    return problem if key == path else replace(problem, wrong=f"{problem.wrong} (set by {path}={value})")


def _refusal(error: OmegaConfBaseException, key: str, value: object) -> Problem:
    annotations = {each.name: str(each.type) for each in fields(Config)}
    if key in annotations:
        return misfit(key, value, annotations[key])
    wrong = str(error).splitlines()[0]
    if isinstance(error, ConfigAttributeError | ConfigKeyError) and isinstance(error.parent_node, DictConfig):
        return Problem(key, value, wrong, suggest(str(error.key), map(str, error.parent_node.keys())))
    return Problem(key, value, wrong, example(key, ""))
