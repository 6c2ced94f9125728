"""Averages of weights: over the steps of training, and over its best validations. Where one is on, it is what is evaluated."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from sedtrain.batch import UserError, require


class EMA(WeightAveraging):
    """The exponential moving average of the weights, with which validation scores and which `best.ckpt` holds.

    decay: how much of the average a step leaves as it was; less at first, (1 + n) / (10 + n) after n steps, so that the
        average of a short training is not of its beginning
    """

    def __init__(self, decay: float = 0.999) -> None:
        require(0 < decay < 1, "callbacks.ema.decay", decay, "a number between 0 and 1")
        super().__init__(use_buffers=False, multi_avg_fn=self.update)  # buffers, such as positions, are copied
        self.decay = decay

    def update(self, averages: list[Tensor], weights: list[Tensor], num_averaged: Tensor) -> None:
        """In place. What does not move stays as it is to the last bit."""
        torch._foreach_lerp_(averages, weights, 1 - self.decay_after(int(num_averaged)))

    def decay_after(self, num_steps: int) -> float:
        return min(self.decay, (1 + num_steps) / (10 + num_steps))

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Raises UserError for weights of 16 bits, in which the average would stand still, and for weights in pieces."""
        precisions = {weight.dtype for weight in pl_module.parameters()} - {torch.float32, torch.float64}
        if precisions:
            raise UserError(
                f"callbacks.ema: weights in {precisions.pop()} are too coarse for an average that moves by small steps",
                "trainer.precision=bf16-mixed, or callbacks=default",
            )
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise UserError(
                "callbacks.ema: the moving average needs the weights in one piece, and this strategy cuts them",
                "strategy=ddp, or callbacks=[default,average]",
            )
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Nothing yet: the last checkpoint, written after this, has to hold the weights that training goes on from."""

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._copy_average_to_current(pl_module)


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
            weights = averaged_weights(trainer, pl_module)
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


def averaged_weights(trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, Tensor]:
    """The weights that validation scores: their moving average where there is one."""
    checkpoint = {"state_dict": trainer.strategy.lightning_module_state_dict()}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EMA):
            callback.on_save_checkpoint(trainer, pl_module, checkpoint)
    return checkpoint["state_dict"]


def mean_weights(states: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each weight over several states, summed in float64; whole numbers are those of the first state."""
    number, first, totals = 0, dict[str, Tensor](), dict[str, Tensor]()
    for state in states:
        number, first = number + 1, first or state
        for name, weight in state.items():
            if weight.is_floating_point():
                totals[name] = totals.get(name, 0) + weight.double()
    return {**first, **{name: (total / number).to(first[name].dtype) for name, total in totals.items()}}
