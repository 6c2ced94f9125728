"""Mixes classes into modules of `transformers`, in place: parameters keep their names."""

import copyreg
from functools import cache
from typing import Any


class Mixed(type):
    """The type of mixed classes; pickle stores such a class as its mixin and its base."""


@cache
def mixed(mixin: Any, kind: Any) -> Any:
    """A subclass of both that keeps the name of `kind`: transformers, FSDP and LoRA recognise layers by class name."""
    return Mixed(kind.__name__, (mixin, kind), {"__module__": kind.__module__})


def mix_into(module: Any, mixin: Any) -> None:
    """Makes a module an instance of `mixin` too, unless it is one."""
    if not isinstance(module, mixin):
        kind: Any = type(module)
        module.__class__ = mixed(mixin, kind)


copyreg.pickle(Mixed, lambda kind: (mixed, kind.__bases__))
