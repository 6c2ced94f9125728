"""Checks the whole command line before Hydra runs it, and reports every mistake at once."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from hydra import initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType, RangeSweep
from hydra.errors import HydraException

from sedtrain.config.inherit import renamed
from sedtrain.config.job_check import SEARCH_PATH, JobCheck
from sedtrain.config.schema import conf_dir, register
from sedtrain.errors import UserError

SEARCH = "hydra/sweeper=optuna"
PLAIN_TEXT = re.compile(r"""[^\s'"{}(),$=\\\[][^\s'"{}(),$=\\]*""")
"""Values such as train[:90%], which Hydra takes only in quotes."""
PLAIN_KEY = re.compile(r"(\+\+?)?[A-Za-z_][\w.]*")


def check_command_line(arguments: list[str]) -> list[str]:
    """The checked arguments for Hydra, flags first; a request for help passes unchecked.

    An option that a target takes but no option file lists gets the `++` that Hydra wants. Raises UserError.
    """
    flags = get_args_parser().parse_intermixed_args(arguments)
    asks_help = flags.help or flags.hydra_help or flags.shell_completion or flags.info
    if asks_help or flags.config_path or flags.experimental_rerun:
        return arguments
    folders = [Path(flags.config_dir)] if flags.config_dir else []
    name = flags.config_name or "train"
    checked = check_overrides(flags.overrides, folders, config_name=name, multirun=flags.multirun)
    return [*(argument for argument in arguments if argument not in flags.overrides), *checked]


def check_overrides(
    overrides: list[str], folders: list[Path], config_name: str = "train", multirun: bool = False
) -> list[str]:
    """The checked overrides for Hydra. Raises one UserError for all mistakes in them and in the composed configuration.

    folders: further folders of option files, beside `conf_dir()`
    """
    register()
    with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        check = OverrideCheck(multirun or "hydra.mode=MULTIRUN" in overrides)
        parsed = check.parse(map(renamed, overrides))
        check.refuse_unknown_homes(parsed)
        search_path = check.search_path(parsed, folders)
        check.check_sweeper(parsed)
        values = [singles for override in parsed if (singles := check.single_values(override))]
        job = JobCheck(config_name, search_path)
        for index in range(max(map(len, values), default=1)):
            job.compose_and_apply([singles[min(index, len(singles) - 1)] for singles in values])
    if errors := [*check.errors, *job.errors]:
        raise UserError.all_of(errors)
    is_added = [override.type is OverrideType.CHANGE and override.key_or_group in job.added for override in parsed]
    return [f"{'++' * added}{override.input_line}" for added, override in zip(is_added, parsed, strict=True)]


class OverrideCheck:
    """The mistakes in the overrides themselves, before anything is composed."""

    def __init__(self, multirun: bool) -> None:
        self.multirun = multirun
        self.errors: list[UserError] = []
        self.searches = False  # True: Optuna draws the values
        self.parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())

    def report(self, option: str, value: object, wrong: str, write: str) -> None:
        self.errors.append(UserError(option, value, wrong, write))

    def parse(self, overrides: Iterable[str]) -> list[Override]:
        """The overrides that Hydra can read, some only after quoting; reports the others."""
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

    def refuse_unknown_homes(self, overrides: list[Override]) -> None:
        """Reports a path such as `~anna/run` if this machine has no user `anna`: Python could not expand it."""
        for override in overrides:
            home = str(override.value()).partition("/")[0]
            if home.startswith("~") and os.path.expanduser(home) == home:
                wrong, write = f"there is no user {home[1:]!r} on this machine", "write ~/PATH, or an absolute path"
                self.report(override.key_or_group, override.value(), wrong, write)

    def search_path(self, overrides: list[Override], folders: list[Path]) -> list[str]:
        """The override for Hydra's search path, from `folders` and `hydra.searchpath`; empty without any folder."""
        for folder in folders:
            if not folder.is_dir():
                self.report("--config-dir", str(folder), "no such folder", "name a folder of groups")
        paths = [f"file://{folder.resolve()}" for folder in folders if folder.is_dir()]
        for override in overrides:
            if override.key_or_group == SEARCH_PATH:
                paths += self.searched(override)
        quoted = ["'" + path.replace("'", "\\'") + "'" for path in paths]
        return [f"{SEARCH_PATH}=[{','.join(quoted)}]"] if quoted else []

    def searched(self, override: Override) -> list[str]:
        """The entries of `hydra.searchpath`; reports local folders that do not exist."""
        listed, write = override.value(), f"write '{SEARCH_PATH}=[\"file:///FOLDER\"]'"
        if not isinstance(listed, list) or not all(isinstance(place, str) for place in listed):
            written = str(override.input_line).partition("=")[2]  # empty if the key is deleted
            self.report(SEARCH_PATH, written, "this is no list of folders", write)
            return []
        paths = {place: place.removeprefix("file://") for place in listed}
        lost = [place for place, path in paths.items() if "://" not in path and not Path(path).is_dir()]
        for place in lost:
            self.report(SEARCH_PATH, place, "no such folder", write)
        return [place for place in listed if place not in lost]

    # --- sweeps

    def check_sweeper(self, overrides: list[Override]) -> None:
        """Reports hydra/sweeper=optuna without its package or without --multirun."""
        self.searches = any(override.input_line == SEARCH for override in overrides)
        if self.searches and find_spec("optuna") is None:
            wrong = "it needs packages that are not installed"
            self.report("hydra/sweeper", "optuna", wrong, "pip install 'sedtrain[optuna]'")
        if self.searches and not self.multirun:
            self.report("hydra/sweeper", "optuna", "it runs several jobs", "add --multirun, or -m")

    def single_values(self, override: Override) -> list[Override]:
        """A sweep's values, a range's first value, or an interval's ends; the override itself if it is none of these."""
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
        return self.parse(f"{key}={single}" for single in values)


def unreadable(text: str) -> UserError:
    """The error for an override that Hydra cannot read."""
    key, equals, value = text.partition("=")
    if not equals:
        return UserError(key, "", "no value is given", f"write {key}=VALUE")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    quoted = shlex.quote(f'{key}="{escaped}"')
    return UserError(key, value, "this has special characters", f"quote it: {quoted}")
