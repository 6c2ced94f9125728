"""The parameters of a joined model by part and by depth, and how its layers are executed.

A set of parameters is a set of names in `model.named_parameters()`, not of objects: sharding a model replaces these.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from torch import nn
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from sedtrain.errors import UserError
from sedtrain.models.loading import CROSS_ATTENTION
from sedtrain.models.packing import choose_packing
from sedtrain.models.products import quicken

# every parameter belongs to one; `decoder` excludes its cross-attention, `encoder` its family's own adapter
PARTS = ("encoder", "adapter", "cross_attention", "decoder", "ctc_head")
ADAPTERS = ("adapter", "enc_to_dec_proj", "encoder.adapter")
READ_AS_WEIGHTS = (WavLMAttention, nn.MultiheadAttention)
"""Modules that read the weights of their layers but never call the layers, so replacing or extending a layer has no effect."""


@cache
def part_of(name: str) -> str:
    """The part of the parameter with this name."""
    if any(name.startswith(f"{adapter}.") for adapter in ADAPTERS):
        return "adapter"
    modules = name.split(".")[:-1]
    # PyTorch's decoder layers call their cross-attention multihead_attn
    attends = any(CROSS_ATTENTION.search(module) or module == "multihead_attn" for module in modules)
    if modules[:1] == ["decoder"] and attends:
        return "cross_attention"
    return name.partition(".")[0]


def selected(model: nn.Module, name: str, option: str) -> set[str]:
    """The parameters of a part, a kind or a submodule called `name`; empty for a part that this model lacks.

    option: where the user wrote the name. Raises UserError for any other name.
    """
    if name in PARTS:
        return {parameter for parameter, _ in model.named_parameters() if part_of(parameter) == name}
    if name in PARAMETER_SETS:
        return PARAMETER_SETS[name](model)
    try:
        return names_in(model, [model.get_submodule(name)])
    except AttributeError:
        known = ", ".join(dict.fromkeys([*PARTS, *PARAMETER_SETS, *(child for child, _ in model.named_children())]))
        wrong = f"the model has no part {name!r}, it has {known} and their submodules"
        write = "names of parts that it has"
        raise UserError(option, name, wrong, f"write finetune=all, or {write}", f"write {write}") from None


def names_in(model: nn.Module, modules: list[nn.Module]) -> set[str]:
    """The parameters of some of the model's modules; tied parameters under their first name."""
    inside = {id(parameter) for module in modules for parameter in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}


def feature_encoder(model: Any) -> set[str]:
    """The parameters before the encoder's first layer: those that `freeze_feature_encoder` freezes."""
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
    """Layer norms and root-mean-square norms."""
    leaves = [module for module in model.modules() if not list(module.children())]
    return names_in(model, [leaf for leaf in leaves if type(leaf).__name__.endswith(("LayerNorm", "RMSNorm"))])


# sets of parameters within a part or across parts
PARAMETER_SETS: dict[str, Callable[[Any], set[str]]] = {
    "feature_encoder": feature_encoder,
    "encoder_self_attention": lambda model: self_attention(model, "encoder"),
    "decoder_self_attention": lambda model: self_attention(model, "decoder"),
    "layer_norms": layer_norms,
    "lora": lambda model: {name for name, _ in model.named_parameters() if ".lora_" in name},
}


def layers_of(part: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Name and Transformer layers of an encoder or decoder: its longest list of modules that contain attention.

    Lists within a layer do not count, such as T5's of self-attention, cross-attention and feed-forward.
    """
    stacks: list[tuple[str, nn.ModuleList]] = []
    for name, module in part.named_modules():
        kinds = [type(inner).__name__ for inner in module.modules()] if isinstance(module, nn.ModuleList) else []
        attends = any("Attention" in kind for kind in kinds)
        if attends and not any(name.startswith(f"{outer}.") for outer, _ in stacks):
            stacks.append((name, cast(nn.ModuleList, module)))
    return max(stacks, key=lambda stack: len(stack[1]), default=None)


def depths(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Parameters of encoder and decoder with their depth, the number of layers above them: 0 in the last layer and after it.

    Parameters before the first layer have the number of layers; embeddings too, even if the output layer shares them.
    Adapter, cross-attention and CTC head have no depth: they rarely come from a checkpoint.
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
    """How layers are executed; affects memory and time, not losses or gradients.

    activation_checkpointing: recompute activations in the backward pass instead of keeping them
    backend: of torch.compile, which compiles each layer in place; None to run uncompiled
    packing: "never", "always" or "auto", see packing.py
    """

    activation_checkpointing: bool = False
    backend: str | None = None
    packing: str = "auto"

    def prepare(self, model: Any) -> None:
        """Sets up a model, in place. Raises UserError if the layers of its encoder or decoder cannot execute so."""
        choose_packing(model.get_submodule("encoder"), self.packing, self.backend)
        for name in ("encoder", "decoder"):
            part = model.get_submodule(name)
            recomputable = any(hasattr(module, "gradient_checkpointing") for module in part.modules())
            if self.activation_checkpointing and not recomputable:
                wrong = f"the {name}, {part.config.model_type}, has no layers that can recompute their activations"
                raise UserError("activation_checkpointing", True, wrong, "write activation_checkpointing=false")
            if self.backend:
                compile_layers(name, part, self.backend)
        if self.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        quicken(model)


def compile_layers(name: str, part: Any, backend: str) -> None:
    """Compiles the layers in place, with dynamic shapes; alike layers share one compilation."""
    stack = layers_of(part)
    if stack is None:
        wrong = f"no layers were found in the {name}, {part.config.model_type}"
        raise UserError("compile", backend, wrong, "write compile=none", "write backend=None")
    for layer in stack[1]:
        layer.compile(backend=backend, dynamic=True)
