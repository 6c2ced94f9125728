"""Averages of the weights: over all steps (EMA), or over the best validations."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from sedtrain.annotations import checked
from sedtrain.errors import UserError
from sedtrain.ranges import Count, InnerFraction
from sedtrain.training.tracking import callbacks_of

OWN_WEIGHTS = "current_model_state"
"""Entry of an EMA checkpoint with the weights that training continues from; `state_dict` holds their average."""


class EMA(Callback):
    """The exponential moving average of the weights: validation scores it, and checkpoints hold it as the weights.

    Lightning's WeightAveraging copies the whole module, which then cannot be sharded. Here each rank averages its own
    shards.

    decay: fraction of the average that remains after a step; at most (1 + n) / (10 + n) after n steps, so that the first
        weights count little in a short run
    """

    @checked("callbacks.ema.")
    def __init__(self, decay: InnerFraction = 0.999) -> None:
        self.decay = decay
        self.averages: list[Tensor] = []
        self.num_averaged = self.latest_step = 0
        self.is_used = False
        self.resumed: dict[str, Tensor] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises UserError for 16-bit weights, in which small steps of the average round to nothing."""
        if coarse := {weight.dtype for weight in pl_module.parameters()} - {torch.float32, torch.float64}:
            wrong = f"weights in {coarse.pop()} are too coarse for an average that moves by small steps"
            write, python = "write trainer.precision=bf16-mixed, or callbacks=default", "write precision='bf16-mixed'"
            raise UserError("trainer.precision", trainer.precision, wrong, write, python)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.averages = [weight.detach().clone() for weight in pl_module.parameters()]
        if self.resumed:
            trainer.strategy.load_model_state_dict({"state_dict": self.resumed})
            self.resumed = None

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Averages after each optimizer step. Weights that do not move keep every bit."""
        if trainer.global_step > self.latest_step:
            number = self.num_averaged
            remaining = min(self.decay, (1 + number) / (10 + number)) if number else 0.0
            torch._foreach_lerp_(self.averages, list(pl_module.parameters()), 1 - remaining)
            self.num_averaged, self.latest_step = number + 1, trainer.global_step

    @torch.no_grad()
    def use(self, module: LightningModule, average: bool) -> None:
        """Swaps the average into the module, or the weights back."""
        if average == self.is_used:
            return
        for weight, other in zip(module.parameters(), self.averages, strict=True):
            before = weight.clone()
            weight.copy_(other)
            other.copy_(before)
        self.is_used = average

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.use(pl_module, average=bool(self.averages))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.use(pl_module, average=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the average in the module. Runs after the last checkpoint, which needs the weights themselves."""
        self.use(pl_module, average=bool(self.averages))  # a resumed run without steps left has no average

    def average(self, trainer: Trainer) -> dict[str, Tensor]:
        """The full average as a state of the module; with sharded weights, empty on all ranks but the first."""
        was_used = self.is_used
        self.use(trainer.lightning_module, average=True)
        state = {name: value.clone() for name, value in trainer.strategy.lightning_module_state_dict().items()}
        self.use(trainer.lightning_module, average=was_used)
        return state

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[OWN_WEIGHTS] = checkpoint["state_dict"]
        checkpoint["state_dict"] = self.average(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the weights themselves until training starts: the module has loaded their average."""
        self.resumed = checkpoint.get(OWN_WEIGHTS)

    def state_dict(self) -> dict[str, Any]:
        return {"num_averaged": self.num_averaged, "latest_step": self.latest_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_averaged, self.latest_step = state_dict["num_averaged"], state_dict["latest_step"]


class AverageBest(Callback):
    """Keeps the weights of the best `number` validations in `average-STEP.ckpt`; the final model is their mean."""

    @checked("callbacks.average.")
    def __init__(self, dirpath: str, monitor: str, mode: Literal["min", "max"], number: Count = 5) -> None:
        self.folder, self.monitor, self.mode, self.number = Path(dirpath), monitor, mode, number
        self.scores: dict[str, float] = {}

    @property
    def paths(self) -> list[Path]:
        """Files of the best validations so far, best first; ties in order of time."""
        sign = 1 if self.mode == "min" else -1
        return [self.folder / name for name in sorted(self.scores, key=lambda name: sign * self.scores[name])]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        score = float(trainer.callback_metrics.get(self.monitor, math.nan))
        if trainer.sanity_checking or trainer.state.fn != "fit" or not math.isfinite(score):
            return
        for path in {*self.folder.glob("average-*.ckpt")} - {*self.paths}:
            trainer.strategy.remove_checkpoint(path)  # only now: a run resumed earlier would have needed it
        name = f"average-{trainer.global_step}.ckpt"
        self.scores[name] = score
        for path in self.paths[self.number :]:
            del self.scores[path.name]
        if name in self.scores:
            self.save_scored_weights(trainer, self.folder / name)

    def save_scored_weights(self, trainer: Trainer, path: Path) -> None:
        """Saves the weights that validation scored: with EMA, their average."""
        averages = callbacks_of(trainer, EMA)
        weights = averages[0].average(trainer) if averages else trainer.strategy.lightning_module_state_dict()
        trainer.strategy.save_checkpoint({"state_dict": weights}, path)

    def state_dict(self) -> dict[str, Any]:
        return {"scores": dict(self.scores)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the scores whose files exist in this run's folder; another run's files lie elsewhere."""
        self.scores = {name: score for name, score in state_dict["scores"].items() if (self.folder / name).exists()}


def mean_weights(states: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each weight over several states, summed in float64; integer tensors come from the first state."""
    number, first, totals = 0, dict[str, Tensor](), dict[str, Tensor]()
    for state in states:
        number, first = number + 1, first or state
        for name, weight in state.items():
            if weight.is_floating_point():
                totals[name] = totals.get(name, 0) + weight.double()
    return {**first, **{name: (total / number).to(first[name].dtype) for name, total in totals.items()}}
