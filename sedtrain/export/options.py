"""The options of `task=export`."""

import re
from dataclasses import dataclass
from typing import Literal

from sedtrain.annotations import refuse_misfits
from sedtrain.errors import UserError


@dataclass(frozen=True)
class ExportOptions:
    """How a model is written for others.

    dtype:   of the saved weights; int8: of linear layers, by torchao, which then loads the folder too
    lora:    matrices that were saved apart are added to the weights, or stay apart in the folder `adapter`
    onnx:    writes the folder `onnx` too, in float32
    onnx_int8: and beside these graphs the same ones in 8 bits
    license: for the card, as the Hub spells it
    private: whether a repository that the upload makes is private
    """

    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    lora: Literal["merged", "apart"] = "merged"
    onnx: bool = False
    onnx_int8: bool = False
    license: str | None = None
    private: bool = True

    def __post_init__(self) -> None:
        """Raises UserError for values that do not fit, and a license that the Hub cannot know."""
        refuse_misfits("export.", type(self), vars(self))
        if self.license is not None and not re.fullmatch(r"[a-z0-9.+-]+", self.license):
            wrong = "the Hub knows licenses by names in lower case without spaces, and `other`"
            raise UserError(
                "export.license", self.license, wrong, "write export.license=apache-2.0, mit, cc-by-4.0, ..."
            )
        if self.onnx_int8 and not self.onnx:
            wrong = "graphs in 8 bits are made of those in float32"
            raise UserError("export.onnx_int8", True, wrong, "write export=onnx export.onnx_int8=true")
