"""Matrices of low rank beside linear layers (LoRA, arXiv 2106.09685): put in, merged, saved; by peft, which is an extra."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from sedtrain.errors import UserError
from sedtrain.models.parts import selected

logger = logging.getLogger(__name__)

WITHOUT_FORWARD = ("WavLMAttention",)
"""Attention that hands its weights to PyTorch as they are: what stands beside its layers would not be heard."""
FOLDER = "adapter"
"""Where a saved model keeps matrices that are not merged."""


@contextmanager
def peft_for(option: str) -> Iterator[Any]:
    """The package. Raises UserError where it is not installed; silent on how GPT-2's layers lie, which it finds out."""
    try:
        import peft
    except ImportError as error:
        raise UserError(f"{option} needs peft: {error}", "pip install 'sedtrain[lora]'") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        yield peft


def adapt(model: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float) -> None:
    """Puts matrices beside the linear layers of the targets, in place; what trained before trains still."""
    movable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with peft_for("finetune=lora") as peft:
        layers = linear_layers(model, targets)
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=layers)
        peft.inject_adapter_in_model(config, model)
    for parameter in movable:
        parameter.requires_grad_(True)


def linear_layers(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The linear layers among the targets that can be adapted, by name. Raises UserError where there is none."""
    weights = {target: selected(model, target, "finetune.targets") for target in targets}
    deaf = [name for name, module in model.named_modules() if type(module).__name__ in WITHOUT_FORWARD]
    layers = [
        name
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D)
        and any(f"{name}.weight" in each for each in weights.values())
        and not any(name.startswith(f"{each}.") for each in deaf)
    ]
    if not layers:
        wrong = f"finetune.targets: there is no linear layer that can be adapted in {', '.join(targets)}"
        raise UserError(wrong, "finetune.targets=[encoder,decoder], or other parts with linear layers")
    for target, names in weights.items():
        if not any(f"{layer}.weight" in names for layer in layers):
            logger.warning("finetune.targets: %s has no linear layer that can be adapted, and stays as it is", target)
    return layers


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The adapted layers by name; none where peft has not touched the model."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def merge(model: nn.Module) -> None:
    """Adds what was learned to the weights, in place: the model is as it was before peft, and says the same."""
    for name, layer in lora_layers(model).items():
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights under their names before peft, without what it added."""
    return {
        name.replace(".base_layer.", "."): weight for name, weight in model.state_dict().items() if ".lora_" not in name
    }


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Writes what was added, as `model.load_adapter(folder)` of transformers and peft read it."""
    folder.mkdir(parents=True, exist_ok=True)
    with peft_for("finetune=lora") as peft:
        weights = peft.get_peft_model_state_dict(model).items()
    save_file(
        {f"base_model.model.{name}": weight.contiguous() for name, weight in weights},
        folder / "adapter_model.safetensors",
    )
    model.peft_config["default"].save_pretrained(folder)


def load_adapter(model: PreTrainedModel, checkpoint: str) -> None:
    """Puts in what lies beside the saved model of this name, if anything."""
    places = [
        cached_file(
            checkpoint,
            f"{FOLDER}/{name}",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    if places[0] is not None:
        with peft_for(f"checkpoint={checkpoint}"):
            model.load_adapter(str(Path(places[0]).parent))
