"""Writes the exported folder: weights in the chosen precision, LoRA merged or apart, ONNX graphs, the card."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from sedtrain.annotations import refuse_misfits
from sedtrain.errors import UserError
from sedtrain.evaluation.results import Results
from sedtrain.export.card import write_model_card
from sedtrain.export.card_facts import CardFacts
from sedtrain.export.int8 import refuse_int8, to_int8
from sedtrain.export.onnx import write_int8, write_onnx
from sedtrain.models.lora import lora_layers, merge
from sedtrain.models.saved import SavedModel
from sedtrain.run_dir import writing_to

logger = logging.getLogger(__name__)


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


def refuse_taken(folder: Path) -> None:
    """Raises UserError for a file, a folder that is not empty, and the current folder."""
    with writing_to(folder):
        is_taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()) or folder.samefile("."))
    if is_taken:
        wrong = "it exists already, or you are in it, and nothing is overwritten"
        raise UserError("out", str(folder), wrong, "write out=NEW_FOLDER")


@contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` at the end; an error removes it. Raises UserError if `folder` is taken."""
    refuse_taken(folder)
    with writing_to(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".export-", dir=folder.parent) as place:
            unfinished = Path(place, folder.name)
            unfinished.mkdir()
            yield unfinished
            unfinished.replace(folder)


def write_folder(
    folder: Path,
    saved: SavedModel,
    options: ExportOptions,
    generation: Mapping[str, Any],
    results: Results | None,
    facts: CardFacts,
    task: str,
) -> None:
    """Writes the model and changes it: LoRA is merged, weights are cast.

    generation: settings for generation_config.json
    Raises UserError for `export.lora=apart` without LoRA, and for graphs that cannot be made.
    """
    has_lora = bool(lora_layers(saved.model))
    if options.lora == "apart" and not has_lora:
        wrong = "this model has no matrices apart from its weights: it was trained without LoRA, or LoRA was merged"
        raise UserError("export.lora", options.lora, wrong, "write export.lora=merged")
    if options.dtype == "int8":
        refuse_int8(saved, options.lora)
    with made_whole(folder) as unfinished:
        if options.lora == "merged":
            merge(saved.model)
        note = in_8_bits = ""
        if options.onnx:
            write_onnx(saved, unfinished / "onnx")
        if options.onnx_int8:
            logger.info("%s", note := write_int8(saved, unfinished / "onnx"))
        if options.dtype == "bfloat16":
            saved.model.bfloat16()
        saved.save(unfinished, generation)
        if options.dtype == "int8":
            logger.info("%s", in_8_bits := to_int8(saved, unfinished))
        write_model_card(
            unfinished, saved, results, facts, task, onnx=options.onnx, onnx_int8=note, in_8_bits=in_8_bits
        )
