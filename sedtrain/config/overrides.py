"""The command line checked as a whole before Hydra runs it: every mistake is reported at once."""

from __future__ import annotations

import os
import re
import shlex
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sedtrain.annotations import closest, suggest
from sedtrain.config.composition import COMPOSITION_ERRORS, compose_choices, composition_error, hydra_known
from sedtrain.config.inherit import renamed
from sedtrain.config.schema import ANNOTATIONS, check_references, conf_dir, find_problems, plain, register
from sedtrain.errors import UNSET, UserError

SEARCH = "hydra/sweeper=optuna"
PLAIN_TEXT = re.compile(r"""[^\s'"{}(),$=\\\[][^\s'"{}(),$=\\]*""")  # such as train[:90%], which Hydra wants in quotes
PLAIN_KEY = re.compile(r"(\+\+?)?[A-Za-z_][\w.]*")
SEARCH_PATH = "hydra.searchpath"
OF_WHOLE = re.compile(
    r"size|tokenizer(\..+)?|(en|de)coder\.(attention|base|large|model_type|pretrained|size|tiny)(\..+)?"
)
"""Options that a whole checkpoint decides, beside those that build refuses by their values."""


def check_command_line(arguments: list[str]) -> list[str]:
    """Hydra's arguments, checked, flags first; arguments that only ask for help pass as they are.

    Raises UserError. An option that a target takes but no option file lists gets the `++` that Hydra wants.
    """
    flags = get_args_parser().parse_intermixed_args(arguments)
    asks_help = flags.help or flags.hydra_help or flags.shell_completion or flags.info
    if asks_help or flags.config_path or flags.experimental_rerun:
        return arguments
    folders = [Path(flags.config_dir)] if flags.config_dir else []
    name = flags.config_name or "train"
    checked = check_overrides(flags.overrides, folders, config_name=name, multirun=flags.multirun)
    return [*(each for each in arguments if each not in flags.overrides), *checked]


def check_overrides(
    overrides: list[str], folders: list[Path], config_name: str = "train", multirun: bool = False
) -> list[str]:
    """The overrides for Hydra. Raises one UserError of every mistake in them and in what they compose.

    folders: of groups, beside those of `conf_dir()`
    """
    register()
    with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        check = Check(config_name, multirun or "hydra.mode=MULTIRUN" in overrides)
        parsed = check.parse(map(renamed, overrides))
        check.refuse_strangers(parsed)
        check.add_search_path(parsed, folders)
        check.check_sweeper(parsed)
        jobs = [job for override in parsed if (job := check.single_values(override))]
        for index in range(max(map(len, jobs), default=1)):
            check.compose_and_apply([job[min(index, len(job) - 1)] for job in jobs])
    if check.errors:
        raise UserError.all_of(check.errors)
    is_added = [each.type is OverrideType.CHANGE and each.key_or_group in check.added for each in parsed]
    return [f"{'++' * added}{each.input_line}" for added, each in zip(is_added, parsed, strict=True)]


class Check:
    """The mistakes of one command line so far, and the keys it sets that no option file lists."""

    def __init__(self, config_name: str, multirun: bool) -> None:
        self.config_name, self.multirun = config_name, multirun
        self.errors: list[UserError] = []
        self.added: set[str] = set()
        self.search_path: list[str] = []  # the override of Hydra's search path, if any
        self.searches = False  # whether Optuna draws the values
        self.loader: Any = GlobalHydra.instance().config_loader()
        self.parser = OverridesParser.create(config_loader=self.loader)

    def report(self, option: str, value: object, wrong: str, write: str) -> None:
        self.errors.append(UserError(option, value, wrong, write))

    def parse(self, overrides: Any) -> list[Override]:
        parsed = []
        for text in overrides:
            if not text.partition("=")[0].strip("+~").strip():
                self.report(text.strip() or "''", "", "no option is named", "write OPTION=VALUE")
                continue
            try:
                parsed += self.parser.parse_overrides([text])
            except HydraException:
                key, _, value = text.partition("=")
                if PLAIN_TEXT.fullmatch(value) and PLAIN_KEY.fullmatch(key):
                    parsed += self.parser.parse_overrides([f'{key}="{value}"'])
                else:
                    self.errors.append(unreadable(text))
        return parsed

    def refuse_strangers(self, overrides: list[Override]) -> None:
        """Reports a place such as `~anna/run` where there is no user `anna`, which Python cannot find."""
        for override in overrides:
            home = str(override.value()).partition("/")[0]
            if home.startswith("~") and os.path.expanduser(home) == home:
                wrong, write = f"there is no user {home[1:]!r} on this machine", "write ~/PLACE, or the place from / on"
                self.report(override.key_or_group, override.value(), wrong, write)

    def add_search_path(self, overrides: list[Override], folders: list[Path]) -> None:
        """Adds these folders to Hydra's search path, and checks those of `hydra.searchpath`."""
        for folder in folders:
            if not folder.is_dir():
                self.report("--config-dir", str(folder), "no such folder", "name a folder of groups")
        paths = [f"file://{folder.resolve()}" for folder in folders if folder.is_dir()]
        for override in overrides:
            if override.key_or_group == SEARCH_PATH:
                paths += self.searched(override)
        quoted = ["'" + path.replace("'", "\\'") + "'" for path in paths]
        self.search_path = [f"{SEARCH_PATH}=[{','.join(quoted)}]"] if quoted else []

    def searched(self, override: Override) -> list[str]:
        listed, write = override.value(), f"write '{SEARCH_PATH}=[\"file:///FOLDER\"]'"
        if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
            written = str(override.input_line).partition("=")[2]  # nothing where the key is deleted
            self.report(SEARCH_PATH, written, "this is no list of folders", write)
            return []
        local = {
            each: Path(each.removeprefix("file://")) for each in listed if "://" not in each.removeprefix("file://")
        }
        lost = [each for each, folder in local.items() if not folder.is_dir()]
        for each in lost:
            self.report(SEARCH_PATH, each, "no such folder", write)
        return [each for each in listed if each not in lost]

    # --- sweeps

    def check_sweeper(self, overrides: list[Override]) -> None:
        """Reports what keeps hydra/sweeper=optuna from working, whatever is searched."""
        self.searches = any(each.input_line == SEARCH for each in overrides)
        if self.searches and find_spec("optuna") is None:
            wrong = "it needs packages that are not installed"
            self.report("hydra/sweeper", "optuna", wrong, "pip install 'sedtrain[optuna]'")
        if self.searches and not self.multirun:
            self.report("hydra/sweeper", "optuna", "it runs several jobs", "add --multirun, or -m")

    def single_values(self, override: Override) -> list[Override]:
        """A sweep's values, of a range the first, of an interval its ends; the override itself where it is no sweep."""
        if not override.is_sweep_override():
            return [override]
        key, option, value = override.get_key_element(), override.key_or_group, override.get_value_string()
        if not self.multirun:
            quoted = shlex.quote(f'{key}="{value}"')
            write = f"add --multirun to run each; a list is '{key}=[{value}]', a text {quoted}"
            self.report(option, value, "several values without --multirun", write)
            return []
        sweep = override.value()
        if isinstance(sweep, IntervalSweep):
            if not self.searches:
                wrong = "an interval has no values to run one after the other"
                self.report(option, value, wrong, f"add {SEARCH} to search it, or list values")
            return self.parse([f"{key}={sweep.start}", f"{key}={sweep.end}"])
        values = [sweep.start] if isinstance(sweep, RangeSweep) else override.sweep_string_iterator()
        return self.parse(f"{key}={each}" for each in values)

    # --- one job

    def compose_and_apply(self, overrides: list[Override]) -> None:
        """Checks the configuration that overrides of single values compose."""
        overrides = [each for each in overrides if each.key_or_group != SEARCH_PATH]
        named = (each for each in overrides if self.options(each.key_or_group))
        choices = {each.get_key_element(): each for each in named if not isinstance(each.value(), dict)}
        known = {key: text for key, each in choices.items() if (text := self.choose(each))}
        config, failures = compose_choices(self.config_name, self.search_path, known)
        self.errors += failures.values()
        if config is None:
            return
        lacking = [key for key in choices if key not in known or key in failures]
        left_out = tuple(f"{choices[key].key_or_group.replace('/', '.')}." for key in lacking)
        for override in overrides:
            if override not in choices.values() and not f"{override.key_or_group}.".startswith(left_out):
                self.apply(config, override)
        try:
            with hydra_known(config):
                self.errors += [*find_problems(config), *check_references(config.hydra, "hydra")]
        except UserError as error:
            self.errors += error.errors
        except OmegaConfBaseException as error:  # Hydra's own settings
            self.errors.append(composition_error(error, "hydra", UNSET))
        self.refuse_lost(config)
        self.refuse_beside_whole(config, known, overrides)

    def refuse_beside_whole(self, config: DictConfig, known: dict[str, str], overrides: list[Override]) -> None:
        """Reports options of the model that a whole checkpoint decides."""
        checkpoint = plain(config, "checkpoint")
        if checkpoint in (None, UNSET) or config.get("task") not in ("train", "fit_batches"):
            return
        for part in ("encoder", "decoder"):
            option = known.get(part, "").partition("=")[2]
            if option and not all(option in self.options(each) for each in ("encoder", "decoder")):
                apart = f"{part}={option} {part}.checkpoint=FOLDER without checkpoint="
                write = f"write checkpoint={checkpoint} without {part}=, or {apart}"
                self.report(part, option, "a whole checkpoint has its own encoder and decoder", write)
        for override in overrides:
            key, value = override.key_or_group, override.value()
            inner = value.items() if isinstance(value, dict) else ()
            given = {f"{key}.{name}": each for name, each in inner} or {key: value}
            for name in filter(OF_WHOLE.fullmatch, given):
                write = f"write checkpoint={checkpoint} without {name}="
                self.report(name, given[name], f"a whole checkpoint has its own {name}", write)

    def refuse_lost(self, config: DictConfig) -> None:
        """Reports options of the root that were deleted, and groups that something else took the place of."""
        for name, hint in ANNOTATIONS.items():
            known = self.options(name) if hint == "Any" and name != "strategy" else []  # an option of the trainer
            is_there = name in config.keys()  # noqa: SIM118 - also missing values
            value = plain(config, name) if is_there else None
            is_empty = name == "trainer" and isinstance(value, dict) and "_target_" not in value  # a strategy alone
            if not is_there or (known and (is_empty or not isinstance(value, dict | str))):
                self.report(name, value, "every run needs this", f"write {name}={' | '.join(known) or 'VALUE'}")

    @cached_property
    def repository(self) -> Any:
        """Hydra's repository of option files; asking its loader walks the whole defaults tree each time."""
        return self.loader._parse_overrides_and_create_caching_repo(self.config_name, self.search_path)[1]

    def options(self, group: str) -> list[str]:
        return list(self.repository.get_group_options(group, ObjectType.CONFIG))

    def choose(self, override: Override) -> str | None:
        """A choice of options that exist; an unknown one is reported, and the closest one takes its place."""
        if override.is_delete():
            return override.input_line
        value, group = override.value(), override.key_or_group
        names = ["null" if each is None else str(each) for each in (value if isinstance(value, list) else [value])]
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
        """Sets one value as Hydra does; a new option of a target is set too, for its signature to judge."""
        key, value = override.key_or_group, override.value()
        if f"{key}.".startswith("hydra.runtime."):
            self.report(key, value, "Hydra itself sets this", f"leave {key} out")
            return
        node, path, lacking = deepest(config, key)
        # An empty mapping within a group, such as encoder.options, takes any key; nothing that is Hydra's does.
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
        except AttributeError:  # OmegaConf's own, of a mapping whose old value is null
            self.report(key, value, "this cannot be merged into the value that is there", f"correct or leave out {key}")

    def unknown_key(self, config: DictConfig, node: Any, path: str, lacking: str) -> tuple[str, str]:
        """The fault of a key that the configuration lacks, and what to write instead."""
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
    """The deepest node on the way to a key, its path, and the first name it lacks: '' where none is lacking."""
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


def unreadable(text: str) -> UserError:
    key, equals, value = text.partition("=")
    if not equals:
        return UserError(key, "", "no value is given", f"write {key}=VALUE")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    quoted = shlex.quote(f'{key}="{escaped}"')
    return UserError(key, value, "this has characters with a meaning of their own", f"quote it: {quoted}")
