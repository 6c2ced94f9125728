"""Adapters: modules between encoder and decoder that change the rate and width of frames.

Padding never reaches a real frame: an utterance has the same output alone and in a padded batch. Masks are 0 at padding.
An adapter with stride s makes ceil(T / s) frames; zeros fill up the input of the last one.

B batch, T frames, E encoder width, D decoder width, W windows, Q queries.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SpeechEncoderDecoderConfig

from sedtrain.annotations import checked
from sedtrain.errors import UserError
from sedtrain.ranges import Count, Fraction, UpTo1000, UpToMillion

ADAPTERS: dict[str, "type[Adapter]"] = {}  # by kind


class Adapter(nn.Module):
    """Base class of adapters. A saved model finds `class Mine(Adapter, kind="mine")` by its kind; import its module first.

    settings: arguments of the subclass other than the two widths; saved in the model's configuration
    """

    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str) -> None:
        super().__init_subclass__()
        cls.kind = kind
        if "__init__" in vars(cls):
            setattr(cls, "__init__", checked("adapter.")(cls.__init__))  # noqa: B010 - mypy allows no other way
        ADAPTERS[kind] = cls

    def __init__(self, input_dim: int, output_dim: int, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, frames: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, T, E) frames and their (B, T) mask -> (B, T', D) frames and their (B, T') mask."""
        raise NotImplementedError


class AdaptedSpeechEncoderDecoderConfig(SpeechEncoderDecoderConfig):
    """The configuration of a joined model with an adapter or a prefix of audio, which `transformers` does not have.

    adapter: its `kind` and its `settings`

    The base class would load such a folder without the adapter or the audio, and only warn of an unknown model type. The
    model type of the encoder or decoder is therefore saved with a suffix: the base class cannot resolve it, and refuses.
    """

    model_type = "adapted-speech-encoder-decoder"
    adapter: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().to_dict()
        if "encoder" in values:
            for part, suffix in needs_sedtrain(values).items():
                values[part]["model_type"] += suffix
        return values

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        values = {**config_dict, "encoder": {**config_dict["encoder"]}, "decoder": {**config_dict["decoder"]}}
        for part, suffix in needs_sedtrain(values).items():
            values[part]["model_type"] = values[part]["model_type"].removesuffix(suffix)
        config: Self = super().from_dict(values, **kwargs)
        return config


def needs_sedtrain(values: dict[str, Any]) -> dict[str, str]:
    """Suffixes of model types in a saved configuration, for a part that only sedtrain can load."""
    suffixes = {}
    if isinstance(adapter := values.get("adapter"), dict):
        suffixes["encoder"] = f" with the {adapter['kind']} adapter of sedtrain"
    if values["decoder"].get("listens") == "prefix":
        suffixes["decoder"] = " behind a prefix of sedtrain"
    return suffixes


def adapted_config(config: SpeechEncoderDecoderConfig, adapter: Adapter | None) -> AdaptedSpeechEncoderDecoderConfig:
    """`config` with the kind and settings of `adapter`; None keeps those in `config`, if any."""
    described = getattr(config, "adapter", None)
    if adapter is not None:
        described = {"kind": adapter.kind, "settings": adapter.settings}
    return AdaptedSpeechEncoderDecoderConfig.from_dict({**config.to_dict(), "adapter": described})


def saved_adapter(kind: str, input_dim: int, output_dim: int, settings: Mapping[str, Any]) -> Adapter:
    """A new adapter of this kind. Raises UserError if no imported class has the kind, or if it takes other settings."""
    if kind not in ADAPTERS:
        wrong = f"the model was saved with an adapter of this kind; known are {', '.join(ADAPTERS)}"
        write = f'write adapter=OPTION whose _target_ is the class with kind="{kind}"'
        python = f'import the module of the class with kind="{kind}" before loading'
        raise UserError("adapter", kind, wrong, f"{write}, or import its module before loading", python)
    try:
        return ADAPTERS[kind](input_dim, output_dim, **settings)
    except TypeError as error:
        write = "write a checkpoint that this version of sedtrain saved, or install the version that saved this one"
        raise UserError("adapter", kind, f"it does not fit the settings {dict(settings)}: {error}", write) from error


@checked("adapter.")
def stock_projection(input_dim: int, output_dim: int, project: bool) -> None:
    """Returns no module: stock joined models project with their own linear layer where the widths differ.

    project: allows that layer; if False, unequal widths raise UserError
    """
    if input_dim != output_dim and not project:
        wrong = f"the encoder is {input_dim} wide and the decoder {output_dim}"
        write, python = "write adapter=linear, which projects one to the other", "write project=True"
        raise UserError("adapter", "none", wrong, write, python)


class ConvAdapter(Adapter, kind="conv"):
    """Convolutions over 3 frames with gated linear units, each with this stride (arXiv 1911.08460)."""

    def __init__(self, input_dim: int, output_dim: int, stride: Count = 2, num_layers: UpTo1000 = 2) -> None:
        super().__init__(input_dim, output_dim, stride=stride, num_layers=num_layers)
        if stride > 2:
            write = "write adapter.stride=2, and adapter.num_layers for a lower rate, or adapter=stack_mlp"
            wrong, python = "convolutions over 3 frames would skip frames", "write stride=2, and more num_layers"
            raise UserError("adapter.stride", stride, wrong, write, python)
        self.stride = stride
        widths = [input_dim] + [output_dim] * (num_layers - 1)
        self.convolutions = nn.ModuleList(nn.Conv1d(width, 2 * output_dim, 3, stride, padding=1) for width in widths)
        self.layer_norms = nn.ModuleList(nn.LayerNorm(output_dim) for _ in widths)

    def forward(self, frames: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for convolution, layer_norm in zip(self.convolutions, self.layer_norms, strict=True):
            frames = convolution(without_padding(frames, mask).transpose(1, 2)).transpose(1, 2)
            frames = layer_norm(F.glu(frames, dim=-1))
            mask = strided(mask, self.stride)
        return frames, mask


class StackMLPAdapter(Adapter, kind="stack_mlp"):
    """Stacks `stride` consecutive frames into one wide frame, then applies two linear layers (arXiv 2402.08846)."""

    def __init__(self, input_dim: int, output_dim: int, stride: Count = 2) -> None:
        super().__init__(input_dim, output_dim, stride=stride)
        self.stride = stride
        wide, narrow = nn.Linear(stride * input_dim, 4 * output_dim), nn.Linear(4 * output_dim, output_dim)
        self.mlp = nn.Sequential(wide, nn.GELU(), narrow, nn.LayerNorm(output_dim))

    def forward(self, frames: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.mlp(windows(without_padding(frames, mask), self.stride).flatten(2)), strided(mask, self.stride)


class TransformerAdapter(Adapter, kind="transformer"):
    """A projection to the decoder's width, then pre-norm Transformer layers over the whole utterance."""

    def __init__(
        self, input_dim: int, output_dim: int, num_layers: UpTo1000 = 2, num_heads: Count = 4, dropout: Fraction = 0.1
    ) -> None:
        super().__init__(input_dim, output_dim, num_layers=num_layers, num_heads=num_heads, dropout=dropout)
        self.projection = nn.Linear(input_dim, output_dim)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(**layer_options(output_dim, num_heads, dropout)) for _ in range(num_layers)
        )
        self.layer_norm = nn.LayerNorm(output_dim)

    def forward(self, frames: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        frames = self.projection(without_padding(frames, mask))
        for layer in self.layers:
            frames = layer(frames, src_key_padding_mask=unattended(mask))
        return self.layer_norm(frames), mask


class QFormerAdapter(Adapter, kind="qformer"):
    """Learned queries that attend to windows of frames, the window-level Q-Former of SALMONN (arXiv 2310.13289).

    Makes `num_queries` frames out of `window` frames. Adds no positions: frames already carry the encoder's.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        window: UpToMillion = 8,
        num_queries: UpTo1000 = 4,
        num_layers: UpTo1000 = 2,
        num_heads: Count = 4,
        dropout: Fraction = 0.1,
    ) -> None:
        settings = {"window": window, "num_queries": num_queries, "num_layers": num_layers, "num_heads": num_heads}
        super().__init__(input_dim, output_dim, **settings, dropout=dropout)
        self.window, self.num_queries = window, num_queries
        self.projection = nn.Linear(input_dim, output_dim)
        self.queries = nn.Parameter(0.02 * torch.randn(num_queries, output_dim))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(**layer_options(output_dim, num_heads, dropout)) for _ in range(num_layers)
        )
        self.layer_norm = nn.LayerNorm(output_dim)

    def forward(self, frames: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        real = frames.new_ones(frames.shape[:2]) if mask is None else mask
        frames = windows(self.projection(without_padding(frames, mask)), self.window)  # (B, W, window, D)
        real = windows(real[..., None], self.window)[..., 0]
        batch_size, num_windows = frames.shape[:2]
        attended, ignored = frames.flatten(0, 1), unattended(real.flatten(0, 1))
        queries = self.queries.expand(batch_size * num_windows, -1, -1)
        for layer in self.layers:
            queries = layer(queries, attended, memory_key_padding_mask=ignored)
        mask = strided(mask, self.window)
        adapted = self.layer_norm(queries).reshape(batch_size, num_windows * self.num_queries, -1)
        return adapted, None if mask is None else mask.repeat_interleave(self.num_queries, dim=1)


def without_padding(frames: Tensor, mask: Tensor | None) -> Tensor:
    """The frames with zeros at padding, which may have held NaN."""
    return frames if mask is None else frames.masked_fill(mask[..., None] == 0, 0.0)


def strided(mask: Tensor | None, stride: int) -> Tensor | None:
    """(B, T) mask of frames -> (B, ceil(T / stride)) mask after a stride."""
    return None if mask is None else mask[:, ::stride]


def windows(frames: Tensor, size: int) -> Tensor:
    """(B, T, E) -> (B, ceil(T / size), size, E); zeros fill the last window."""
    filled = F.pad(frames, (0, 0, 0, -frames.shape[1] % size))
    return filled.reshape(len(frames), -1, size, frames.shape[2])


def unattended(mask: Tensor | None) -> Tensor | None:
    """True at positions that attention ignores; False throughout a row of padding, since a softmax over nothing is NaN."""
    return None if mask is None else (mask == 0) & (mask != 0).any(-1, keepdim=True)


def layer_options(width: int, num_heads: int, dropout: float) -> dict[str, Any]:
    """Arguments of PyTorch's Transformer layers. Raises UserError if the number of heads does not divide the width."""
    if width % num_heads:
        write = f"write adapter.num_heads={max(heads for heads in range(1, num_heads) if width % heads == 0)}"
        raise UserError("adapter.num_heads", num_heads, f"it does not divide the decoder's width, {width}", write)
    sizes = {"d_model": width, "nhead": num_heads, "dim_feedforward": 4 * width, "dropout": dropout}
    return {**sizes, "activation": "gelu", "batch_first": True, "norm_first": True}
