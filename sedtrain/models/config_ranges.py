"""Checks the values of a family's configuration: each by the range of its default, all together by a trial run."""

import os
import re
from collections.abc import Callable, Mapping
from types import GenericAlias
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from transformers import PreTrainedConfig, PreTrainedModel

from sedtrain.annotations import Unknown, as_plain, in_words, is_of
from sedtrain.errors import UserError, one_line
from sedtrain.ranges import Count, CountOrZero, Fraction, FractionBelowOne, NonNegative, Range

DROPPED = re.compile("drop")
FRACTIONS = re.compile(r"_prob(_|$)")
MAY_BE_ZERO = re.compile(r"_ids?$|_tokens$|min_|chunk|offset|encoder_layers$|first_k|max_window")
LAYERS = re.compile(r"layers?$")
NumLayers = Annotated[int, Range("a whole number from 1 to 1,000", low=1, high=1000)]
NumLayersOrZero = Annotated[int, Range("a whole number from 0 to 1,000", low=0, high=1000)]

UNBUILDABLE = (
    *(ValueError, ImportError, TypeError, RuntimeError),
    *(ArithmeticError, LookupError, AssertionError, AttributeError),
)
"""Exceptions that constructors in transformers raise for values that do not fit together."""
ON_CPU = (None, "sdpa", "eager")
"""Attention implementations that run on a CPU."""
MOST_TENSORS = 50_000
"""Largest number of tensors in a model; a thousand layers have about 20,000."""
PASSED: set[str] = set()
"""Configurations, as JSON, whose trial run has succeeded in this process."""
Build = Callable[[PreTrainedConfig], PreTrainedModel]


def refuse_impossible(part: str, given: Mapping[str, Mapping[str, Any]], defaults: Any) -> None:
    """Raises UserError for values that no model of the family can have.

    given: values by the option that holds them, such as {"options": {"hidden_size": 0}}
    defaults: the family's default configuration
    """
    errors = []
    for option, values in given.items():
        for name, value in values.items():
            if words := misfit(name, value, getattr(defaults, name, None)):
                path = f"{part}.{option}.{name}"
                errors.append(UserError(path, value, f"expected {words}", f"write {path}=VALUE, {words}"))
    if errors:
        raise UserError.all_of(errors)


def refuse_uneven(part: str, given: Mapping[str, Mapping[str, Any]], config: Any) -> None:
    """Raises UserError for a number of heads that does not divide the width; many families would fail in the first step."""
    width = getattr(config, "hidden_size", None) or 0
    for option, values in given.items():
        for name, value in values.items():
            if name.endswith("attention_heads") and value and width % value:
                path = f"{part}.{option}.{name}"
                most = max(heads for heads in range(1, min(value, width) + 1) if width % heads == 0)
                raise UserError(path, value, f"it does not divide the width, {width}", f"write {path}={most}")


def misfit(name: str, value: Any, default: Any) -> str | None:
    """The expected kind in words if the value does not fit it, else None."""
    kind = kind_of(name, default)
    may_be_null = default is None or kind not in (FractionBelowOne, Fraction)
    fits = kind is None or (value is None and may_be_null) or is_of(kind, as_plain(value))
    return None if fits else in_words(kind)


def kind_of(name: str, default: Any) -> Any:
    """The type or range of an attribute, by its name and default; None if any value fits."""
    if isinstance(default, bool | str):
        return type(default)
    if not isinstance(default, list | tuple):
        return range_of(name, default)
    alike = len({type(value) for value in default}) == 1 and not isinstance(default[0], list | tuple)
    return GenericAlias(list, (kind_of(name, min(default)) or Unknown,)) if alike else list


def range_of(name: str, default: Any) -> Any:
    """The range of a number, by its name and default; None if they imply none."""
    if isinstance(default, bool):
        return None
    if DROPPED.search(name):
        return FractionBelowOne
    if FRACTIONS.search(name):
        return Fraction
    if not isinstance(default, int | float) or default < 0:
        return None
    if isinstance(default, float):
        return NonNegative
    may_be_zero = default == 0 or MAY_BE_ZERO.search(name)
    if LAYERS.search(name):
        return NumLayersOrZero if may_be_zero else NumLayers
    return CountOrZero if may_be_zero else Count


# --- a trial of a new encoder or decoder


def tried(
    option: str, value: object, config: PreTrainedConfig, build: Build, run: Callable[[PreTrainedModel], Any]
) -> PreTrainedModel:
    """A model with random weights, after a trial run. Raises UserError if it exceeds the memory, or its forward pass fails.

    option, value: the part of the configuration that the user chose, for the error message
    run: runs the model once, on the CPU
    """
    key = f"{type(config).__name__} {config.to_json_string(use_diff=False)}"
    if key in PASSED:
        return build(config)
    with torch.random.fork_rng(devices=[]):
        refuse_sizes(option, value, config, build)
    model = build(config)
    if config._attn_implementation not in ON_CPU:
        return model
    was_training = model.training
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            run(model.eval())
    except UserError:
        raise
    except (MemoryError, *UNBUILDABLE) as error:
        reason = one_line(error, 160) or type(error).__name__
        wrong = f"these values build a model that fails in its first step: {reason}"
        raise UserError(option, value, wrong, f"write {option}.NAME=VALUE that fits the others") from error
    PASSED.add(key)
    return model.train(was_training)


def memory() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def refuse_sizes(option: str, value: object, config: PreTrainedConfig, build: Build) -> None:
    """Raises UserError if the tensors of a model, in float32, exceed the memory, are too many, or one of them is empty.

    Builds on the meta device, so nothing is allocated.
    """
    size, num_tensors, most = 0, 0, memory()

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal size, num_tensors
        num_tensors += 1
        if num_tensors > MOST_TENSORS:
            wrong = f"these values build a model of more than {MOST_TENSORS:,} tensors"
            raise UserError(option, value, wrong, f"write {option}.NAME=VALUE of a smaller model")
        if isinstance(tensor, nn.Parameter) and not tensor.numel():
            wrong = f"these values build a {type(module).__name__} whose {name} has the shape {tuple(tensor.shape)}"
            raise UserError(option, value, wrong, f"write {option}.NAME=VALUE that fits the others")
        size += 0 if tensor is None else 4 * tensor.numel()
        if size > most:
            wrong = f"weights of {size / 1e9:,.0f} GB or more, and this machine has {most / 1e9:,.0f} GB"
            raise UserError(option, value, wrong, f"write {option}.NAME=VALUE of a smaller model")

    registered = [
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
    ]
    try:
        with torch.device("meta"):
            build(config)
    finally:
        for hook in registered:
            hook.remove()
