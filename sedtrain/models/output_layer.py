"""The decoder's output layer, which training runs on labelled positions only.

B batch, U target tokens, D decoder width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

# The families whose logits are what their output layer returns, nothing after it. Others compute every logit.
ENDS_WITH_OUTPUT_LAYER = {
    "bart", "bert", "bert-generation", "blenderbot", "blenderbot-small", "camembert", "data2vec-text", "electra", "ernie",
    "gpt2", "marian", "mbart", "pegasus", "plbart", "rembert", "roberta", "trocr", "xglm", "xlm-roberta", "xmod",
}  # fmt: skip


class DeferrableLinear(nn.Linear):
    """A linear layer that can be told to hand its input through."""

    deferred: bool = False

    def forward(self, input: Tensor) -> Tensor:
        return input if self.deferred else super().forward(input)

    def outputs(self, input: Tensor) -> Tensor:
        """What the layer gives when it is not deferred."""
        return super().forward(input)


def make_deferrable(decoder: PreTrainedModel) -> None:
    """Swaps the class of the decoder's output layer, where it is a plain linear one; parameters and names stay."""
    layer = decoder.get_output_embeddings()
    if decoder.config.model_type in ENDS_WITH_OUTPUT_LAYER and type(layer) is nn.Linear:
        layer.__class__ = DeferrableLinear


@contextmanager
def deferred_output_layer(decoder: PreTrainedModel, deferred: bool) -> Iterator[DeferrableLinear | None]:
    """While it lasts, the decoder's "logits" are the (B, U, D) inputs of the layer that it yields.

    It yields None, and the logits are logits, where not `deferred` or where the decoder's output layer cannot be.
    """
    layer = decoder.get_output_embeddings()
    if not deferred or not isinstance(layer, DeferrableLinear):
        yield None
        return
    layer.deferred = True
    try:
        yield layer
    finally:
        layer.deferred = False
