"""The label shift and the losses. Only `shift_right` shifts labels.

Every loss is returned as a sum with its number of tokens.

B batch, T frames, U target tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig

from sedtrain.annotations import refuse_misfits
from sedtrain.batch import IGNORE_INDEX
from sedtrain.ranges import Fraction


def shift_right(labels: Tensor, decoder_start_token_id: int, pad_token_id: int) -> Tensor:
    """(B, U) labels -> (B, U) decoder inputs: the start token, then the labels without their last column.

    Labels shifted twice would still train to a plausible, wrong loss, so nothing else may shift them.
    """
    shifted = torch.empty_like(labels)
    shifted[:, 0] = decoder_start_token_id
    shifted[:, 1:] = labels[:, :-1]
    return shifted.masked_fill(shifted == IGNORE_INDEX, pad_token_id)


def decoder_inputs(labels: Tensor, config: PreTrainedConfig) -> Tensor:
    """(B, U) labels -> (B, U) decoder inputs, with the special tokens in `config`; raises ValueError if they are not set."""
    start, pad = (getattr(config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
    if start is None or pad is None:
        raise ValueError(
            f"config.decoder_start_token_id is {start} and config.pad_token_id {pad}: "
            "call set_special_tokens(start, end, pad) with the ids of the tokenizer"
        )
    return shift_right(labels, start, pad)


def token_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """(B, U, V) logits, (B, U) labels -> summed loss in nats, number of target tokens, loss without smoothing.

    All three are scalars; the last has no gradient. Without a target token the loss is 0 with a gradient, not NaN.
    """
    logits, labels = logits.flatten(0, 1).float(), labels.flatten()
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing, reduction="sum")
    labelled, plain = labels != IGNORE_INDEX, loss.detach()
    if label_smoothing:  # smoothing adds label_smoothing * (logit of the target - mean logit)
        rows = logits.detach()
        above_mean = rows.gather(1, labels.clamp(min=0)[:, None])[:, 0] - rows.mean(1)
        plain = plain - label_smoothing * torch.where(labelled, above_mean, 0.0).sum()
    return loss, labelled.sum(), plain


def ctc(logits: Tensor, num_frames: Tensor, labels: Tensor, blank: int, end: int) -> tuple[Tensor, Tensor]:
    """(B, T, V) logits, (B,) numbers of frames, (B, U) labels -> summed loss in nats, number of aligned tokens (scalars).

    The end token is not aligned. An utterance with too few frames for its labels adds no loss and no tokens.
    Pass `num_frames` and `labels` on the CPU, where torch reads lengths. Source: Graves et al. 2006.
    """
    targets, num_targets = without_token(labels, end)
    log_probabilities = logits.float().log_softmax(-1).transpose(0, 1)
    moved = targets.to(logits.device, non_blocking=True)
    losses = F.ctc_loss(
        log_probabilities, moved, num_frames, num_targets, blank=blank, reduction="none", zero_infinity=True
    )
    repeats = ((targets[:, 1:] == targets[:, :-1]) & (positions(targets)[:, 1:] < num_targets[:, None])).sum(1)
    alignable = num_frames >= num_targets + repeats
    return losses.sum(), (num_targets * alignable).sum()


def without_token(labels: Tensor, token: int) -> tuple[Tensor, Tensor]:
    """(B, U) labels -> (B, U) labels without `token`, left-aligned and filled with zeros, and their (B,) numbers."""
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
    """The training loss: (1 - ctc_weight) · cross-entropy + ctc_weight · CTC, each a mean over the target tokens of the step.

    Losses are summed here; `gradients.divide_gradients` divides their gradients by the number of tokens.

    ctc_weight: None stands for 0.3 if the encoder starts with random weights, since CTC makes cross-attention align; else
        for 0. The cross-attention of a whole speech model is aligned already, and its format has no place for a CTC head
    """

    label_smoothing: Fraction = 0.1
    ctc_weight: Fraction | None = None

    def __post_init__(self) -> None:
        """Raises UserError for a value out of range."""
        refuse_misfits("loss.", type(self), vars(self))

    def joint(self, cross_entropy: Tensor, ctc: Tensor) -> Tensor:
        """The weighted sum of two summed losses; nothing is divided here."""
        weight = self.ctc_weight or 0.0
        return (1 - weight) * cross_entropy + weight * ctc
