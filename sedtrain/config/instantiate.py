"""Makes the object that a node of the configuration describes; its refusals become UserErrors."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from sedtrain.config.schema import first_line
from sedtrain.errors import UserError

REFUSALS = (ValueError, TypeError, ImportError)

logger = logging.getLogger(__name__)


def create(cfg: DictConfig, path: str) -> Any:
    """The object of the node at the dotted `path`, or a partial if the node says `_partial_`.

    Raises UserError for values that the target refuses, now or when the partial is called.
    """
    node = OmegaConf.select(cfg, path)
    made = guarded(node, path, instantiate, node, _convert_="all")
    is_partial = isinstance(node, DictConfig) and node.get("_partial_", False)
    return partial(guarded, node, path, made) if is_partial else made


def import_target(cfg: DictConfig, path: str) -> None:
    """Imports the target of the node at `path`, without calling it."""
    node = OmegaConf.select(cfg, path)
    guarded(node, path, get_object, node["_target_"])


def guarded(node: Any, path: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls the function; a refusal that is not yet a UserError becomes one at `path`."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        cause = (isinstance(error, InstantiationException) and error.__cause__) or error
        if isinstance(cause, UserError):
            raise cause from None
        if not isinstance(cause, REFUSALS) and type(cause).__name__ != "MisconfigurationException":  # Lightning's
            raise
        logger.debug("%s is refused", path, exc_info=cause)
        target = str(node.get("_target_", path))
        write = f"write values that {target.rpartition('.')[2]} takes, such as {path}.OPTION=VALUE"
        raise UserError(path, target, first_line(cause), write) from error
