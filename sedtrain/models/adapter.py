"""What stands between encoder and decoder: modules that change the rate and the width of frames and carry the mask along.

B batch, T frames, E encoder width, D decoder width, W windows, Q queries.

A frame of padding never reaches a real one: an utterance has the same output alone as in a padded batch. In every mask 0 is
padding. An adapter that makes one frame of s makes ceil(T / s) frames; the last one is made of fewer, filled with zeros.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sedtrain.errors import UserError


class Adapter(nn.Module):
    """Base class of adapters. `class Mine(Adapter, kind="mine")` is found again in saved models once its module is imported.

    settings: what the subclass was built with besides the two widths, saved in the model's configuration
    """

    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str) -> None:
        super().__init_subclass__()
        cls.kind = kind
        ADAPTERS[kind] = cls

    def __init__(self, input_dim: int, output_dim: int, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, frames: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, T, E) frames and their (B, T) mask -> (B, T', D) frames and their (B, T') mask."""
        raise NotImplementedError


ADAPTERS: dict[str, type[Adapter]] = {}


def saved_adapter(kind: str, input_dim: int, output_dim: int, settings: Mapping[str, Any]) -> Adapter:
    """A new adapter of a class that was saved by its kind. Raises UserError for a kind that no imported class has."""
    if kind not in ADAPTERS:
        raise UserError(
            f"this model was saved with an adapter of kind {kind!r}; known here: {', '.join(ADAPTERS)}",
            f'adapter=OPTION whose _target_ is the class with kind="{kind}", or import its module before loading',
        )
    return ADAPTERS[kind](input_dim, output_dim, **settings)


def stock_projection(input_dim: int, output_dim: int, project: bool) -> None:
    """No module: the joined model of `transformers` has its own linear layer where the widths differ.

    project: whether that layer is wanted; where not, unequal widths raise UserError
    """
    if input_dim != output_dim and not project:
        raise UserError(
            f"adapter=none: the encoder is {input_dim} wide and the decoder {output_dim}",
            "adapter=linear, which projects one to the other",
        )


class ConvAdapter(Adapter, kind="conv"):
    """Convolutions of 3 frames with gated linear units, each of which leaves one frame of `stride` (arXiv 1911.08460)."""

    def __init__(self, input_dim: int, output_dim: int, stride: int = 2, num_layers: int = 2) -> None:
        super().__init__(input_dim, output_dim, **at_least_one(stride=stride, num_layers=num_layers))
        if stride > 2:
            raise UserError(
                f"adapter.stride={stride}: convolutions of 3 frames would leave frames out",
                "adapter.stride=2, and adapter.num_layers for a lower rate, or adapter=stack_mlp",
            )
        self.stride = stride
        widths = [input_dim] + [output_dim] * (num_layers - 1)
        self.convolutions = nn.ModuleList(nn.Conv1d(each, 2 * output_dim, 3, stride, padding=1) for each in widths)
        self.layer_norms = nn.ModuleList(nn.LayerNorm(output_dim) for _ in widths)

    def forward(self, frames: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for convolution, layer_norm in zip(self.convolutions, self.layer_norms, strict=True):
            frames = convolution(silenced(frames, mask).transpose(1, 2)).transpose(1, 2)
            frames = layer_norm(F.glu(frames, dim=-1))
            mask = every(self.stride, mask)
        return frames, mask


class StackMLPAdapter(Adapter, kind="stack_mlp"):
    """`stride` consecutive frames as one wide frame, then two linear layers (arXiv 2402.08846)."""

    def __init__(self, input_dim: int, output_dim: int, stride: int = 2) -> None:
        super().__init__(input_dim, output_dim, **at_least_one(stride=stride))
        self.stride = stride
        self.mlp = nn.Sequential(
            nn.Linear(stride * input_dim, 4 * output_dim),
            nn.GELU(),
            nn.Linear(4 * output_dim, output_dim),
            nn.LayerNorm(output_dim),
        )

    def forward(self, frames: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.mlp(windows(silenced(frames, mask), self.stride).flatten(2)), every(self.stride, mask)


class TransformerAdapter(Adapter, kind="transformer"):
    """A projection to the decoder's width and pre-norm Transformer layers over the whole utterance."""

    def __init__(
        self, input_dim: int, output_dim: int, num_layers: int = 2, num_heads: int = 4, dropout: float = 0.1
    ) -> None:
        settings = at_least_one(num_layers=num_layers, num_heads=num_heads)
        super().__init__(input_dim, output_dim, **settings, dropout=dropout)
        self.projection = nn.Linear(input_dim, output_dim)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(**layer_options(output_dim, num_heads, dropout)) for _ in range(num_layers)
        )
        self.layer_norm = nn.LayerNorm(output_dim)

    def forward(self, frames: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        frames = self.projection(silenced(frames, mask))
        for layer in self.layers:
            frames = layer(frames, src_key_padding_mask=unattended(mask))
        return self.layer_norm(frames), mask


class QFormerAdapter(Adapter, kind="qformer"):
    """Learned queries that attend to each window of frames, the window-level Q-Former of SALMONN (arXiv 2310.13289).

    Makes `num_queries` frames of `window` frames. The frames carry their positions: the encoder has put them there.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        window: int = 8,
        num_queries: int = 4,
        num_layers: int = 2,
        num_heads: int = 4,
        dropout: float = 0.1,
    ) -> None:
        settings = at_least_one(window=window, num_queries=num_queries, num_layers=num_layers, num_heads=num_heads)
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
        frames = windows(self.projection(silenced(frames, mask)), self.window)  # (B, W, window, D)
        real = windows(real[..., None], self.window)[..., 0]
        batch_size, num_windows = frames.shape[:2]
        attended, ignored = frames.flatten(0, 1), unattended(real.flatten(0, 1))
        queries = self.queries.expand(batch_size * num_windows, -1, -1)
        for layer in self.layers:
            queries = layer(queries, attended, memory_key_padding_mask=ignored)
        mask = every(self.window, mask)
        made = self.layer_norm(queries).reshape(batch_size, num_windows * self.num_queries, -1)
        return made, None if mask is None else mask.repeat_interleave(self.num_queries, dim=1)


def silenced(frames: Tensor, mask: Tensor | None) -> Tensor:
    """The frames with zeros in the padding, whatever was there, NaN included."""
    return frames if mask is None else frames.masked_fill(mask[..., None] == 0, 0.0)


def every(stride: int, mask: Tensor | None) -> Tensor | None:
    """(B, T) mask -> (B, ceil(T / stride)) mask of what is made of `stride` frames each."""
    return None if mask is None else mask[:, ::stride]


def windows(frames: Tensor, size: int) -> Tensor:
    """(B, T, E) -> (B, ceil(T / size), size, E), the last window filled with zeros."""
    filled = F.pad(frames, (0, 0, 0, -frames.shape[1] % size))
    return filled.reshape(len(frames), -1, size, frames.shape[2])


def unattended(mask: Tensor | None) -> Tensor | None:
    """Where attention does not look. A row that is all padding looks everywhere: a softmax over nothing is NaN."""
    return None if mask is None else (mask == 0) & (mask != 0).any(-1, keepdim=True)


def layer_options(width: int, num_heads: int, dropout: float) -> dict[str, Any]:
    """Of PyTorch's Transformer layers. Raises UserError for a number of heads that does not divide the width."""
    if width % num_heads:
        raise UserError(
            f"adapter.num_heads={num_heads}: it does not divide the decoder's width, {width}",
            f"adapter.num_heads={max(each for each in range(1, num_heads) if width % each == 0)}",
        )
    return {
        "d_model": width,
        "nhead": num_heads,
        "dim_feedforward": 4 * width,
        "dropout": dropout,
        "activation": "gelu",
        "batch_first": True,
        "norm_first": True,
    }


def at_least_one(**settings: int) -> dict[str, int]:
    """The settings as they are. Raises UserError for one below 1."""
    for name, value in settings.items():
        if value < 1:
            raise UserError(f"adapter.{name}={value}: an adapter needs at least one", f"adapter.{name}=1 or more")
    return settings
