"""A trial of a new encoder or decoder: values of its configuration may build a model that is too large or computes nothing."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from transformers import PreTrainedConfig, PreTrainedModel

from sedtrain.errors import UserError
from sedtrain.models.loading import UNBUILDABLE, one_line

ON_CPU = (None, "sdpa", "eager")  # attention implementations that compute there
MOST_TENSORS = 50_000  # of a model; a thousand layers have about 20,000
PASSED: set[str] = set()  # configurations, as they are written into files
Build = Callable[[PreTrainedConfig], PreTrainedModel]


def tried(
    option: str, value: object, config: PreTrainedConfig, build: Build, run: Callable[[PreTrainedModel], Any]
) -> PreTrainedModel:
    """The model with random weights. Raises UserError where these take more than the memory, or a first forward fails.

    option, value: what the user may have chosen of the configuration
    run: a forward of the model, on the CPU
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
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def refuse_sizes(option: str, value: object, config: PreTrainedConfig, build: Build) -> None:
    """Raises UserError where the tensors of a model, in float32, take more than the memory, are too many, or have no number.

    Nothing is allocated.
    """
    size, number, most = 0, 0, memory()

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal size, number
        number += 1
        if number > MOST_TENSORS:
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
        for each in registered:
            each.remove()
