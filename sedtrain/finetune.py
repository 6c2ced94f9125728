"""Which weights move."""

from collections.abc import Sequence

import lightning
from torch import nn

from sedtrain.batch import UserError


class Freeze(lightning.Callback):
    """Keeps parts of the model as they are: no gradient, and evaluation mode, so that dropout does not act in them.

    parts: names of submodules of the model, such as `encoder`, `encoder.feature_extractor`, `decoder`
    """

    def __init__(self, parts: Sequence[str] = ()) -> None:
        self.parts = list(parts)

    def freeze(self, model: nn.Module) -> None:
        """Raises UserError for a part that the model does not have."""
        for name in self.parts:
            try:
                model.get_submodule(name).requires_grad_(False)
            except AttributeError:
                there = ", ".join(child for child, _ in model.named_children())
                raise UserError(
                    f"finetune.parts: the model has no part {name!r}, it has {there} and what is in them",
                    "finetune=all, or the names of parts that are there",
                ) from None

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: object
    ) -> None:
        for name in self.parts:
            pl_module.get_submodule(f"model.{name}").eval()
