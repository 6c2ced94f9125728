"""The folder that others get: weights in their precision, LoRA merged or apart, ONNX graphs, the card."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from sedtrain.errors import UserError
from sedtrain.evaluation.results import Results
from sedtrain.export.card import Origin, write_model_card
from sedtrain.export.onnx import write_onnx
from sedtrain.export.options import ExportOptions
from sedtrain.models.lora import lora_layers, merge
from sedtrain.models.saved import SavedModel


def refuse_taken(folder: Path) -> None:
    """Raises UserError for a file, and for a folder that holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            "out", str(folder), "something is there already, and nothing is overwritten", "write out=NEW_FOLDER"
        )


@contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` if nothing raises, else is removed. Raises UserError for one that is taken."""
    refuse_taken(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        write = "write out=FOLDER that you may write to"
        raise UserError("out", str(folder), f"cannot be written to: {error}", write) from error
    try:
        yield unfinished
        unfinished.chmod(0o755)
        unfinished.replace(folder)
    except BaseException:
        shutil.rmtree(unfinished)
        raise


def write_folder(
    folder: Path,
    saved: SavedModel,
    options: ExportOptions,
    generation: Mapping[str, Any],
    results: Results | None,
    origin: Origin,
    task: str,
) -> None:
    """Writes the model, which is changed; generation: of its generation config. Raises UserError for what cannot be."""
    has_lora = bool(lora_layers(saved.model))
    if options.lora == "apart" and not has_lora:
        wrong = "this model has no matrices apart from its weights: it was trained without LoRA, or merged"
        raise UserError("export.lora", options.lora, wrong, "write export.lora=merged")
    with made_whole(folder) as unfinished:
        if options.lora == "merged":
            merge(saved.model)
        if options.onnx:
            write_onnx(saved, unfinished / "onnx")
        saved.model.to(getattr(torch, options.dtype))
        saved.save(unfinished, generation)
        write_model_card(unfinished, saved, results, origin, task, onnx=options.onnx)
