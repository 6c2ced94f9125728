"""The command line checked as a whole before Hydra runs it: every mistake is reported at once."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType, RangeSweep
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from sedtrain.config.annotations import example, misfits
from sedtrain.config.schema import ANNOTATIONS, conf_dir, find_problems, register
from sedtrain.config.suggest import closest, suggest
from sedtrain.errors import UserError
from sedtrain.run_dir import config_of

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError)


def compose_choices(
    config_name: str, search: list[str], choices: dict[str, str]
) -> tuple[DictConfig | None, dict[str, UserError]]:
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
    problems: dict[str, UserError] = {}
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


def composition_problem(error: BaseException, path: str, value: object) -> UserError:
    """What Hydra, OmegaConf or the YAML parser raised, as a problem at `path` or where the error says."""
    if isinstance(error, yaml.MarkedYAMLError):
        return _yaml_problem(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        name = error.missing_cfg_file.rpartition("/")[2]
        write = suggest(name, error.options) if error.options else "name a file of the configuration folder"
        return UserError(path, value, str(error).splitlines()[0], write)
    for each in (error.__cause__, error.__context__, error):
        if isinstance(each, OmegaConfBaseException) and each.full_key:
            return _typed_problem(each, path, value)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    plain = f"write {path.lstrip('+')}={value}" if path.startswith("+") else f"mend or leave out {path}"
    return UserError(path, value, lines[0], " ".join(lines[1:]) or plain)


def _yaml_problem(error: Any) -> UserError:
    mark = error.problem_mark
    lines = Path(mark.name).read_text(encoding="utf-8").rstrip().splitlines()
    index = min(mark.line, len(lines) - 1)  # a mark at the end of the file stands behind its last line
    wrong = f"this is no YAML: {error.problem}"
    return UserError(f"{mark.name}, line {index + 1}", lines[index].strip(), wrong, "mend that line")


def _typed_problem(error: OmegaConfBaseException, path: str, value: object) -> UserError:
    """A key or value that the composed configuration refuses: an override's own, or one in a chosen file."""
    key = str(error.full_key)
    problem = _refusal(error, key, value if key == path else error.value)
    if key == path:
        return problem
    return UserError(problem.option, problem.value, f"{problem.wrong} (set by {path}={value})", problem.write)


def _refusal(error: OmegaConfBaseException, key: str, value: object) -> UserError:
    if key in ANNOTATIONS and (found := list(misfits(key, value, ANNOTATIONS[key]))):
        return found[0]
    wrong = str(error).splitlines()[0]
    if isinstance(error, ConfigAttributeError | ConfigKeyError) and isinstance(error.parent_node, DictConfig):
        return UserError(key, value, wrong, suggest(str(error.key), map(str, error.parent_node.keys())))
    return UserError(key, value, wrong, example(key, ""))


SEARCH = "hydra/sweeper=optuna"


INHERITED = ("encoder", "decoder", "adapter", "data", "target", "normalizer", "decoding")


NEEDS = {("hydra/launcher", "slurm"): "submitit_slurm"}  # options that need an extra, by one that this brings


OF_ROOT = {"target": "target", "seed": "seed", "folder": "run_dir"}  # of data, by the name that it has in the root


def check_command_line(arguments: list[str]) -> list[str]:
    """The arguments for Hydra, checked, its flags first; those that only ask for help pass as they are.

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
    overrides: list[str],
    config_dirs: list[Path],
    *,
    primary_dir: Path | None = None,
    config_name: str = "train",
    multirun: bool = False,
) -> list[str]:
    """The overrides for Hydra; raises one UserError with every problem in them and in what they compose.

    primary_dir: the folder of `config_name`, else `conf_dir()`
    """
    register()
    with initialize_config_dir(str((primary_dir or conf_dir()).resolve()), version_base="1.3"):
        check = _Check(config_name)
        parsed = check.parse(overrides)
        multirun = multirun or "hydra.mode=MULTIRUN" in overrides
        check.search = check.search_path(parsed, config_dirs)
        check.check_search(parsed, multirun)
        values = [check.single_values(override, multirun) for override in parsed]
        for turn in range(max(map(len, values), default=1) or 1):
            check.compose_and_apply([each[min(turn, len(each) - 1)] for each in values if each])
    if check.problems:
        raise UserError.all_of(check.problems)
    return [f"++{each.input_line}" if check.has_added(each) else str(each.input_line) for each in parsed]


@dataclass
class _Check:
    """The problems of one command line so far, and the keys it sets that no option file lists."""

    config_name: str
    problems: list[UserError] = field(default_factory=list)
    added: set[str] = field(default_factory=set)
    search: list[str] = field(default_factory=list)  # the override of Hydra's search path
    searches: bool = False  # whether Optuna draws the values

    def __post_init__(self) -> None:
        self.loader: Any = GlobalHydra.instance().config_loader()
        self.parser = OverridesParser.create(config_loader=self.loader)

    def report(self, problem: UserError) -> None:
        self.problems.append(problem)

    def has_added(self, override: Override) -> bool:
        return override.type is OverrideType.CHANGE and override.key_or_group in self.added

    def parse(self, overrides: list[str]) -> list[Override]:
        parsed = []
        for text in overrides:
            try:
                parsed += self.parser.parse_overrides([text])
            except HydraException:
                self.report(_unreadable(text))
        return parsed

    def search_path(self, overrides: list[Override], folders: list[Path]) -> list[str]:
        """The override that has Hydra search the folders too; none where there is nothing to add."""
        for folder in folders:
            if not folder.is_dir():
                self.report(UserError("--config-dir", str(folder), "no such folder", "name a folder of groups"))
        places = [f"file://{folder.resolve()}" for folder in folders if folder.is_dir()]
        for override in filter(_is_search_path, overrides):
            value = override.value()
            places += map(str, value if isinstance(value, list) else [value])
        quoted = ["'" + place.replace("'", "\\'") + "'" for place in places]
        return [f"hydra.searchpath=[{','.join(quoted)}]"] if quoted else []

    def check_search(self, overrides: list[Override], multirun: bool) -> None:
        """Reports what keeps hydra/sweeper=optuna from working, whatever is searched."""
        self.searches = any(each.input_line == SEARCH for each in overrides)
        if self.searches and find_spec("optuna") is None:
            missing = "it needs packages that are not installed"
            self.report(UserError("hydra/sweeper", "optuna", missing, "pip install 'sedtrain[optuna]'"))
        if self.searches and not multirun:
            self.report(UserError("hydra/sweeper", "optuna", "it runs several jobs", "add --multirun, or -m"))

    def single_values(self, override: Override, multirun: bool) -> list[Override]:
        """A sweep's values, of a range the first, of an interval its ends; the override itself where it is no sweep."""
        if not override.is_sweep_override():
            return [override]
        key, value = override.get_key_element(), override.get_value_string()
        if not multirun:
            quoted = shlex.quote(f'{key}="{value}"')
            write = f"add --multirun to run each; a list is '{key}=[{value}]', a text {quoted}"
            self.report(UserError(override.key_or_group, value, "several values without --multirun", write))
            return []
        sweep = override.value()
        if isinstance(sweep, IntervalSweep) and not self.searches:
            wrong = "an interval has no values to run one after the other"
            self.report(UserError(override.key_or_group, value, wrong, f"add {SEARCH} to search it, or list values"))
        if isinstance(sweep, IntervalSweep):
            return self.parse([f"{key}={sweep.start}", f"{key}={sweep.end}"])
        if isinstance(sweep, RangeSweep):
            return self.parse([f"{key}={sweep.start}"])
        return self.parse([f"{key}={each}" for each in override.sweep_string_iterator()])

    def compose_and_apply(self, overrides: list[Override]) -> None:
        """Checks what overrides of single values compose."""
        overrides = [each for each in overrides if not _is_search_path(each)]
        choices = [each for each in overrides if self.is_choice(each)]
        texts = {each.get_key_element(): self.choose(each) for each in choices}
        known = {key: text for key, text in texts.items() if text}
        config, failures = compose_choices(self.config_name, self.search, known)
        for problem in failures.values():
            self.report(problem)
        if config is None:
            return
        composed = known.keys() - failures.keys()
        left_out = [each.key_or_group.replace("/", ".") for each in choices if each.get_key_element() not in composed]
        for override in overrides:
            is_left_out = any(f"{override.key_or_group}.".startswith(f"{each}.") for each in left_out)
            if override not in choices and not is_left_out:
                self.apply(config, override)
        with hydra_known(config):
            for problem in find_problems(config):
                self.report(problem)

    # --- group choices

    @cached_property
    def repository(self) -> Any:
        """Where Hydra finds options; its own way to them walks the whole defaults tree at every question."""
        return self.loader._parse_overrides_and_create_caching_repo(self.config_name, self.search)[1]

    def options(self, group: str) -> list[str]:
        found: list[str] = self.repository.get_group_options(group, ObjectType.CONFIG)
        return found

    def is_choice(self, override: Override) -> bool:
        is_values = isinstance(override.value(), dict)
        return not is_values and bool(self.options(override.key_or_group))

    def choose(self, override: Override) -> str | None:
        """A choice of options that exist; an unknown one is reported, and stands for the nearest one."""
        if override.is_delete():
            return override.input_line
        value, group = override.value(), override.key_or_group
        chosen = [self.known_option(group, str(each)) for each in _as_list(value)]
        if None in chosen:
            return None
        listed = ",".join(map(str, chosen))
        return f"{override.get_key_element()}={f'[{listed}]' if isinstance(value, list) else listed}"

    def known_option(self, group: str, option: str) -> str | None:
        folder, _, name = f"{group}/{option.removesuffix('.yaml')}".rpartition("/")
        known = self.options(group)
        if name in self.options(folder):
            if NEEDS.get((group, option), name) in [*known, name]:
                return option
            missing = f"{group}={option} needs packages that are not installed"
            self.report(UserError(group, option, missing, f"pip install 'sedtrain[{option}]'"))
            return None
        self.report(UserError(group, option, f"{group} has no option {option!r}", suggest(option, known)))
        return closest(option, known)

    # --- values

    def apply(self, config: DictConfig, override: Override) -> None:
        """Sets one value as Hydra does; a new option of a target is set too, for its signature to judge."""
        key, value = override.key_or_group, override.value()
        node, path, lacking = _deepest(config, key)
        # An empty mapping within a group, such as encoder.options, takes any key; nothing that is Hydra's does.
        takes_more = isinstance(node, DictConfig) and ("_target_" in node or (not node and "." in path))
        is_open = takes_more and not key.startswith("hydra.")
        if override.type is OverrideType.CHANGE and is_open and (lacking or isinstance(value, dict)):
            OmegaConf.update(config, key, value, force_add=True)
            self.added.add(key)
            return
        if lacking and override.type in (OverrideType.CHANGE, OverrideType.DEL):
            self.report(UserError(key, value, *self.unknown_key(config, node, path, lacking)))
            return
        try:
            ConfigLoaderImpl._apply_overrides_to_config([override], config)
        except COMPOSITION_ERRORS as error:
            self.report(composition_problem(error, key, value))

    def unknown_key(self, config: DictConfig, node: Any, path: str, lacking: str) -> tuple[str, str]:
        """What is wrong with a key that the configuration lacks, and what to write."""
        if not path:
            names = dict.fromkeys([*map(str, config.keys()), *self.loader.list_groups("")])
            known = [name for name in names if name != "hydra"]
            return f"there is no group or option {lacking!r}", suggest(lacking, known)
        wrong, known = f"{path} has no option {lacking!r}", self.options(path)
        if isinstance(node, DictConfig) and node:
            adding = f"; to add an option, write +{path}.{lacking}=VALUE"
            return wrong, suggest(lacking, map(str, node.keys())) + adding
        return wrong, f"choose one first: {path}={' | '.join(known)}" if known else f"write {path}=VALUE"


def _is_search_path(override: Override) -> bool:
    return override.key_or_group == "hydra.searchpath"


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else ["null" if value is None else value]


def _deepest(config: DictConfig, key: str) -> tuple[Any, str, str]:
    """The deepest node on the way to a key, its path, and the first name it lacks: '' where all is there."""
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


def _unreadable(text: str) -> UserError:
    key, equals, value = text.partition("=")
    if not equals:
        return UserError(key, "", "no value is given", f"write {key}=VALUE")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    quoted = shlex.quote(f'{key}="{escaped}"')
    return UserError(key, value, "this has characters with a meaning of their own", f"quote it: {quoted}")


def inherit_run(config: DictConfig, overrides: list[str]) -> None:
    """What a run was trained on and how it is scored comes from its `config.yaml`, unless the command line says otherwise.

    Concerns the tasks that take `checkpoint=RUN`; overrides are those of the command line.
    """
    stored = config_of(str(config.checkpoint))
    if config.task == "train" or not stored.is_file():
        return
    of_run = OmegaConf.load(stored)
    assert isinstance(of_run, DictConfig)
    parsed = OverridesParser.create().parse_overrides(overrides)
    chosen = {override.key_or_group for override in parsed}
    for key in INHERITED:
        if key in of_run and key not in chosen and "experiment" not in chosen:
            config[key] = of_run[key]
    config.data.update({name: config[of_root] for name, of_root in OF_ROOT.items() if name in config.data})
    for override in parsed:
        if override.key_or_group.split(".")[0] in INHERITED and "." in override.key_or_group:
            OmegaConf.update(config, override.key_or_group, override.value(), force_add=True)
