"""The options of `task=export`."""

import re
from dataclasses import dataclass
from typing import Literal

from sedtrain.annotations import refuse_misfits
from sedtrain.errors import UserError


@dataclass(frozen=True)
class ExportOptions:
    """The form of an exported model.

    dtype:   precision of the saved weights; int8: torchao rounds the linear layers, and is needed to load the folder
    lora:    merged: the matrices of LoRA are added to the weights; apart: they stay in the folder `adapter`
    onnx:    also writes the folder `onnx` with graphs in float32
    onnx_int8: writes the same graphs in 8 bits beside them
    license: license for the card, as the Hub spells it
    private: an upload makes a private repository
    """

    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    lora: Literal["merged", "apart"] = "merged"
    onnx: bool = False
    onnx_int8: bool = False
    license: str | None = None
    private: bool = True

    def __post_init__(self) -> None:
        """Raises UserError for values that do not fit, and for a license that the Hub cannot know."""
        refuse_misfits("export.", type(self), vars(self))
        if self.license is not None and not re.fullmatch(r"[a-z0-9.+-]+", self.license):
            wrong = "the Hub names licenses in lower case without spaces; `other` stands for all others"
            write = "write export.license=apache-2.0, mit, cc-by-4.0, ..."
            raise UserError("export.license", self.license, wrong, write)
        if self.onnx_int8 and not self.onnx:
            wrong = "graphs in 8 bits are made from graphs in float32"
            raise UserError("export.onnx_int8", True, wrong, "write export=onnx export.onnx_int8=true")
