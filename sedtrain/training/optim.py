"""Parameter groups, optimizers and learning-rate schedules."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from sedtrain.annotations import checked
from sedtrain.errors import UserError
from sedtrain.ranges import CountOrZero, Fraction, FractionBelowOne, NonNegative, Positive, PositiveFraction


def parameter_groups(model: nn.Module, scales: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """Groups of parameters, each with one `lr_scale` and either with or without weight decay.

    scales: parameter name -> factor of the optimizer's learning rate; None: 1 for each parameter with a gradient
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
    """True if weight decay applies: to matrices, but not to vectors, norms and biases (which may be matrices)."""
    return parameter.ndim > 1 and "bias" not in name.rpartition(".")[2]


def build_optimizer(factory: Callable[..., Optimizer], groups: Sequence[dict[str, Any]]) -> Optimizer:
    """The optimizer of these groups; `lr_scale` multiplies the learning rate of each."""
    optimizer = factory(groups)
    for group in optimizer.param_groups:
        group["lr"] *= group.pop("lr_scale", 1.0)
    # A fused optimizer would itself unscale the gradients of mixed precision, but only after clipping.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


@checked("optimizer.")
def adamw_8bit(
    params: Any,
    lr: NonNegative,
    betas: Sequence[FractionBelowOne] = (0.9, 0.98),
    eps: Positive = 1e-8,
    weight_decay: NonNegative = 0.01,
) -> Optimizer:
    """AdamW with both moments in 8 bits (arXiv 2110.02861). Raises UserError if bitsandbytes is not installed."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        write = "pip install 'sedtrain[bitsandbytes]', or write optimizer=adafactor, which is small too"
        python = "pip install 'sedtrain[bitsandbytes]'"
        raise UserError("optimizer", "adamw_8bit", f"this needs bitsandbytes: {error}", write, python) from error
    optimizer: Optimizer = AdamW8bit(params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)
    return optimizer


@checked("scheduler.")
def warmed_up(
    optimizer: Optimizer,
    num_training_steps: CountOrZero,
    decay: Literal["cosine", "linear", "constant_with_warmup", "inverse_sqrt"] = "cosine",
    warmup_fraction: Fraction = 0.1,
) -> LRScheduler:
    """Linear warm-up to the peak over the first `warmup_fraction` of the steps, then the decay."""
    num_warmup_steps = round(warmup_fraction * num_training_steps)
    schedule: LRScheduler = get_scheduler(decay, optimizer, num_warmup_steps, num_training_steps)
    return schedule


@checked("scheduler.")
def tri_stage(
    optimizer: Optimizer,
    num_training_steps: CountOrZero,
    warmup_fraction: Fraction = 0.1,
    hold_fraction: Fraction = 0.4,
    initial_scale: Fraction = 0.01,
    final_scale: PositiveFraction = 0.05,
) -> LRScheduler:
    """The schedule of wav2vec 2.0 (fairseq's `tri_stage`): linear warm-up, constant, exponential decay.

    The rate starts at `initial_scale` of the peak and ends at `final_scale` of it. The decay takes the steps that the first
    two stages leave. Raises UserError if these take more than all steps.
    """
    if warmup_fraction + hold_fraction > 1:
        most = f"{1 - warmup_fraction:g}"
        wrong = f"warmup_fraction={warmup_fraction:g} leaves only a fraction of {most} of the steps"
        raise UserError("scheduler.hold_fraction", hold_fraction, wrong, f"write a fraction from 0 to {most}")
    num_warmup = round(warmup_fraction * num_training_steps)
    num_decay = max(num_training_steps - num_warmup - round(hold_fraction * num_training_steps), 0)
    decay_start = num_training_steps - num_decay

    def scale(step: int) -> float:
        if step < num_warmup:
            return initial_scale + (1 - initial_scale) * step / num_warmup
        if step < decay_start:
            return 1.0
        if step >= num_training_steps:
            return final_scale
        return math.exp(math.log(final_scale) * (step - decay_start) / num_decay)

    return LambdaLR(optimizer, scale)
