"""Averages of weights: over the steps of training, and over its best validations. Where one is on, it is what is evaluated."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from torch import Tensor

from sedtrain.errors import UserError, require

OWN_WEIGHTS = "current_model_state"
"""Where a checkpoint keeps the weights that training goes on from, whose average stands in their place."""


class EMA(lightning.Callback):
    """The exponential moving average of the weights, with which validation scores and which checkpoints hold as the weights.

    Lightning's own callback keeps a copy of the whole module, which cannot be cut along with it; here each rank averages
    the weights that it has.

    decay: how much of the average a step leaves as it was; less at first, (1 + n) / (10 + n) after n steps, so that the
        average of a short training is not of its beginning
    """

    def __init__(self, decay: float = 0.999) -> None:
        require(0 < decay < 1, "callbacks.ema.decay", decay, "a number between 0 and 1")
        self.decay = decay
        self.averages: list[Tensor] = []
        self.num_averaged = self.latest_step = 0
        self.is_in_place = False
        self.resumed: dict[str, Tensor] | None = None

    def decay_after(self, num_steps: int) -> float:
        return min(self.decay, (1 + num_steps) / (10 + num_steps)) if num_steps else 0.0

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Raises UserError for weights of 16 bits, in which the average would stand still."""
        precisions = {weight.dtype for weight in pl_module.parameters()} - {torch.float32, torch.float64}
        if precisions:
            raise UserError(
                f"callbacks.ema: weights in {precisions.pop()} are too coarse for an average that moves by small steps",
                "trainer.precision=bf16-mixed, or callbacks=default",
            )

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.averages = [weight.detach().clone() for weight in pl_module.parameters()]
        if self.resumed:
            trainer.strategy.load_model_state_dict({"state_dict": self.resumed})
            self.resumed = None

    @torch.no_grad()
    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        """After a step of the optimizer. What does not move stays as it is to the last bit."""
        if trainer.global_step > self.latest_step:
            torch._foreach_lerp_(self.averages, list(pl_module.parameters()), 1 - self.decay_after(self.num_averaged))
            self.num_averaged, self.latest_step = self.num_averaged + 1, trainer.global_step

    @torch.no_grad()
    def exchange(self, module: lightning.LightningModule) -> None:
        """Puts the average in the place of the weights, or back."""
        for weight, average in zip(module.parameters(), self.averages, strict=True):
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)
        self.is_in_place = not self.is_in_place

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.averages:
            self.exchange(pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.is_in_place:
            self.exchange(pl_module)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Not before the last checkpoint, which has to hold the weights that training goes on from."""
        if self.averages:  # a training that was at its end has made no step
            self.exchange(pl_module)

    def weights(self, trainer: lightning.Trainer) -> dict[str, Tensor]:
        """The whole average, as the state of the module; of weights in pieces on the first rank alone."""
        module = trainer.lightning_module
        was_in_place = self.is_in_place
        if not was_in_place:
            self.exchange(module)
        state = {name: value.clone() for name, value in trainer.strategy.lightning_module_state_dict().items()}
        if not was_in_place:
            self.exchange(module)
        return state

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[OWN_WEIGHTS] = checkpoint["state_dict"]
        checkpoint["state_dict"] = self.weights(trainer)

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """What the module has loaded is the average; its own weights follow when training starts."""
        self.resumed = checkpoint.get(OWN_WEIGHTS)

    def state_dict(self) -> dict[str, Any]:
        return {"num_averaged": self.num_averaged, "latest_step": self.latest_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_averaged, self.latest_step = state_dict["num_averaged"], state_dict["latest_step"]


class AverageBest(lightning.Callback):
    """Keeps the weights of the best validations in `average-STEP.ckpt`; their mean takes the place of the best weights.

    number: how many of them
    """

    def __init__(self, dirpath: str, monitor: str, mode: Literal["min", "max"], number: int = 5) -> None:
        require(number >= 1, "callbacks.average.number", number, "1 or more")
        self.folder, self.monitor, self.mode, self.number = Path(dirpath), monitor, mode, number
        self.scores: dict[str, float] = {}
        self.out_of_use: list[str] = []

    @property
    def paths(self) -> list[Path]:
        """The files of the best validations so far, the best first, of equal ones the earlier."""
        sign = 1 if self.mode == "min" else -1
        return [self.folder / name for name in sorted(self.scores, key=lambda name: sign * self.scores[name])]

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        score = float(trainer.callback_metrics.get(self.monitor, math.nan))
        if trainer.sanity_checking or trainer.state.fn != "fit" or not math.isfinite(score):
            return
        self.remove(trainer)
        name = f"average-{trainer.global_step}.ckpt"
        self.scores[name] = score
        for path in self.paths[self.number :]:
            self.out_of_use.append(path.name)
            del self.scores[path.name]
        if name in self.scores:
            weights = averaged_weights(trainer)
            trainer.strategy.save_checkpoint({"state_dict": weights}, self.folder / name)

    def remove(self, trainer: lightning.Trainer) -> None:
        """Removes files that are out of use since the validation before: a run that is resumed may know of them until then."""
        for name in set(self.out_of_use) - self.scores.keys():
            if (self.folder / name).exists() and trainer.is_global_zero:
                trainer.strategy.remove_checkpoint(self.folder / name)
        self.out_of_use = []

    def state_dict(self) -> dict[str, Any]:
        return {"scores": dict(self.scores), "out_of_use": list(self.out_of_use)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What lies in this run's folder; the files of another run do not count."""
        self.scores = {name: score for name, score in state_dict["scores"].items() if (self.folder / name).exists()}
        self.out_of_use = list(state_dict["out_of_use"])


def averaged_weights(trainer: lightning.Trainer) -> dict[str, Tensor]:
    """The weights that validation scores: their moving average where there is one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EMA):
            return callback.weights(trainer)
    return trainer.strategy.lightning_module_state_dict()


def mean_weights(states: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each weight over several states, summed in float64; whole numbers are those of the first state."""
    number, first, totals = 0, dict[str, Tensor](), dict[str, Tensor]()
    for state in states:
        number, first = number + 1, first or state
        for name, weight in state.items():
            if weight.is_floating_point():
                totals[name] = totals.get(name, 0) + weight.double()
    return {**first, **{name: (total / number).to(first[name].dtype) for name, total in totals.items()}}
