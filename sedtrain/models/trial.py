"""A trial of a new encoder or decoder: values of its configuration may build a model that is too large or computes nothing.

B batch, S samples, T frames, U tokens.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import PreTrainedConfig, PreTrainedModel

from sedtrain.errors import UserError
from sedtrain.models.loading import UNBUILDABLE, one_line

GIGABYTE = 1e9
ON_CPU = (None, "sdpa", "eager")  # attention implementations that compute there
PASSED: set[str] = set()  # configurations, as they are written into files


def tried(
    part: str,
    config: PreTrainedConfig,
    options: Any,
    build: Callable[[PreTrainedConfig], PreTrainedModel],
    run: Callable[[PreTrainedModel], Any],
) -> PreTrainedModel:
    """The model with random weights. Raises UserError where these take more than the memory, or a first forward fails.

    options: what the user has chosen of the configuration
    run: a forward of the model, on the CPU
    """
    key = f"{part} {type(config).__name__} {config.to_json_string(use_diff=False)}"
    refuse = partial(UserError, f"{part}.options", options)
    write = f"write {part}.options.NAME=VALUE"
    with torch.random.fork_rng(devices=[]):
        if key not in PASSED and (size := bytes_of(build, config)) > memory():
            wrong = f"weights of {size / GIGABYTE:,.0f} GB or more, and this machine has {memory() / GIGABYTE:,.0f} GB"
            raise refuse(wrong, f"{write} of a smaller model")
    model = build(config)
    if key in PASSED or config._attn_implementation not in ON_CPU:
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
        raise refuse(wrong, f"{write} that fits the others") from error
    PASSED.add(key)
    return model.train(was_training)


def memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class TooLarge(Exception):
    """The model takes more than the memory."""


def bytes_of(build: Callable[[PreTrainedConfig], PreTrainedModel], config: PreTrainedConfig) -> int:
    """Bytes of the tensors in float32, computed without allocating them; counting ends beyond the memory."""
    size = 0

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal size
        size += 0 if tensor is None else 4 * tensor.numel()
        if size > memory():
            raise TooLarge

    hooks = register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)
    try:
        with torch.device("meta"):
            build(config)
    except TooLarge:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return size
