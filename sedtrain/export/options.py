"""The options of `task=export`."""

from dataclasses import dataclass
from typing import Literal

from sedtrain.annotations import refuse_misfits
from sedtrain.errors import UserError


@dataclass(frozen=True)
class ExportOptions:
    """How a model is written for others.

    dtype:   of the saved weights; int8 is refused with the reason
    lora:    matrices that were saved apart are added to the weights, or stay apart in the folder `adapter`
    onnx:    writes the folder `onnx` too, always in float32
    license: for the card, as the Hub spells it
    private: whether a repository that the upload makes is private
    """

    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    lora: Literal["merged", "apart"] = "merged"
    onnx: bool = False
    license: str | None = None
    private: bool = True

    def __post_init__(self) -> None:
        """Raises UserError for values that do not fit, and for weights in 8 bits."""
        refuse_misfits("export.", type(self), vars(self))
        if self.dtype == "int8":
            wrong = (
                "transformers has no class that loads the 8-bit layers of sedtrain, which are made when decoding begins"
            )
            write = "write export.dtype=bfloat16 for a small folder; decoding.int8=true with task=transcribe computes in 8 bits"
            raise UserError("export.dtype", self.dtype, wrong, write)
