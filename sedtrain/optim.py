"""Parameter groups of the optimizer, and how its learning rate rises and falls."""

from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from sedtrain.batch import require


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The parameters that train, as two groups: matrices decay as the optimizer says, biases and norms never do."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1]},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


def warmed_up(
    optimizer: Optimizer,
    num_training_steps: int,
    decay: Literal["cosine", "linear", "constant_with_warmup"] = "cosine",
    warmup_fraction: float = 0.1,
) -> LRScheduler:
    """A straight line up to the peak over the first `warmup_fraction` of the steps, then the decay to zero, or none.

    Raises UserError for what is no fraction.
    """
    require(0 <= warmup_fraction <= 1, "scheduler.warmup_fraction", warmup_fraction, "a fraction from 0 to 1")
    num_warmup_steps = round(warmup_fraction * num_training_steps)
    schedule: LRScheduler = get_scheduler(decay, optimizer, num_warmup_steps, num_training_steps)
    return schedule
