"""The parameters of a joined model by part and by depth, and how its layers are executed.

A set of parameters is a set of their names in `model.named_parameters()`: sharding a model replaces the objects.
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

# every parameter belongs to one; `decoder` is without its cross-attention, `encoder` without its own adapter
PARTS = ("encoder", "adapter", "cross_attention", "decoder", "ctc_head")
ADAPTERS = ("adapter", "enc_to_dec_proj", "encoder.adapter")
READ_AS_WEIGHTS = (WavLMAttention, nn.MultiheadAttention)
"""Modules that multiply with the weights of their layers without calling the layers: what is beside these does nothing."""


@cache
def part_of(name: str) -> str:
    """The part to which the parameter of this name belongs."""
    if any(name.startswith(f"{adapter}.") for adapter in ADAPTERS):
        return "adapter"
    modules = name.split(".")[:-1]
    attends = any(
        CROSS_ATTENTION.search(name) or name == "multihead_attn" for name in modules
    )  # the latter is PyTorch's
    if modules[:1] == ["decoder"] and attends:
        return "cross_attention"
    return name.partition(".")[0]


def selected(model: nn.Module, name: str, option: str) -> set[str]:
    """The parameters of a part, a kind or a submodule; none for a part that this model does without.

    Raises UserError, which names `option`, for any other name.
    """
    if name in PARTS:
        return {parameter for parameter, _ in model.named_parameters() if part_of(parameter) == name}
    if name in KINDS:
        return KINDS[name](model)
    try:
        return names_in(model, [model.get_submodule(name)])
    except AttributeError:
        known = ", ".join(dict.fromkeys([*PARTS, *KINDS, *(child for child, _ in model.named_children())]))
        wrong = f"the model has no part {name!r}, it has {known} and their submodules"
        write = "names of parts that it has"
        raise UserError(option, name, wrong, f"write finetune=all, or {write}", f"write {write}") from None


def names_in(model: nn.Module, modules: list[nn.Module]) -> set[str]:
    """The parameters of some of the model's modules; tied ones under their first name."""
    inside = {id(parameter) for module in modules for parameter in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}


def feature_encoder(model: Any) -> set[str]:
    """The parameters before the encoder's first layer, which the family names by what it freezes."""
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


# sets of parameters that cross parts, or lie in one
KINDS: dict[str, Callable[[Any], set[str]]] = {
    "feature_encoder": feature_encoder,
    "encoder_self_attention": lambda model: self_attention(model, "encoder"),
    "decoder_self_attention": lambda model: self_attention(model, "decoder"),
    "layer_norms": layer_norms,
    "lora": lambda model: {name for name, _ in model.named_parameters() if ".lora_" in name},
}


def layers_of(part: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The Transformer layers of an encoder or decoder, with their name: its longest list of modules with attention in them.

    A list within a layer, such as T5's of self-attention, cross-attention and feed-forward, is none of layers.
    """
    stacks: list[tuple[str, nn.ModuleList]] = []
    for name, module in part.named_modules():
        attends = isinstance(module, nn.ModuleList) and any("Attention" in type(x).__name__ for x in module.modules())
        if attends and not any(name.startswith(f"{outer}.") for outer, _ in stacks):
            stacks.append((name, cast(nn.ModuleList, module)))
    return max(stacks, key=lambda stack: len(stack[1]), default=None)


def depths(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Parameters of encoder and decoder, each with the number of layers above it: 0 in the last layer and behind it.

    Below the first layer, as in the embeddings, it is the number of layers, also if the output layer shares them. Adapter,
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
    """Execution of layers: it changes memory and time, not losses or gradients.

    activation_checkpointing: the backward pass computes activations again, instead of keeping them
    backend: of torch.compile, which compiles each layer in place; None: not compiled
    packing: how the encoder computes a batch of unequal lengths, see packing.py
    """

    activation_checkpointing: bool = False
    backend: str | None = None
    packing: str = "auto"

    def prepare(self, model: Any) -> None:
        """Raises UserError for an encoder or decoder whose layers cannot compute so."""
        choose_packing(model.get_submodule("encoder"), self.packing, self.backend)
        for name in ("encoder", "decoder"):
            part = model.get_submodule(name)
            recomputable = any(hasattr(module, "gradient_checkpointing") for module in part.modules())
            if self.activation_checkpointing and not recomputable:
                wrong = f"the {name}, {part.config.model_type}, has no layers that can compute again"
                raise UserError("activation_checkpointing", True, wrong, "write activation_checkpointing=false")
            if self.backend:
                compile_layers(name, part, self.backend)
        if self.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        quicken(model)


def compile_layers(name: str, part: Any, backend: str) -> None:
    """Compiles once for all layers, since they are alike; their shapes differ from batch to batch."""
    stack = layers_of(part)
    if stack is None:
        wrong = f"no layers were found in the {name}, {part.config.model_type}"
        raise UserError("compile", backend, wrong, "write compile=none", "write backend=None")
    for layer in stack[1]:
        layer.compile(backend=backend, dynamic=True)
