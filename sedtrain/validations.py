"""When a training validates: between two steps of the optimizer, after every so many of them."""

import sys
from typing import Any

import lightning

NEVER = sys.maxsize  # batches, of which Lightning counts as many from one validation to the next


class ValidateEvery(lightning.Callback):
    """Has Lightning validate after every so many steps of the optimizer; a training of fewer does at its end.

    Lightning counts batches. An epoch's last step may be made of fewer than the others, by which validations would fall into
    the middle of steps: the weights that are kept would not be those that were scored.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps, self.last_step = num_steps, 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.num_steps = min(self.num_steps, int(min(trainer.estimated_stepping_batches, NEVER)))
        self.last_step = trainer.global_step

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        """Lightning asks next whether its count of batches is a multiple of `val_check_batch`."""
        has_stepped = trainer.global_step != self.last_step
        is_due = has_stepped and trainer.global_step % self.num_steps == 0
        trainer.val_check_batch = 1 if is_due else NEVER
        self.last_step = trainer.global_step
