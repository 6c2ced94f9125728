"""How the layers of encoder and decoder are computed: with activations that are kept or made again, compiled or not."""

from dataclasses import dataclass
from typing import Any

from sedtrain.batch import UserError
from sedtrain.models.parts import layers_of


@dataclass(frozen=True)
class Execution:
    """The same losses and gradients with other costs.

    activation_checkpointing: layers compute their activations once more in the backward pass, instead of keeping them
    backend: of torch.compile, by which each layer is compiled in place; None: not
    """

    activation_checkpointing: bool = False
    backend: str | None = None

    def prepare(self, model: Any) -> None:
        """Raises UserError for a part whose layers cannot be computed so."""
        for name in ("encoder", "decoder"):
            part = model.get_submodule(name)
            if self.activation_checkpointing:
                refuse_unrepeatable(name, part)
            if self.backend:
                compile_layers(name, part, self.backend)
        if self.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})


def refuse_unrepeatable(name: str, part: Any) -> None:
    if not any(hasattr(module, "gradient_checkpointing") for module in part.modules()):
        raise UserError(
            f"activation_checkpointing=true: {name}={part.config.model_type} has no layers that can compute again",
            "activation_checkpointing=false",
        )


def compile_layers(name: str, part: Any, backend: str) -> None:
    """Layers are alike, so that one compilation serves all; their shapes differ from batch to batch."""
    stack = layers_of(part)
    if stack is None:
        raise UserError(f"compile={backend}: no layers were found in {name}={part.config.model_type}", "compile=none")
    for layer in stack[1]:
        layer.compile(backend=backend, dynamic=True)
