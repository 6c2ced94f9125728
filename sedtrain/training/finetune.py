"""Fine-tuning: decides which weights move, from which step on, at which learning rate."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.optim import Optimizer

from sedtrain.annotations import checked
from sedtrain.errors import UserError
from sedtrain.models.lora import adapt, merge
from sedtrain.models.parts import PARTS, depths, part_of, selected
from sedtrain.ranges import CountOrZero, FractionBelowOne, Positive, PositiveFraction, UpTo1000
from sedtrain.training.optim import parameter_groups


@dataclass(frozen=True)
class PartPlan:
    """Plan for training one part of the model.

    num_trainable:  parameters that move now or later
    learning_rates: distinct peak learning rates, in rising order
    steps:          distinct steps from which parameters move, in rising order
    """

    name: str
    num_trainable: int
    num_frozen: int
    learning_rates: tuple[float, ...]
    steps: tuple[int, ...]


class FineTuning(Callback):
    """Freezes weights for some steps or for good. They have no gradient; wholly frozen modules are in eval mode.

    A name is a part (encoder, adapter, cross_attention, decoder without its cross-attention, ctc_head), a kind of weights
    (feature_encoder, encoder_self_attention, decoder_self_attention, layer_norms) or a submodule (encoder.layers.0).

    frozen:         names that never move
    thaw:           name -> step from which it moves; a weight with several names waits for the latest
    moving:         names that move from the start, whatever `frozen` and `thaw` say
    learning_rates: part -> factor of the optimizer's learning rate
    layer_decay:    factor of the learning rate from a layer to the one below it, in encoder and decoder
    """

    @checked("finetune.")
    def __init__(
        self,
        frozen: Sequence[str] = (),
        thaw: Mapping[str, CountOrZero] | None = None,
        moving: Sequence[str] = (),
        learning_rates: Mapping[str, Positive] | None = None,
        layer_decay: PositiveFraction = 1.0,
    ) -> None:
        self.frozen, self.thaw, self.moving = list(frozen), dict(thaw or {}), list(moving)
        self.learning_rates, self.layer_decay = dict(learning_rates or {}), layer_decay
        self.starts: dict[str, int] = {}  # weight -> the step from which it moves
        self.scales: dict[str, float] = {}  # weight -> factor of the optimizer's learning rate
        self.frozen_modules: list[nn.Module] = []
        for name, rate in self.learning_rates.items():
            if name not in PARTS:
                option, known = f"finetune.learning_rates.{name}", ", ".join(PARTS)
                raise UserError(option, rate, "this is no part of a model", f"write the name of a part: {known}")

    def prepare(self, model: nn.Module) -> None:
        """Decides which weights move, and turns off the gradient of weights that do not move yet.

        Weights that the model itself has frozen, because no forward pass uses them, never move. Raises UserError for names
        that the model does not have, and if nothing would move.
        """
        movable = {name for name, weight in model.named_parameters() if weight.requires_grad}
        frozen = {weight for name in self.frozen for weight in selected(model, name, "finetune.frozen")}
        self.starts = dict.fromkeys(movable - frozen, 0)
        for name, step in self.thaw.items():
            for weight in selected(model, name, f"finetune.thaw.{name}") & self.starts.keys():
                self.starts[weight] = max(self.starts[weight], step)
        for name in self.moving:
            self.starts |= dict.fromkeys(selected(model, name, "finetune.moving") & movable, 0)
        self.refuse_standstill()
        depth_of = dict(depths(model)) if self.layer_decay != 1 else {}
        self.scales = {
            weight: self.learning_rates.get(part_of(weight), 1.0) * self.layer_decay ** depth_of.get(weight, 0)
            for weight in self.starts
        }
        for name in movable:
            model.get_parameter(name).requires_grad_(self.starts.get(name) == 0)

    def refuse_standstill(self) -> None:
        """Raises UserError if no weight would move at the first step."""
        if not self.starts:
            wrong = "this freezes every weight of the model: nothing would be trained"
            write = "write finetune=all, or an adapter that has weights, such as adapter=conv"
            python = "write fewer parts, or an adapter that has weights"
            raise UserError("finetune.frozen", self.frozen, wrong, write, python)
        if first := min(self.starts.values()):
            wrong, write = f"no weight would move before step {first}", "write finetune.moving=[PART]"
            ends = "with a part that moves from the start"
            raise UserError("finetune.thaw", self.thaw, wrong, f"{write}, {ends}", f"write moving=['PART'], {ends}")

    def grouped(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups of all weights that move now or later, so that a checkpoint fits the optimizer of any step."""
        return parameter_groups(model, self.scales)

    def finish(self, model: nn.Module) -> None:
        """Runs after training, when `model` holds the best weights; LoRA merges its matrices here."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.unfreeze(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step in self.starts.values():
            self.unfreeze(trainer, pl_module)
        for module in self.frozen_modules:
            module.eval()

    def unfreeze(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Turns on the gradient of the weights whose step has come: the same step on all ranks, also in a resumed run.

        DistributedDataParallel reduces the weights that had a gradient when it was built, so it is built anew here.
        """
        model: Any = pl_module.model
        due = [model.get_parameter(name) for name, step in self.starts.items() if step <= trainer.global_step]
        frozen = [weight for weight in due if not weight.requires_grad]
        for weight in frozen:
            weight.requires_grad_(True)
        if frozen and isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy.model = pl_module
            trainer.strategy.configure_ddp()
        model.train()
        self.frozen_modules = list(frozen_modules(model))

    def plan(self, model: nn.Module, optimizer: Optimizer) -> list[PartPlan]:
        """Plans of all parts, with the optimizer's learning rates."""
        rates = {id(weight): group["initial_lr"] for group in optimizer.param_groups for weight in group["params"]}
        weights = dict(model.named_parameters())
        plans = []
        for part in dict.fromkeys([*PARTS, *map(part_of, weights)]):
            names = [name for name in weights if part_of(name) == part]
            moving = [name for name in names if name in self.starts]
            num_moving, num_all = (sum(weights[name].numel() for name in some) for some in (moving, names))
            peaks = {rates[id(weights[name])] for name in moving}
            steps = {self.starts[name] for name in moving}
            if names:
                plans.append(PartPlan(part, num_moving, num_all - num_moving, (*sorted(peaks),), (*sorted(steps),)))
        return plans


def frozen_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The largest modules inside `module` whose weights are all frozen."""
    weights = list(module.parameters())
    if weights and not any(weight.requires_grad for weight in weights):
        yield module
        return
    for child in module.children():
        yield from frozen_modules(child)


class LoRA(FineTuning):
    """Trains low-rank matrices beside frozen linear layers (arXiv 2106.09685); `models.lora` adds, merges and saves them.

    targets: names of parts, kinds or submodules whose linear layers get such matrices
    rank:    of the matrices; their product is multiplied by alpha / rank
    merge:   True: saves one model with the sums; False: saves the old weights, and the matrices in its folder `adapter`
    """

    @checked("finetune.")
    def __init__(
        self,
        targets: Sequence[str],
        rank: UpTo1000 = 8,
        alpha: Positive = 16.0,
        dropout: FractionBelowOne = 0.0,
        merge: bool = True,
        frozen: Sequence[str] = (),
        thaw: Mapping[str, CountOrZero] | None = None,
        moving: Sequence[str] = (),
        learning_rates: Mapping[str, Positive] | None = None,
        layer_decay: PositiveFraction = 1.0,
    ) -> None:
        super().__init__(frozen, thaw, moving, learning_rates, layer_decay)
        self.targets, self.rank, self.alpha, self.dropout, self.merge = list(targets), rank, alpha, dropout, merge

    def prepare(self, model: nn.Module) -> None:
        """Adds the matrices first. Raises UserError also if peft is not installed or finds no layer."""
        adapt(model, self.targets, self.rank, self.alpha, self.dropout)
        super().prepare(model)

    def finish(self, model: nn.Module) -> None:
        if self.merge:
            merge(model)
