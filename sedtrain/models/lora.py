"""LoRA (arXiv 2106.09685) by peft, an extra: adds low-rank matrices to linear layers, merges and saves them."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from sedtrain.errors import UserError
from sedtrain.models.parts import READ_AS_WEIGHTS, selected
from sedtrain.models.products import FAST_LINEAR
from sedtrain.plain import plain_value

logger = logging.getLogger(__name__)

LINEAR = nn.Linear, Conv1D, FAST_LINEAR
FOLDER = "adapter"  # within a saved model, for matrices that are not merged
PREFIX = "base_model.model."  # peft's, before the names of matrices in its file
OPTIONS = {"r": int, "lora_alpha": int | float, "lora_dropout": float, "fan_in_fan_out": bool, "target_modules": list}
DESCRIBING = ("base_model_name_or_path", "revision", "task_type", "peft_version", "inference_mode")
"""Entries of an adapter_config.json that do not affect the model."""
WRITE = "write checkpoint=FOLDER of a run with LoRA as it was saved, or without its folder adapter"


@contextmanager
def peft_for(option: str, value: str) -> Iterator[Any]:
    """Imports peft, and silences its warning about GPT-2's layers. Raises UserError if peft is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError(option, value, f"it needs peft: {error}", "pip install 'sedtrain[lora]'") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        yield peft


def adapt(model: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float) -> None:
    """Adds matrices to the linear layers of the targets, in place. Parameters that required gradients still do."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with peft_for("finetune", "lora") as peft:
        layers = linear_layers(model, targets)
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=layers)
        peft.inject_adapter_in_model(config, model)
    for parameter in trained:
        parameter.requires_grad_(True)


def linear_layers(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the adaptable linear layers in the targets. Raises UserError if there are none."""
    weights = {target: selected(model, target, "finetune.targets") for target in targets}
    all_weights = set().union(*weights.values())
    uncalled = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, READ_AS_WEIGHTS))
    layers = [
        name
        for name, module in model.named_modules()
        if type(module) in LINEAR and f"{name}.weight" in all_weights and not name.startswith(uncalled)
    ]
    if not layers:
        wrong = "these have no linear layer that can be adapted"
        write = "write finetune.targets=[encoder,decoder], or other parts with linear layers"
        python = "write targets=['encoder', 'decoder'], or other parts with linear layers"
        raise UserError("finetune.targets", list(targets), wrong, write, python)
    for target, names in weights.items():
        if not any(f"{layer}.weight" in names for layer in layers):
            logger.warning("finetune.targets: %s has no linear layer that can be adapted, and stays as it is", target)
    return layers


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The adapted layers by name; empty for a model without LoRA."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def merge(model: nn.Module) -> None:
    """Adds the matrices to the weights and removes peft's modules, in place. Outputs stay the same."""
    for name, layer in lora_layers(model).items():
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights without the matrices, under their names before peft."""
    return {
        name.replace(".base_layer.", "."): weight for name, weight in model.state_dict().items() if ".lora_" not in name
    }


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Writes the matrices in the format of peft, which `model.load_adapter(folder)` of transformers reads too."""
    folder.mkdir(parents=True, exist_ok=True)
    with peft_for("finetune", "lora") as peft:
        weights = peft.get_peft_model_state_dict(model).items()
    named = {f"{PREFIX}{name}": weight.contiguous() for name, weight in weights}
    save_file(named, folder / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(folder)


def load_adapter(model: PreTrainedModel, checkpoint: str) -> None:
    """Adds the matrices saved in folder or Hub id `checkpoint`, if any. Raises UserError for an adapter other than LoRA."""
    quietly = {f"_raise_exceptions_for_{key}": False for key in ("missing_entries", "connection_errors")}
    files = ("adapter_config.json", "adapter_model.safetensors")
    config, weights = (cached_file(checkpoint, f"{FOLDER}/{name}", **quietly) for name in files)
    if config is None:
        return
    stored = plain_value(Path(config), "checkpoint", checkpoint, WRITE)
    with peft_for("checkpoint", checkpoint) as peft:
        config = peft.LoraConfig(**options_of(stored, checkpoint, peft), inference_mode=True)
        peft.inject_adapter_in_model(config, model)
        matrices = {} if weights is None else load_file(weights)
        matrices = {name.removeprefix(PREFIX): weight for name, weight in matrices.items()}
        if matrices.keys() != peft.get_peft_model_state_dict(model).keys():
            wrong = f"{FOLDER}/adapter_model.safetensors lacks the matrices of its adapter_config.json"
            raise UserError("checkpoint", checkpoint, wrong, WRITE)
        peft.set_peft_model_state_dict(model, matrices)


def options_of(stored: Any, checkpoint: str, peft: Any) -> dict[str, Any]:
    """LoRA's options in an adapter_config.json. Raises UserError for any other option: some import modules or fetch files."""
    stored = stored if isinstance(stored, dict) else {}
    options = {name: stored[name] for name, kind in OPTIONS.items() if isinstance(stored.get(name), kind)}
    plain, known = peft.LoraConfig().to_dict(), {*OPTIONS, *DESCRIBING}
    others = [name for name, value in stored.items() if name not in known and value and value != plain.get(name)]
    if others or options.keys() != OPTIONS.keys():
        name = next(iter([*others, *sorted(OPTIONS.keys() - options.keys())]))
        wrong = f"{FOLDER}/adapter_config.json has {name}={stored.get(name)!r}, which is no adapter that sedtrain saves"
        raise UserError("checkpoint", checkpoint, wrong, WRITE)
    return options
