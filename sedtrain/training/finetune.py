"""Which weights move, when, and how fast."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.optim import Optimizer

from sedtrain.errors import UserError, require
from sedtrain.models.lora import adapt, merge
from sedtrain.models.parts import PARTS, depths, part_of, selected
from sedtrain.training.optim import parameter_groups


@dataclass(frozen=True)
class PartPlan:
    """What a part of the model does in training.

    num_trainable: parameters that move, some of them later
    learning_rates: their peaks, in rising order
    steps: after how many steps they begin to move, in rising order
    """

    name: str
    num_trainable: int
    num_frozen: int
    learning_rates: tuple[float, ...]
    steps: tuple[int, ...]


class FineTuning(lightning.Callback):
    """Keeps weights as they are, for a while or for good: no gradient, and evaluation mode where all of a module rests.

    Names are those of parts (encoder, adapter, cross_attention, decoder without it, ctc_head), of kinds that lie in them
    (feature_encoder, encoder_self_attention, decoder_self_attention, layer_norms) or of submodules (encoder.layers.0).

    frozen: what never moves
    thaw: what moves after so many steps; where names overlap, a weight waits for the last of them
    moving: what moves from the start although a name in `frozen` or `thaw` holds it
    learning_rates: by how much a part's learning rate is that of the optimizer
    layer_decay: the learning rate of a layer of encoder or decoder over that of the layer above it
    """

    def __init__(
        self,
        frozen: Sequence[str] = (),
        thaw: Mapping[str, int] | None = None,
        moving: Sequence[str] = (),
        learning_rates: Mapping[str, float] | None = None,
        layer_decay: float = 1.0,
    ) -> None:
        self.frozen, self.thaw, self.moving = list(frozen), dict(thaw or {}), list(moving)
        self.learning_rates, self.layer_decay = dict(learning_rates or {}), layer_decay
        self.starts: dict[str, int] = {}
        self.scales: dict[str, float] = {}
        self.resting: list[nn.Module] = []
        for name, step in self.thaw.items():
            require(step >= 0, f"finetune.thaw.{name}", step, "a number of steps, 0 or more")
        for name, rate in self.learning_rates.items():
            require(rate > 0, f"finetune.learning_rates.{name}", rate, "above 0; what is to rest is in finetune.frozen")
            if name not in PARTS:
                raise UserError(
                    f"finetune.learning_rates.{name}: this is no part of a model", f"a name among {', '.join(PARTS)}"
                )
        require(0 < layer_decay <= 1, "finetune.layer_decay", layer_decay, "a fraction above 0, at most 1")

    def prepare(self, model: nn.Module) -> None:
        """Settles what moves, and stops the gradient of what does not move yet.

        What the model has frozen itself, since no forward uses it, never moves. Raises UserError for names that the model
        does not have, and where nothing would move.
        """
        movable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        frozen = {name for each in self.frozen for name in selected(model, each, "finetune.frozen")}
        starts = dict.fromkeys(movable - frozen, 0)
        for part, step in self.thaw.items():
            for name in selected(model, part, f"finetune.thaw.{part}") & starts.keys():
                starts[name] = max(starts[name], step)
        for part in self.moving:
            starts |= dict.fromkeys(selected(model, part, "finetune.moving") & movable, 0)
        if not starts:
            raise UserError(
                f"finetune: nothing in this model would move, with {', '.join(self.frozen)} frozen"
                + ("" if any(part_of(name) == "adapter" for name in movable) else "; it has no adapter"),
                "finetune=all, or an adapter that has weights, such as adapter=conv",
            )
        if min(starts.values()) > 0:
            raise UserError(
                f"finetune.thaw: nothing would move before step {min(starts.values())}",
                "finetune.moving=[PART], with a part that moves from the start",
            )
        self.starts, self.scales = starts, self.learning_rate_scales(model, starts)
        for name in movable:
            model.get_parameter(name).requires_grad_(starts.get(name) == 0)

    def learning_rate_scales(self, model: nn.Module, names: Mapping[str, int]) -> dict[str, float]:
        """By how much the learning rate of each parameter is that of the optimizer."""
        depth_of = dict(depths(model)) if self.layer_decay != 1 else {}
        return {
            name: self.learning_rates.get(part_of(name), 1.0) * self.layer_decay ** depth_of.get(name, 0)
            for name in names
        }

    def grouped(self, model: nn.Module) -> list[dict[str, Any]]:
        """The parameters that move now or later as groups: a checkpoint of any step fits the optimizer of any other."""
        return parameter_groups(model, self.scales)

    def finish(self, model: nn.Module) -> None:
        """What is left to do once training is over and the best weights are in the model: nothing."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.unfreeze(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: object
    ) -> None:
        if trainer.global_step in self.starts.values():
            self.unfreeze(trainer, pl_module)
        for module in self.resting:
            module.eval()

    def unfreeze(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Gives their gradient to the weights whose step has come, which follows from the number of steps alone.

        DistributedDataParallel reduces what had a gradient when it was made, so a new one is made around the module: then
        nothing is reduced in vain before, and nothing is left out after. All ranks come here at the same step.
        """
        model: Any = pl_module.model
        due = [model.get_parameter(name) for name, step in self.starts.items() if step <= trainer.global_step]
        asleep = [weight for weight in due if not weight.requires_grad]
        for weight in asleep:
            weight.requires_grad_(True)
        if asleep and isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy.model = pl_module
            trainer.strategy.configure_ddp()
        model.train()
        self.resting = list(resting(model))

    def plan(self, model: nn.Module, optimizer: Optimizer) -> list[PartPlan]:
        """What each part does, with the learning rates that the optimizer has for it."""
        rates = {id(weight): group["initial_lr"] for group in optimizer.param_groups for weight in group["params"]}
        plans = []
        for part in dict.fromkeys([*PARTS, *(part_of(name) for name, _ in model.named_parameters())]):
            weights = {name: weight for name, weight in model.named_parameters() if part_of(name) == part}
            moving = {name: weight for name, weight in weights.items() if name in self.starts}
            num_moving = sum(weight.numel() for weight in moving.values())
            num_frozen = sum(weight.numel() for weight in weights.values()) - num_moving
            if weights:
                own_rates = tuple(sorted({rates[id(weight)] for weight in moving.values()}))
                steps = tuple(sorted({self.starts[name] for name in moving}))
                plans.append(PartPlan(part, num_moving, num_frozen, own_rates, steps))
        return plans


def resting(module: nn.Module) -> Iterator[nn.Module]:
    """The largest modules in `module` that have weights of which none has a gradient."""
    weights = list(module.parameters())
    if weights and not any(weight.requires_grad for weight in weights):
        yield module
        return
    for child in module.children():
        yield from resting(child)


class LoRA(FineTuning):
    """Leaves what is frozen as it is and learns a matrix of low rank to add to each of its linear layers.

    targets: where those layers are: names of parts, kinds or submodules
    rank: of the added matrices; alpha / rank is what they are multiplied with
    merge: whether the saved model has the sums, or its old weights and the added ones beside them in `adapter/`
    """

    def __init__(
        self,
        targets: Sequence[str],
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        merge: bool = True,
        frozen: Sequence[str] = (),
        thaw: Mapping[str, int] | None = None,
        moving: Sequence[str] = (),
        learning_rates: Mapping[str, float] | None = None,
        layer_decay: float = 1.0,
    ) -> None:
        super().__init__(frozen, thaw, moving, learning_rates, layer_decay)
        require(rank >= 1, "finetune.rank", rank, "1 or more")
        require(alpha > 0, "finetune.alpha", alpha, "above 0")
        require(0 <= dropout < 1, "finetune.dropout", dropout, "a fraction from 0 to below 1")
        self.targets, self.rank, self.alpha, self.dropout, self.merge = list(targets), rank, alpha, dropout, merge

    def prepare(self, model: nn.Module) -> None:
        """Adds the matrices, then settles what moves. Raises UserError where peft is not installed or finds no layer."""
        adapt(model, self.targets, self.rank, self.alpha, self.dropout)
        super().prepare(model)

    def finish(self, model: nn.Module) -> None:
        if self.merge:
            merge(model)
