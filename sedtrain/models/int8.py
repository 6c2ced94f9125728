"""A copy of a model for decoding on a CPU, whose large linear layers multiply in 8 bits.

Each row of an input and each row of the weights is scaled by its own largest value. The output of a row therefore does not
depend on the rest of its batch, except for rounding in float32. oneDNN computes the products; `torch.compile` uses it for
quantized models too.

N rows of inputs, I inputs, O outputs.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sedtrain.errors import UserError
from sedtrain.models.parts import READ_AS_WEIGHTS
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.models.step_layers import PLAIN
from sedtrain.models.steps import KEPT, decoder_steps, try_steps

FOR_FRAMES, FOR_TOKENS = 2**16, 2**19
"""Layers with at least this many weights run faster in 8 bits: on the many rows of an encoder; on one token of a decoder."""
LEVELS, ZERO = 127, 128
"""Levels on each side of zero; the unsigned integer that stands for zero."""


class Int8Linear(nn.Module):
    """A linear layer (N, I) -> (N, O) with an error of about 1 % of the standard deviation of its output."""

    scales: Tensor
    zeros: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: (O, I)"""
        super().__init__()
        weight = weight.detach().float()
        largest = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
        self.register_buffer("scales", largest / LEVELS, persistent=False)
        self.register_buffer("zeros", torch.zeros(len(weight), dtype=torch.long), persistent=False)
        rounded = (weight / self.scales[:, None]).round().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.bias = bias

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, input.shape[-1])
        largest = rows.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
        rounded = (rows * (LEVELS / largest)).add_(ZERO + 0.5).to(torch.uint8)
        of_input, of_weight = (1 / LEVELS, ZERO), (self.weight, self.scales, self.zeros)
        output = torch.ops.onednn.qlinear_pointwise(
            rounded, *of_input, *of_weight, None, 1.0, 0, torch.float32, "none", [], ""
        )
        output = output * largest if self.bias is None else torch.addcmul(self.bias, output, largest)
        return output.view(*input.shape[:-1], -1)


def in_int8(model: SpeechEncoderDecoder) -> SpeechEncoderDecoder:
    """A copy in evaluation mode, with the large layers in 8 bits instead of copied.

    Raises UserError for a model that is not in float32 on a CPU.
    """
    if model.device.type != "cpu" or model.dtype != torch.float32:
        found = f"this one is in {str(model.dtype)[6:]} on {model.device.type}"
        wrong, write = f"8 bits are for models in float32 on a CPU; {found}", "write decoding.int8=false"
        raise UserError("decoding.int8", True, wrong, f"{write}, or trainer.accelerator=cpu", "write int8=False")
    replaced: dict[int, Any] = {}
    for name, owner in model.named_modules():
        smallest = FOR_TOKENS if name.partition(".")[0] == "decoder" else FOR_FRAMES
        if not isinstance(owner, READ_AS_WEIGHTS):
            large = [layer for layer in owner.children() if is_large(layer, smallest)]
            replaced |= {id(layer): Int8Linear(rows_of(layer), layer.bias) for layer in large}
    small: SpeechEncoderDecoder = copy.deepcopy(model, replaced).eval()
    if decoder_steps(model) is not None:  # in 8 bits, steps and decoder round differently, so comparing them would fail
        KEPT[small.decoder] = try_steps(small.decoder)
    return small


def is_large(layer: nn.Module, smallest: int) -> bool:
    return type(layer) in PLAIN and not layer._forward_hooks and layer.weight.numel() >= smallest  # type: ignore[operator]


def rows_of(layer: Any) -> Tensor:
    """(O, I)"""
    weight: Tensor = layer.weight
    return weight.T.contiguous() if type(layer) is Conv1D else weight
