"""Composes the configuration of one job and checks it, with every override applied as Hydra would."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sedtrain.annotations import closest, suggest
from sedtrain.config.check import check_references, find_problems
from sedtrain.config.hydra_calls import COMPOSITION_ERRORS, compose_choices, composition_error, hydra_known
from sedtrain.config.schema import ANNOTATIONS, plain
from sedtrain.errors import UNSET, UserError

SEARCH_PATH = "hydra.searchpath"
OF_WHOLE = re.compile(
    r"size|tokenizer(\..+)?|(en|de)coder\.(attention|base|large|model_type|pretrained|size|tiny)(\..+)?"
)
"""Options that a whole checkpoint decides; build refuses some others by their values."""


class JobCheck:
    """Checks jobs one after another, and collects their mistakes.

    search_path: the override of Hydra's search path, if any
    errors: mistakes of the jobs so far
    added: keys that these jobs set and no option file lists
    """

    def __init__(self, config_name: str, search_path: list[str]) -> None:
        self.config_name, self.search_path = config_name, search_path
        self.errors: list[UserError] = []
        self.added: set[str] = set()
        self.loader: Any = GlobalHydra.instance().config_loader()

    def report(self, option: str, value: object, wrong: str, write: str) -> None:
        self.errors.append(UserError(option, value, wrong, write))

    def compose_and_apply(self, overrides: list[Override]) -> None:
        """Checks the configuration that overrides of single values compose."""
        overrides = [override for override in overrides if override.key_or_group != SEARCH_PATH]
        of_groups = (override for override in overrides if self.options(override.key_or_group))
        choices = {choice.get_key_element(): choice for choice in of_groups if not isinstance(choice.value(), dict)}
        known = {key: text for key, choice in choices.items() if (text := self.choose(choice))}
        config, failures = compose_choices(self.config_name, self.search_path, known)
        self.errors += failures.values()
        if config is None:
            return
        failed = [key for key in choices if key not in known or key in failures]
        failed_groups = tuple(f"{choices[key].key_or_group.replace('/', '.')}." for key in failed)
        for override in overrides:
            if override not in choices.values() and not f"{override.key_or_group}.".startswith(failed_groups):
                self.apply(config, override)
        try:
            with hydra_known(config):
                self.errors += [*find_problems(config), *check_references(config.hydra, "hydra")]
        except UserError as error:
            self.errors += error.errors
        except OmegaConfBaseException as error:  # Hydra's own settings
            self.errors.append(composition_error(error, "hydra", UNSET))
        self.refuse_missing(config)
        self.refuse_beside_whole(config, known, overrides)

    def refuse_beside_whole(self, config: DictConfig, known: dict[str, str], overrides: list[Override]) -> None:
        """Reports options of the model that `checkpoint=` already decides."""
        checkpoint = plain(config, "checkpoint")
        if checkpoint in (None, UNSET) or config.get("task") not in ("train", "fit_batches"):
            return
        for part in ("encoder", "decoder"):
            option = known.get(part, "").partition("=")[2]
            if option and not all(option in self.options(group) for group in ("encoder", "decoder")):
                apart = f"{part}={option} {part}.checkpoint=FOLDER without checkpoint="
                write = f"write checkpoint={checkpoint} without {part}=, or {apart}"
                self.report(part, option, "a whole checkpoint has its own encoder and decoder", write)
        for override in overrides:
            key, value = override.key_or_group, override.value()
            inner = value.items() if isinstance(value, dict) else ()
            given = {f"{key}.{name}": inner_value for name, inner_value in inner} or {key: value}
            for name in filter(OF_WHOLE.fullmatch, given):
                write = f"write checkpoint={checkpoint} without {name}="
                self.report(name, given[name], f"a whole checkpoint has its own {name}", write)

    def refuse_missing(self, config: DictConfig) -> None:
        """Reports options of the root that were deleted, and groups that were replaced by a plain value."""
        for name, hint in ANNOTATIONS.items():
            known = self.options(name) if hint == "Any" and name != "strategy" else []  # a strategy is part of trainer
            exists = name in config.keys()  # noqa: SIM118 - also missing values
            value = plain(config, name) if exists else None
            only_strategy = name == "trainer" and isinstance(value, dict) and "_target_" not in value
            if not exists or (known and (only_strategy or not isinstance(value, dict | str))):
                self.report(name, value, "every run needs this", f"write {name}={' | '.join(known) or 'VALUE'}")

    @cached_property
    def repository(self) -> Any:
        """Hydra's repository of option files, kept because its loader would walk the whole defaults tree each time."""
        return self.loader._parse_overrides_and_create_caching_repo(self.config_name, self.search_path)[1]

    def options(self, group: str) -> list[str]:
        return list(self.repository.get_group_options(group, ObjectType.CONFIG))

    def choose(self, override: Override) -> str | None:
        """The choice as an override of known options; reports an unknown one, and takes the closest for it."""
        if override.is_delete():
            return override.input_line
        value, group = override.value(), override.key_or_group
        names = ["null" if name is None else str(name) for name in (value if isinstance(value, list) else [value])]
        chosen = [self.known_option(group, name) for name in names]
        listed = ",".join(filter(None, chosen))
        listed = f"[{listed}]" if isinstance(value, list) else listed
        return None if None in chosen else f"{override.get_key_element()}={listed}"

    def known_option(self, group: str, option: str) -> str | None:
        folder, _, name = f"{group}/{option.removesuffix('.yaml')}".rpartition("/")
        known = self.options(group)
        if name not in self.options(folder):
            self.report(group, option, f"{group} has no option {option!r}", suggest(option, known))
            return closest(option, known)
        if (group, option) == ("hydra/launcher", "slurm") and "submitit_slurm" not in known:
            wrong = f"{group}={option} needs packages that are not installed"
            self.report(group, option, wrong, f"pip install 'sedtrain[{option}]'")
            return None
        return option

    def apply(self, config: DictConfig, override: Override) -> None:
        """Sets one value as Hydra does. Also sets a new option of a target, which its signature then judges."""
        key, value = override.key_or_group, override.value()
        if f"{key}.".startswith("hydra.runtime."):
            self.report(key, value, "Hydra itself sets this", f"leave {key} out")
            return
        node, path, lacking = deepest(config, key)
        # An empty mapping inside a group, such as encoder.options, takes any key. Nothing below hydra. does.
        takes_more = isinstance(node, DictConfig) and ("_target_" in node or (not node and "." in path))
        is_open = takes_more and not key.startswith("hydra.")
        adds = override.type is OverrideType.CHANGE and is_open and (lacking or isinstance(value, dict))
        if lacking and not adds and override.type in (OverrideType.CHANGE, OverrideType.DEL):
            self.report(key, value, *self.unknown_key(config, node, path, lacking))
            return
        try:
            if adds:
                OmegaConf.update(config, key, value, force_add=True)
                self.added.add(key)
            else:
                ConfigLoaderImpl._apply_overrides_to_config([override], config)
        except COMPOSITION_ERRORS as error:
            self.errors.append(composition_error(error, key, value))
        except AttributeError:  # OmegaConf cannot merge a mapping into null
            self.report(key, value, "this cannot be merged into the present value", f"correct or leave out {key}")

    def unknown_key(self, config: DictConfig, node: Any, path: str, lacking: str) -> tuple[str, str]:
        """Says what is wrong with a key that the configuration lacks, and what to write instead."""
        if not path:
            names = dict.fromkeys([*map(str, config.keys()), *self.loader.list_groups("")])
            known = [name for name in names if name != "hydra"]
            return f"there is no group or option {lacking!r}", suggest(lacking, known)
        wrong, known = f"{path} has no option {lacking!r}", self.options(path)
        if isinstance(node, DictConfig) and node:
            adding = f"; to add an option, write +{path}.{lacking}=VALUE"
            return wrong, suggest(lacking, map(str, node.keys())) + adding
        return wrong, f"choose one first: {path}={' | '.join(known)}" if known else f"write {path}=VALUE"


def deepest(config: DictConfig, key: str) -> tuple[Any, str, str]:
    """The deepest node on the path to a key, the node's own path, and the first name that it lacks ('' if none)."""
    node, path = config, ""
    for name in key.split("."):
        if isinstance(node, ListConfig):
            return node, path, ""
        if not isinstance(node, DictConfig) or name not in node.keys():  # noqa: SIM118 - also missing values
            return node, path, name
        if OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name):
            return None, path, ""
        node, path = node[name], f"{path}.{name}".lstrip(".")
    return node, path, ""
