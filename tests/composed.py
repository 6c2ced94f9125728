"""Has Hydra read each option file of this repository, and merge those of a list of choices, once: no test changes them.

Values on the command line are set anew each time. What was read is kept pickled, since `deepcopy` takes three times as long.
And OmegaConf parses each reference, such as `${size}`, once.
"""

import dataclasses
import functools
import os
import pickle
from pathlib import Path

import omegaconf.base
from hydra._internal import config_loader_impl as hydra
from hydra._internal.config_repository import ConfigRepository

OPTION_FILES = os.path.realpath(Path(__file__).parents[1] / "conf")
Loader = hydra.ConfigLoaderImpl
list_of_files, merged = hydra.create_defaults_list, Loader._compose_config_from_defaults_list
load = ConfigRepository.load_config
files, lists, configurations = {}, {}, {}  # by path, by choices, by the list's identity


def is_ours(sources):
    """Whether only these option files are searched, not those of a user too."""
    folders = [each.path for each in sources if each.scheme() == "file"]
    return [os.path.realpath(each) for each in folders] == [OPTION_FILES]


def load_once(self, config_path):
    if not is_ours(self.sources) or config_path.startswith("hydra/launcher"):
        return load(self, config_path)
    if config_path not in files:
        files[config_path] = pickle.dumps(load(self, config_path))
    return pickle.loads(files[config_path])


def list_of_files_once(repo, config_name, overrides_list, prepend_hydra, skip_missing):
    """The files that choices lead to; values on the command line lead to none."""
    options = {"config_name": config_name, "prepend_hydra": prepend_hydra, "skip_missing": skip_missing}
    single = [each for each in overrides_list if not each.is_sweep_override()]
    values = [each for each in single if isinstance(each.value(), dict) or not repo.group_exists(each.key_or_group)]
    choices = [each for each in single if each not in values]
    if not is_ours(repo.get_sources()) or any(each.key_or_group == "hydra/launcher" for each in choices):
        return list_of_files(repo=repo, overrides_list=overrides_list, **options)
    key = (*options.values(), *(each.input_line for each in choices))
    if key not in lists:
        lists[key] = list_of_files(repo=repo, overrides_list=choices, **options)
    return dataclasses.replace(lists[key], config_overrides=values)


def merged_once(self, defaults, repo):
    """The configuration of files listed by `list_of_files_once`, where it was merged before."""
    if not any(each.defaults is defaults for each in lists.values()):
        return merged(self, defaults, repo)
    if id(defaults) not in configurations:
        configurations[id(defaults)] = pickle.dumps(merged(self, defaults, repo))
    return pickle.loads(configurations[id(defaults)])


ConfigRepository.load_config = load_once
hydra.create_defaults_list = list_of_files_once
Loader._compose_config_from_defaults_list = merged_once
omegaconf.base.parse = functools.cache(omegaconf.base.parse)
