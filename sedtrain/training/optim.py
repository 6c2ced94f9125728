"""Parameter groups, optimizers, and how the learning rate rises and falls."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from sedtrain.errors import UserError, require


def parameter_groups(model: nn.Module, scales: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """Groups of parameters with one `lr_scale` each, matrices apart from what does not decay.

    scales: which parameters of the model, and by how much their learning rate is that of the optimizer; where it is None,
        those that train, all alike
    """
    if scales is None:
        scales = {name: 1.0 for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name in scales:
            groups.setdefault((scales[name], decays(name, parameter)), []).append(parameter)
    return [
        {"params": groups[scale, decay], "lr_scale": scale, **({} if decay else {"weight_decay": 0.0})}
        for scale, decay in sorted(groups, reverse=True)
    ]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay acts on a parameter: not on biases, which may be matrices, and not on norms and other vectors."""
    return parameter.ndim > 1 and "bias" not in name.rpartition(".")[2]


def build_optimizer(factory: Callable[..., Optimizer], groups: Sequence[dict[str, Any]]) -> Optimizer:
    """The optimizer of these groups, each at its share of the learning rate."""
    optimizer = factory(groups)
    for group in optimizer.param_groups:
        group["lr"] *= group.pop("lr_scale", 1.0)
    # A fused optimizer would unscale the gradients of mixed precision itself, after they are clipped.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def adamw_8bit(
    params: Any, lr: float, betas: Sequence[float] = (0.9, 0.98), eps: float = 1e-8, weight_decay: float = 0.01
) -> Optimizer:
    """AdamW with both moments in 8 bits (arXiv 2110.02861). Raises UserError where bitsandbytes is not installed."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"optimizer=adamw_8bit needs bitsandbytes: {error}",
            "pip install 'sedtrain[bitsandbytes]', or optimizer=adafactor, which is small too",
        ) from error
    optimizer: Optimizer = AdamW8bit(params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)
    return optimizer


def warmed_up(
    optimizer: Optimizer,
    num_training_steps: int,
    decay: Literal["cosine", "linear", "constant_with_warmup", "inverse_sqrt"] = "cosine",
    warmup_fraction: float = 0.1,
) -> LRScheduler:
    """A straight line up to the peak over the first `warmup_fraction` of the steps, then the decay, or none.

    Raises UserError for what is no fraction.
    """
    require(0 <= warmup_fraction <= 1, "scheduler.warmup_fraction", warmup_fraction, "a fraction from 0 to 1")
    num_warmup_steps = round(warmup_fraction * num_training_steps)
    schedule: LRScheduler = get_scheduler(decay, optimizer, num_warmup_steps, num_training_steps)
    return schedule


def tri_stage(
    optimizer: Optimizer,
    num_training_steps: int,
    warmup_fraction: float = 0.1,
    hold_fraction: float = 0.4,
    initial_scale: float = 0.01,
    final_scale: float = 0.05,
) -> LRScheduler:
    """The schedule of wav2vec 2.0 (fairseq's `tri_stage`): up in a straight line, level, down exponentially.

    The rate goes from `initial_scale` of the peak to the peak, and in the steps that the first two leave to `final_scale`
    of it. Raises UserError for fractions that leave no step to the end, and for scales that are none.
    """
    for name, fraction in {"warmup_fraction": warmup_fraction, "hold_fraction": hold_fraction}.items():
        require(0 <= fraction <= 1, f"scheduler.{name}", fraction, "a fraction from 0 to 1")
    rest = f"a fraction from 0 to {1 - warmup_fraction:g}, what warmup_fraction leaves of 1"
    require(warmup_fraction + hold_fraction <= 1, "scheduler.hold_fraction", hold_fraction, rest)
    require(0 <= initial_scale <= 1, "scheduler.initial_scale", initial_scale, "a fraction from 0 to 1")
    require(0 < final_scale <= 1, "scheduler.final_scale", final_scale, "a fraction above 0, at most 1")
    num_warmup_steps = round(warmup_fraction * num_training_steps)
    num_decay_steps = max(num_training_steps - num_warmup_steps - round(hold_fraction * num_training_steps), 0)
    scale = partial(
        tri_stage_scale,
        num_warmup_steps=num_warmup_steps,
        decay_start=num_training_steps - num_decay_steps,
        num_training_steps=num_training_steps,
        initial_scale=initial_scale,
        final_scale=final_scale,
    )
    return LambdaLR(optimizer, scale)


def tri_stage_scale(
    step: int,
    num_warmup_steps: int,
    decay_start: int,
    num_training_steps: int,
    initial_scale: float,
    final_scale: float,
) -> float:
    """The share of the peak learning rate after `step` steps."""
    if step < num_warmup_steps:
        return initial_scale + (1 - initial_scale) * step / num_warmup_steps
    if step < decay_start:
        return 1.0
    if step >= num_training_steps:
        return final_scale
    return math.exp(math.log(final_scale) * (step - decay_start) / (num_training_steps - decay_start))
