"""From a node of the configuration to the object that it describes; what the object refuses becomes a ConfigError."""

import logging
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from sedtrain.config.schema import first_line
from sedtrain.errors import ConfigError, Problem, UserError

logger = logging.getLogger(__name__)

REFUSALS = (ValueError, TypeError, ImportError, MisconfigurationException)
AS_CODE = re.compile(r"`(\w+)|\b(\w+)=|\b(\w+_\w+)\b")


def create(cfg: DictConfig, path: str) -> Any:
    """The object of the `_target_` node at the dotted `path`, or its partial.

    Raises ConfigError for values that it refuses, now or when the partial is called; a UserError comes out as it is.
    """
    node = OmegaConf.select(cfg, path)
    made = _guarded(cfg, path, instantiate, node, _convert_="all")
    is_partial = isinstance(node, DictConfig) and node.get("_partial_", False)
    return partial(_guarded, cfg, path, made) if is_partial else made


def import_target(cfg: DictConfig, path: str) -> None:
    """Imports what the node at `path` names, without making it."""
    _guarded(cfg, path, get_object, OmegaConf.select(cfg, path)["_target_"])


def _guarded(cfg: DictConfig, path: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except (InstantiationException, *REFUSALS) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if isinstance(cause, UserError):
            raise cause from None
        if not isinstance(cause, REFUSALS):
            raise
        logger.debug("%s is refused", path, exc_info=cause)
        raise ConfigError([_refusal(cfg, path, cause)]) from error


def _refusal(cfg: DictConfig, path: str, error: BaseException) -> Problem:
    """The problem at the option that the error speaks of, else at the whole node."""
    node = OmegaConf.select(cfg, path)
    options = dict(_options(OmegaConf.to_container(node, resolve=True), path))
    wrong, target = first_line(error), str(node.get("_target_", path))
    option = _mentioned(options, wrong)
    name = target.rpartition(".")[2]
    if option is None:
        return Problem(path, target, wrong, f"write values that {name} takes, such as {path}.OPTION=VALUE")
    return Problem(option, options[option], wrong, f"write {option}=VALUE that {name} takes")


def _options(node: Any, path: str) -> Iterator[tuple[str, object]]:
    """Every plain value below a node, by its path."""
    if not isinstance(node, dict):
        yield path, node
        return
    for key, value in node.items():
        if not str(key).startswith("_"):
            yield from _options(value, f"{path}.{key}")


def _mentioned(options: dict[str, object], text: str) -> str | None:
    """The first option that a text names as code, else the first whose value, and no other's, is a word of it."""
    for found in AS_CODE.finditer(text):
        for option in options:
            if option.rpartition(".")[2] in found.groups():
                return option
    for word in re.findall(r"[\w.+-]*\w", text):
        holders = [option for option, value in options.items() if str(value) == word and not isinstance(value, bool)]
        if len(holders) == 1:
            return holders[0]
    return None
