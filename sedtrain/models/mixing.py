"""Classes of `transformers` with a mixin of ours in front, made while a model is set up."""

import copyreg
from functools import cache
from typing import Any


class Mixed(type):
    """The type of such classes, which pickle makes again from their two parts."""


@cache
def mixed(mixin: Any, kind: Any) -> Any:
    """A subclass of both that keeps the name of `kind`: by names transformers, FSDP and LoRA know layers."""
    return Mixed(kind.__name__, (mixin, kind), {"__module__": kind.__module__})


def mix_into(module: Any, mixin: Any) -> None:
    """Makes the class of a module a subclass of `mixin` too, once."""
    if not isinstance(module, mixin):
        kind: Any = type(module)
        module.__class__ = mixed(mixin, kind)


copyreg.pickle(Mixed, lambda kind: (mixed, kind.__bases__))
