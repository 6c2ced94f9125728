"""Weights in 8 bits by torchao, as `task=export export.dtype=int8` writes them, as float32 for sedtrain's own layers."""

from typing import Any

from torch import nn
from transformers.utils.quantization_config import QuantizationMethod


def in_float32(model: Any) -> None:
    """Gives every weight that torchao holds in 8 bits its value in float32; other models stay as they are."""
    if getattr(model, "quantization_method", None) != QuantizationMethod.TORCHAO:
        return
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if hasattr(weight, "dequantize") and type(weight) is not nn.Parameter:
                setattr(module, name, nn.Parameter(weight.dequantize().float()))
                vars(module).pop("extra_repr", None)  # shows the weight's class, and cannot be pickled
    model.hf_quantizer.remove_quantization_config(model)
    model._weight_conversions = None  # with which transformers would save 8 bits again
