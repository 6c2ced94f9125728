"""Hydra's `compose`, which composes the option files of this repository once for each list of choices: no test changes them.

And OmegaConf parses each reference, such as `${size}`, once.
"""

import copy
import functools
from pathlib import Path

import hydra
import omegaconf.base
from hydra.core.global_hydra import GlobalHydra

OPTION_FILES = ["pkg://hydra.conf", str(Path(__file__).parents[1] / "conf"), "structured://"]
compose = hydra.compose
known = {}


def compose_once(config_name=None, overrides=(), return_hydra_config=False, strict=None):
    """A copy of the configuration that `compose` gives, or gave; folders of a user's own are read each time."""
    overrides, files = list(overrides or ()), GlobalHydra.instance().config_loader().get_search_path().get_path()
    of_hydra = any(each.startswith(("hydra.searchpath", "hydra/launcher")) for each in overrides)
    if of_hydra or [each.path for each in files] != OPTION_FILES:
        return compose(config_name, overrides, return_hydra_config, strict)
    key = (config_name, *overrides, return_hydra_config)
    if key not in known:
        known[key] = compose(config_name, overrides, return_hydra_config, strict)
    return copy.deepcopy(known[key])


hydra.compose = compose_once
omegaconf.base.parse = functools.cache(omegaconf.base.parse)
