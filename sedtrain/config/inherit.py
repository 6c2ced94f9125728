"""Takes options from the run whose model is used: only plain values, never a class that its folder alone names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sedtrain.config.check import check_root, check_value
from sedtrain.config.rules import metric_problems
from sedtrain.config.schema import conf_dir, first_line
from sedtrain.errors import UserError
from sedtrain.plain import plain_value
from sedtrain.run_dir import config_of

READ = ("data", "target", "normalizer", "metrics", "decoding")
INHERITED = ("encoder", "decoder", "adapter", *READ)
FROM_ROOT = {"target": "target", "seed": "seed", "folder": "run_dir"}  # option of data -> option of the root
OLD_NAMES = {"normaliser": "normalizer", "training_normaliser": "training_normalizer"}
CODE = ("evaluate", "trust_remote_code")  # options of a metric that load and run code
WRITE = "write checkpoint=RUN of a whole run, or checkpoint=RUN/model with data=OPTION"


def renamed(override: str) -> str:
    """The override with today's name of its option."""
    name, equals, value = override.partition("=")
    bare = name.lstrip("+~")
    return f"{name.removesuffix(bare)}{OLD_NAMES.get(bare, bare)}{equals}{value}"


def inherit_run(config: DictConfig, overrides: list[str]) -> None:
    """For tasks with `checkpoint=RUN`: takes the model, data and scoring of that run, unless `overrides` decide them.

    overrides: of the command line
    Raises UserError for a class that neither the package nor the command line names, and for values that do not fit.
    """
    file = config_of(str(config.checkpoint))
    if config.task in ("train", "fit_batches") or not file.is_file():
        return
    of_run = plain_value(file, "checkpoint", config.checkpoint, WRITE)
    if not isinstance(of_run, dict):
        raise UserError("checkpoint", config.checkpoint, "its config.yaml holds no options", WRITE)
    of_run |= {OLD_NAMES[str(old)]: of_run[old] for old in of_run.keys() & OLD_NAMES.keys()}
    match of_run.get("metrics"):
        case {"bleu": {"tokenize": _, **others}, **metrics} if not others and not metrics:
            del of_run["metrics"]  # written before metrics could be chosen
    parsed = OverridesParser.create().parse_overrides(overrides)
    chosen = {override.key_or_group for override in parsed}
    taken = [key for key in INHERITED if key in of_run and key not in chosen and "experiment" not in chosen]
    refuse_unnamed(config, {key: of_run[key] for key in taken}, chosen)
    try:
        config.update({key: of_run[key] for key in taken})
    except OmegaConfBaseException as error:
        raise UserError("checkpoint", config.checkpoint, f"its config.yaml: {first_line(error)}", WRITE) from error
    config.data.update({name: config[in_root] for name, in_root in FROM_ROOT.items() if name in config.data})
    for override in parsed:
        if override.key_or_group.split(".")[0] in INHERITED and "." in override.key_or_group:
            OmegaConf.update(config, override.key_or_group, override.value(), force_add=True)
    errors = [error for key in READ for error in (check_value(config, key, key) if key in taken else ())]
    errors += metric_problems(config) if "metrics" in taken else []
    if errors := [*check_root(config), *errors]:
        raise UserError.all_of(errors)


def refuse_unnamed(config: DictConfig, stored: Mapping[str, Any], chosen: set[str]) -> None:
    """Raises UserError for anything that Hydra would import, call or look up only because the run's folder says so.

    The command line, the composed configuration and conf/ may name such things.

    stored: groups of a run
    chosen: options that the command line sets
    """
    errors = []
    own_files = ", with --config-dir FOLDER if it is your own, as for the training"
    composed: Any = OmegaConf.to_container(config, resolve=False)
    for group, values in stored.items():
        own = list(directives(composed[group], group))
        if isinstance(composed[group], dict) and not isinstance(values, dict):
            errors.append(UserError("checkpoint", config.checkpoint, f"its config.yaml has {group}={values!r}", WRITE))
        for name, value in directives(values, group):
            if not (name in chosen or (name, value) in own or (name, value) in directives_of_package(group)):
                wrong = f"its config.yaml has {name}={value}, and what only a folder names is never imported or called"
                write = f"write {group}=OPTION or experiment=NAME{own_files}"
                errors.append(UserError("checkpoint", config.checkpoint, wrong, write))
    if errors:
        raise UserError.all_of(errors)


def directives(value: object, path: str) -> Iterator[tuple[str, object]]:
    """Dotted names and values that Hydra acts on: keys such as `_target_`, and references to other values."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if str(name).startswith("_") or name in CODE:
                yield f"{path}.{name}", inner
            yield from directives(inner, f"{path}.{name}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from directives(inner, f"{path}[{index}]")
    elif isinstance(value, str) and "${" in value:
        yield path, value


def directives_of_package(group: str) -> Iterator[tuple[str, object]]:
    """Directives in the package's option files for a group, and in its experiments."""
    for folder, pattern in ((".", f"{group}_settings.yaml"), (group, "*.yaml"), ("experiment", "*.yaml")):
        for file in (conf_dir() / folder).glob(pattern):
            option = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            of_group = {} if folder == "experiment" else option  # options of `@package _global_` name their group too
            yield from directives(option.get(group, of_group), group)
