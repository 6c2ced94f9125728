"""Fine-tuning by matrices of low rank beside the weights, which stay as they are."""

from collections.abc import Mapping, Sequence

from torch import nn

from sedtrain.batch import require
from sedtrain.finetune import FineTuning
from sedtrain.models.low_rank import adapt, merge


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
