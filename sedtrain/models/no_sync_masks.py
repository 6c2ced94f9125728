"""Keeps `transformers` from reading masks on a device: the host would wait for the device.

B batch, U tokens.
"""

from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils, modeling_utils

ONE_TEXT_A_ROW: ContextVar[bool] = ContextVar("ONE_TEXT_A_ROW", default=False)


def is_unread(tensor: Any = None) -> bool:
    """True if `transformers` must not look into the tensor: one that is traced, or on a device that the host would wait for.

    It would only learn whether a mask has padding.
    """
    return is_traced(tensor) or (isinstance(tensor, Tensor) and tensor.device.type != "cpu")


def texts_in_rows(position_ids: Tensor) -> Tensor | None:
    """(B, U) positions -> (B, U) index of the text within its row; None if each row is known to hold a single text.

    Without None, transformers would build a causal mask from positions on the device, and attention could not use its
    causal kernel.
    """
    return None if not torch.compiler.is_compiling() and ONE_TEXT_A_ROW.get() else texts_by_positions(position_ids)


def one_text_a_row(decode: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a method that calls a decoder: each row holds one text, unless the caller passes `position_ids`."""

    @wraps(decode)
    def decorated(*args: Any, **inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return decode(*args, **inputs)
        before = ONE_TEXT_A_ROW.set(inputs.get("position_ids") is None)
        try:
            return decode(*args, **inputs)
        finally:
            ONE_TEXT_A_ROW.reset(before)

    return decorated


is_traced, texts_by_positions = masking_utils.is_tracing, masking_utils.find_packed_sequence_indices
masking_utils.is_tracing = modeling_utils.is_tracing = is_unread
masking_utils.find_packed_sequence_indices = texts_in_rows
