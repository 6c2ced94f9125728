"""The label shift and the losses. `shift_right` is the only place where labels are shifted.

Every loss is a sum, beside the number of tokens that it sums over.

B batch, T frames, D decoder width, U target tokens, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from sedtrain.annotations import refuse_misfits
from sedtrain.batch import IGNORE_INDEX
from sedtrain.ranges import Fraction

# The families whose logits are what their output layer returns, nothing after it. For others every logit is computed.
ENDS_WITH_OUTPUT_LAYER = {
    "bart", "bert", "bert-generation", "blenderbot", "blenderbot-small", "camembert", "data2vec-text", "electra", "ernie",
    "gpt2", "marian", "mbart", "pegasus", "plbart", "rembert", "roberta", "speech_to_text_2", "trocr", "xglm", "xlm-roberta",
    "xmod", "gemma", "gpt_neo", "llama", "mistral", "opt", "qwen2", "qwen3", "smollm3",
}  # fmt: skip


def shift_right(labels: Tensor, decoder_start_token_id: int, pad_token_id: int) -> Tensor:
    """(B, U) labels -> (B, U) decoder inputs: the start token, then the labels without their last column.

    Labels that are shifted twice still train to a plausible, wrong loss: nothing else shifts them.
    """
    shifted = torch.empty_like(labels)
    shifted[:, 0] = decoder_start_token_id
    shifted[:, 1:] = labels[:, :-1]
    return shifted.masked_fill(shifted == IGNORE_INDEX, pad_token_id)


def decoder_inputs(labels: Tensor, config: PreTrainedConfig) -> Tensor:
    """(B, U) labels -> (B, U) decoder inputs by the special tokens of `config`; raises ValueError where they are not set."""
    start, pad = (getattr(config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
    if start is None or pad is None:
        raise ValueError(
            f"config.decoder_start_token_id is {start} and config.pad_token_id {pad}: "
            "call set_special_tokens(start, end, pad) with the ids of the tokenizer"
        )
    return shift_right(labels, start, pad)


def token_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """(B, U, V) logits, (B, U) labels -> summed loss in nats, number of target tokens, and the loss without smoothing.

    All are scalars, the last without gradient. A batch without a target token gives a zero that has a gradient, not NaN.
    """
    logits, labels = logits.flatten(0, 1).float(), labels.flatten()
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing, reduction="sum")
    labelled, plain = labels != IGNORE_INDEX, loss.detach()
    if label_smoothing:  # smoothing adds its share of what the target's logit is above the mean logit
        rows = logits.detach()
        above_mean = rows.gather(1, labels.clamp(min=0)[:, None])[:, 0] - rows.mean(1)
        plain = plain - label_smoothing * torch.where(labelled, above_mean, 0.0).sum()
    return loss, labelled.sum(), plain


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
    output_layer: DeferrableLinear,
    hidden_states: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    chunk_elements: int = 2**25,
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, U, D) inputs of the output layer, (B, U) labels -> what `token_cross_entropy` gives for its (B, U, V) logits.

    (B, U, V) is never in memory: the output layer runs on labelled positions only, in chunks of at most `chunk_elements`
    logits, which the backward pass computes again. Compiled code, whose shapes are fixed, takes all positions.
    """
    labelled = labels != IGNORE_INDEX
    if torch.compiler.is_compiling():
        inputs, targets = hidden_states.flatten(0, 1), labels.flatten()
    else:
        inputs, targets = hidden_states[labelled], labels[labelled]

    def summed_losses(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss, _, plain = token_cross_entropy(output_layer.outputs(inputs)[None], targets[None], label_smoothing)
        return loss, plain

    rows = max(chunk_elements // output_layer.out_features, 1)
    if len(targets) <= rows:
        loss, plain = summed_losses(inputs, targets)
    else:
        chunks = zip(inputs.split(rows), targets.split(rows), strict=True)
        losses = [checkpoint(summed_losses, *chunk, use_reentrant=False) for chunk in chunks]
        loss, plain = (torch.stack(parts).sum() for parts in zip(*losses, strict=True))
    return loss, labelled.sum(), plain


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
        loss_sum, num_tokens, plain = token_cross_entropy(logits, labels, label_smoothing)
    else:
        loss_sum, num_tokens, plain = labelled_cross_entropy(output_layer, logits, labels, label_smoothing)
    divisor = num_tokens if num_items is None else torch.as_tensor(num_items)
    divisor = divisor.to(loss_sum.device).clamp(min=1)
    return loss_sum / divisor, plain / divisor


def ctc(logits: Tensor, num_frames: Tensor, labels: Tensor, blank: int, end: int) -> tuple[Tensor, Tensor]:
    """(B, T, V) logits, (B,) valid frames, (B, U) labels -> summed loss in nats, number of aligned tokens (both scalars).

    The end token is not aligned. An utterance with fewer frames than its labels need adds zero loss and zero tokens.
    Source: Graves et al. 2006.
    """
    targets, num_targets = without_token(labels, end)
    log_probabilities = logits.float().log_softmax(-1).transpose(0, 1)
    losses = F.ctc_loss(
        log_probabilities, targets, num_frames, num_targets, blank=blank, reduction="none", zero_infinity=True
    )
    repeats = ((targets[:, 1:] == targets[:, :-1]) & (positions(targets)[:, 1:] < num_targets[:, None])).sum(1)
    alignable = num_frames >= num_targets + repeats
    return losses.sum(), (num_targets * alignable).sum()


def without_token(labels: Tensor, token: int) -> tuple[Tensor, Tensor]:
    """(B, U) labels -> the labels other than `token` moved to the front (B, U), zeros behind, and their number (B,)."""
    kept = (labels != IGNORE_INDEX) & (labels != token)
    order = (~kept).to(torch.int8).argsort(dim=1, stable=True)
    num_kept = kept.sum(1)
    moved = labels.gather(1, order)
    return moved.masked_fill(positions(moved) >= num_kept[:, None], 0), num_kept


def positions(rows: Tensor) -> Tensor:
    """(B, U) -> (1, U) column numbers."""
    return torch.arange(rows.shape[1], device=rows.device)[None]


@dataclass(frozen=True)
class LossWeights:
    """The training loss: (1 - ctc_weight) · cross-entropy + ctc_weight · CTC, each divided by the number of target tokens.

    ctc_weight: None stands for 0.3 if the encoder's weights start random (CTC makes cross-attention align), else for 0; the
        cross-attention of a whole speech model aligns already, and its format has no place for a CTC head
    """

    label_smoothing: Fraction = 0.1
    ctc_weight: Fraction | None = None

    def __post_init__(self) -> None:
        """Raises UserError for values that an option does not take."""
        refuse_misfits("loss.", type(self), vars(self))

    def joint(self, cross_entropy: Tensor, ctc: Tensor) -> Tensor:
        """The weighted sum of two sums."""
        return (1 - (self.ctc_weight or 0.0)) * cross_entropy + (self.ctc_weight or 0.0) * ctc
