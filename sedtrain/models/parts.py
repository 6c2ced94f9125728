"""The parts of a joined model by name: what moves together, and how deep in its stack a weight lies.

A set of parameters is a set of their names, those of `model.named_parameters()`: objects are replaced where a model is sharded.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from sedtrain.errors import UserError
from sedtrain.models.loading import CROSS_ATTENTION

PARTS = ("encoder", "adapter", "cross_attention", "decoder", "ctc_head")
"""Every parameter belongs to one; `decoder` is what is not cross-attention in it, `encoder` what is no adapter in it."""


ADAPTERS = ("adapter", "enc_to_dec_proj", "encoder.adapter")


@cache
def part_of(name: str) -> str:
    """The part to which the parameter of this name belongs."""
    if any(name.startswith(f"{adapter}.") for adapter in ADAPTERS):
        return "adapter"
    modules = name.split(".")[:-1]
    if modules[:1] == ["decoder"] and any(map(is_cross_attention, modules)):
        return "cross_attention"
    return name.partition(".")[0]


def is_cross_attention(module_name: str) -> bool:
    """Whether this is what transformers calls a module that attends to the encoder; `multihead_attn` is PyTorch's name."""
    return bool(CROSS_ATTENTION.search(module_name)) or module_name == "multihead_attn"


def selected(model: nn.Module, name: str, option: str) -> set[str]:
    """The parameters that `name` stands for: those of a part, a kind or a submodule.

    A part that this model does without is empty. Raises UserError, which speaks of `option`, for any other name.
    """
    if name in PARTS:
        return {each for each, _ in model.named_parameters() if part_of(each) == name}
    if name in KINDS:
        return KINDS[name](model)
    try:
        return names_in(model, [model.get_submodule(name)])
    except AttributeError:
        there = ", ".join(dict.fromkeys([*PARTS, *KINDS, *(child for child, _ in model.named_children())]))
        raise UserError(
            f"{option}: the model has no part {name!r}, it has {there} and what is in them",
            "finetune=all, or the names of parts that are there",
        ) from None


def names_in(model: nn.Module, modules: list[nn.Module]) -> set[str]:
    """The names, as the model has them, of the parameters of some of its modules; of tied ones the first."""
    inside = {id(parameter) for module in modules for parameter in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}


def feature_encoder(model: Any) -> set[str]:
    """What lies before the encoder's first layer, as the family says."""
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.freeze_feature_encoder()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad} & before
    for name in frozen:
        model.get_parameter(name).requires_grad_(True)
    return frozen


def self_attention(model: nn.Module, part: str) -> set[str]:
    modules = [module for module in model.get_submodule(part).modules() if "Attention" in type(module).__name__]
    return {name for name in names_in(model, modules) if part_of(name) == part}


def layer_norms(model: nn.Module) -> set[str]:
    """Layer norms and root-mean-square norms of encoder and decoder."""
    norms = [
        module
        for module in model.modules()
        if type(module).__name__.endswith(("LayerNorm", "RMSNorm")) and not list(module.children())
    ]
    return names_in(model, norms)


KINDS: dict[str, Callable[[Any], set[str]]] = {
    "feature_encoder": feature_encoder,
    "encoder_self_attention": lambda model: self_attention(model, "encoder"),
    "decoder_self_attention": lambda model: self_attention(model, "decoder"),
    "layer_norms": layer_norms,
    "lora": lambda model: {name for name, _ in model.named_parameters() if ".lora_" in name},
}
"""Sets of parameters that cross parts or lie in one."""


def layers_of(part: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The Transformer layers of an encoder or decoder and where they are: of its lists with attention in them the longest."""
    stacks = [
        (name, module)
        for name, module in part.named_modules()
        if isinstance(module, nn.ModuleList) and any("Attention" in type(inner).__name__ for inner in module.modules())
    ]
    return max(stacks, key=lambda stack: len(stack[1]), default=None)


def depths(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Parameters of encoder and decoder with how many layers lie above theirs: 0 in the last layer and behind it.

    Below the first layer that is their number: so of embeddings, also where the output layer shares them. Adapter,
    cross-attention and CTC head have no depth: they rarely come from a checkpoint.
    """
    for part in ("encoder", "decoder"):
        stack = layers_of(model.get_submodule(part))
        if stack is None:
            continue
        prefix, num_layers, reached = f"{part}.{stack[0]}.", len(stack[1]), False
        for name, _ in model.named_parameters():
            if not name.startswith(f"{part}.") or part_of(name) != part:
                continue
            if name.startswith(prefix):
                reached = True
                yield name, num_layers - 1 - int(name.removeprefix(prefix).partition(".")[0])
            else:
                yield name, 0 if reached else num_layers


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
