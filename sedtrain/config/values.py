"""Values of a composed configuration as plain Python, and errors as one line."""

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sedtrain.errors import UNSET


def plain(node: DictConfig, key: str) -> object:
    """A node's value as plain Python; UNSET where it is missing or refers to nothing yet."""
    try:
        value = UNSET if OmegaConf.is_missing(node, key) else node.get(key)
        is_node = isinstance(value, DictConfig | ListConfig)
        return OmegaConf.to_container(value, resolve=True) if is_node else value
    except (OmegaConfBaseException, RecursionError):
        return UNSET


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
