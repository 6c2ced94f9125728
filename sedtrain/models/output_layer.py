"""The decoder's output layer on labelled positions only, and its loss.

B batch, U target tokens, N labelled positions, D decoder width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sedtrain.batch import IGNORE_INDEX
from sedtrain.models.losses import token_cross_entropy
from sedtrain.models.products import add_product, product

AT_ONCE = 2**18
"""Logits that become gradients at once on a CPU: a megabyte, which stays in the processor's cache."""

# The families whose logits are what their output layer returns, nothing after it. For others every logit is computed.
ENDS_WITH_OUTPUT_LAYER = {
    "bart", "bert", "bert-generation", "blenderbot", "blenderbot-small", "camembert", "data2vec-text", "electra", "ernie",
    "gpt2", "marian", "mbart", "pegasus", "plbart", "rembert", "roberta", "speech_to_text_2", "trocr", "xglm", "xlm-roberta",
    "xmod", "gemma", "gpt_neo", "llama", "mistral", "opt", "qwen2", "qwen3", "smollm3",
}  # fmt: skip


class DeferrableLinear(nn.Linear):
    """A linear layer that hands its input through while `deferred`.

    cap: bound of its outputs' size, which they approach smoothly; None: none
    """

    deferred: bool = False
    cap: float | None = None

    def forward(self, input: Tensor) -> Tensor:
        return input if self.deferred else self.outputs(input)

    def outputs(self, input: Tensor) -> Tensor:
        """(..., D) -> (..., V), deferred or not."""
        outputs = super().forward(input)
        return outputs if self.cap is None else self.cap * torch.tanh(outputs / self.cap)


def make_deferrable(decoder: PreTrainedModel) -> None:
    """Swaps the class of the decoder's output layer if it is a plain linear one; parameters and names stay."""
    layer = decoder.get_output_embeddings()
    if decoder.config.model_type in ENDS_WITH_OUTPUT_LAYER and type(layer) is nn.Linear:
        layer.__class__ = DeferrableLinear


@contextmanager
def deferred_output_layer(decoder: PreTrainedModel, deferred: bool) -> Iterator[DeferrableLinear | None]:
    """Makes the decoder's "logits" the (B, U, D) inputs of its output layer, and yields that layer.

    Yields None, and leaves the logits as they are, if `deferred` is false or the layer cannot be deferred.
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


def labelled_cross_entropy(
    output_layer: DeferrableLinear, hidden_states: Tensor, labels: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, U, D) inputs of the output layer, (B, U) labels -> what `token_cross_entropy` gives for its (B, U, V) logits.

    (B, U, V) is never in memory: the output layer runs on labelled positions only, in chunks. Compiled code, whose shapes
    are fixed, takes all positions at once. Of labels on a device, the host waits for the number of positions.
    """
    if torch.compiler.is_compiling():
        return token_cross_entropy(output_layer.outputs(hidden_states), labels, label_smoothing)
    labelled, device = labels != IGNORE_INDEX, hidden_states.device
    positions, targets = labelled.flatten().nonzero()[:, 0].to(device, non_blocking=True), labels[labelled]
    weight, bias = output_layer.weight, output_layer.bias
    options = label_smoothing, output_layer.cap, rows_of_chunk(len(weight), device), torch.is_grad_enabled()
    chunked: Any = ChunkedCrossEntropy.apply
    inputs = hidden_states.flatten(0, 1).index_select(0, positions)
    loss, plain = chunked(inputs, weight, bias, targets.to(device, non_blocking=True), *options)
    return loss, labelled.sum(), plain


def rows_of_chunk(vocab_size: int, device: torch.device) -> int:
    """Positions in a chunk: few enough for the cache, and enough to be worth reading all weights."""
    return max((2**22 if device.type == "cpu" else 2**25) // vocab_size, 64)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The summed loss of an output layer, with and without smoothing; computes the gradients too, chunk by chunk.

    The logits of a chunk become their own gradients, so memory holds one chunk beside the gradients of inputs and weights,
    and nothing is computed twice. Source: Hsu et al. 2024 (arXiv 2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        label_smoothing: float,
        cap: float | None,
        num_rows: int,
        has_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        """(N, D) inputs, (V, D) weight, (V,) bias, (N,) targets -> two scalars."""
        device = inputs.device.type if torch.amp.is_autocast_available(inputs.device.type) else "cpu"  # meta has none
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        of_inputs, of_weight, of_bias = gradients = [
            torch.zeros_like(each, dtype=torch.float32) if each is not None and has_gradients and needed else None
            for each, needed in zip((inputs, weight, bias), ctx.needs_input_grad[:3], strict=True)
        ]
        few = (AT_ONCE // len(weight) or 1) if inputs.device.type == "cpu" else num_rows
        sums = []
        with torch.autocast(device, enabled=False):
            layer = weight.to(dtype), None if bias is None else bias.to(dtype)
            backward = weight if dtype is torch.float16 else layer[0]  # float16 cannot hold small gradients
            for first in range(0, max(len(targets), 1), num_rows):
                rows = slice(first, first + num_rows)
                logits = product(inputs[rows].to(dtype), layer[0].mT, layer[1]).float()
                for piece, targeted in zip(logits.split(few), targets[rows, None].split(few), strict=True):
                    sums.append(torch.stack(to_gradients(piece, targeted, label_smoothing, cap)))
                of_logits = logits.to(backward.dtype)
                if of_inputs is not None:
                    of_inputs[rows] = product(of_logits, backward)
                if of_weight is not None:
                    add_product(of_weight, of_logits.T, inputs[rows].to(backward.dtype))
                if of_bias is not None:
                    of_bias += logits.sum(0)
        ctx.gradients = gradients
        loss, plain = torch.stack(sums).sum(0)
        ctx.mark_non_differentiable(plain)
        return loss, plain

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor, of_plain: Tensor) -> tuple[Tensor | None, ...]:
        """Hands over the gradients and forgets them. Raises RuntimeError the second time, and for gradients of gradients."""
        if torch.is_grad_enabled():
            raise RuntimeError("gradients of gradients need the logits: pass output_logits=True")
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradients of this loss were handed over already: compute it again, or pass output_logits=True"
            )
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if each is None else each.mul_(of_loss) for each in gradients), *[None] * 5


def to_gradients(logits: Tensor, targets: Tensor, label_smoothing: float, cap: float | None) -> tuple[Tensor, Tensor]:
    """Replaces (N, V) logits by gradients of their summed loss on (N, 1) targets; returns the loss with and without smoothing.

    cap: bounds the logits smoothly, before the loss
    """
    slopes = None
    if cap is not None:
        slopes = 1 - logits.div_(cap).tanh_().square()
        logits.mul_(cap)
    logits.sub_(logits.amax(1, keepdim=True))
    of_target = logits.gather(1, targets)
    mean = logits.mean(1, keepdim=True) if label_smoothing else of_target
    sums = logits.exp_().sum(1, keepdim=True)
    logits.div_(sums).scatter_add_(1, targets, torch.full_like(of_target, label_smoothing - 1))
    if label_smoothing:
        logits.sub_(label_smoothing / logits.shape[1])
    if slopes is not None:
        logits.mul_(slopes)
    plain = (sums.log() - of_target).sum()
    return plain + label_smoothing * (of_target - mean).sum(), plain


def mean_loss(
    logits: Tensor,
    output_layer: DeferrableLinear | None,
    labels: Tensor,
    label_smoothing: float,
    num_items: Tensor | int | None,
) -> tuple[Tensor, Tensor]:
    """The loss of (B, U, V) logits, or of the (B, U, D) inputs of an output layer, over the target tokens or `num_items`.

    Beside it, the loss without smoothing and gradient.
    """
    if output_layer is None:
        labels = labels.to(logits.device, non_blocking=True)
        loss_sum, num_tokens, plain = token_cross_entropy(logits, labels, label_smoothing)
    else:
        loss_sum, num_tokens, plain = labelled_cross_entropy(output_layer, logits, labels, label_smoothing)
    divisor = num_tokens if num_items is None else torch.as_tensor(num_items)
    divisor = divisor.to(loss_sum.device, non_blocking=True).clamp(min=1)
    return loss_sum / divisor, plain / divisor
