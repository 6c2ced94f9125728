"""Positions of a decoder's tokens: how many it has, and how they count.

B batch, U target tokens, D width.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.canary.modeling_canary import CanaryPositionalEmbedding

from sedtrain.errors import UserError

POSITIONS = re.compile(r"^(?!.*(rel|bias|bucket)).*(position|pos_?emb|wpe)", re.IGNORECASE)
"""Matches the names of tables of absolute positions, not of relative ones."""


def fix_sinusoids(decoder: nn.Module) -> None:
    """Makes sinusoidal position embeddings buffers: as parameters they get no gradient, and loading unfreezes them."""
    for module in decoder.modules():
        is_computed = isinstance(module, nn.Embedding) and "Sinusoidal" in type(module).__name__
        if is_computed and (weight := module._parameters.pop("weight", None)) is not None:
            module.register_buffer("weight", weight.detach())


def max_tokens(decoder: PreTrainedModel) -> int | None:
    """Number of tokens that the decoder has positions for; None if it computes positions without limit.

    RoBERTa-like families do not use the positions up to the padding index.
    """
    tables = [
        module.num_embeddings - getattr(module, "offset", 0)  # BART's table has two more rows, and starts at row 2
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Embedding) and POSITIONS.search(name.rpartition(".")[2])
    ]
    tables += [module.length for module in decoder.modules() if isinstance(module, CanaryPositionalEmbedding)]
    embeddings: Any = getattr(decoder.base_model, "embeddings", None)
    skipped = embeddings.padding_idx + 1 if hasattr(embeddings, "create_position_ids_from_input_ids") else 0
    return min(tables) - skipped if tables else None


def most_new_tokens(wanted: int, positions: int | None, num_given: int) -> int:
    """Largest number of tokens after a prompt of `num_given`; the last token is never read, so it needs no position."""
    return wanted if positions is None else max(1, min(wanted, positions + 1 - num_given))


def refuse_longer(tokens: Tensor | None, most: int | None) -> None:
    """Raises UserError if (B, U) tokens, or their (B, U, D) embeddings, outnumber the decoder's positions."""
    if most is None or tokens is None or tokens.shape[1] <= most:
        return
    wrong = f"a text of {tokens.shape[1]} tokens is too long for the decoder's {most} positions"
    raise UserError("labels", tuple(tokens.shape), wrong, f"write labels of at most {most} tokens")


def decoder_positions(
    decoder: PreTrainedModel, tokens: Tensor | None, past_length: int = 0, attention_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """(B, U) `position_ids` that count every real token; empty for a family that counts them so itself.

    RoBERTa-like families skip pad tokens when they count, but a cached step counts all tokens. With a pad token before or
    within a text, training and cached decoding would differ. Without one, these positions equal the family's own.

    tokens: (B, U) ids or (B, U, D) embeddings, after `past_length` cached tokens
    attention_mask: (B, past_length + U), 0 where a prompt is padded
    """
    embeddings: Any = getattr(decoder.base_model, "embeddings", getattr(decoder.base_model, "embed_positions", None))
    if tokens is None or not hasattr(embeddings, "create_position_ids_from_input_ids"):
        return {}
    batch_size, num_tokens = tokens.shape[:2]
    if attention_mask is not None:
        real = attention_mask.long()
        return {"position_ids": (real.cumsum(1) * real + embeddings.padding_idx)[:, -num_tokens:]}
    positions = torch.arange(num_tokens, device=tokens.device) + embeddings.padding_idx + 1 + past_length
    return {"position_ids": positions.expand(batch_size, num_tokens)}
