"""Weights of Flax models (`flax_model.msgpack`): named arrays, read without flax and without running code.

A file is a tree of msgpack maps. A leaf is an extension with [shape, dtype, bytes]; an array beyond 1 GB is a map of chunks.

The package msgpack would read it too, but lets a stranger's file grow: 19 MB of nested lists took 1.3 GB. This reader takes
as much memory as the arrays, and names the byte where a file is damaged.
"""

import math
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import cached_file

from sedtrain.errors import UserError
from sedtrain.models.foreign import fault_of_index
from sedtrain.plain import plain_value

FILE, INDEX = "flax_model.msgpack", "flax_model.msgpack.index.json"
TORCH_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
CHUNKED = "__msgpack_chunked_array__"
ARRAY = 1  # code of an extension that holds an array; 2 is a complex number, 3 a numpy scalar
ITEM_KINDS = {  # first byte of an item -> its kind, and the number of bytes that hold its size or value
    **{0xC4 + width: ("bytes", 1 << width) for width in range(3)},
    **{0xC7 + width: ("extension", 1 << width) for width in range(3)},
    **{0xCC + width: ("number", 1 << width) for width in range(4)},
    **{0xD9 + width: ("text", 1 << width) for width in range(3)},
    **{0xDC + width: ("list", 2 << width) for width in range(2)},
    **{0xDE + width: ("map", 2 << width) for width in range(2)},
}
WRITE = "write {}=FOLDER saved by save_pretrained of a Flax or PyTorch model"
MOST_DEPTH, MOST_NAMES, MOST_DIMENSIONS = 32, 200_000, 8
STACKED = re.compile(r"\.Flax\w+Layers\.")  # nn.scan saves a weight of all layers as one array


class Unreadable(ValueError):
    """The file holds something other than named arrays; the message says what and where."""


class Items:
    """Reads the items of a msgpack file in order, without copying, and refuses those that go beyond its end."""

    def __init__(self, content: memoryview) -> None:
        self.content, self.position, self.num_names = content, 0, 0

    def take(self, length: int) -> memoryview:
        end = self.position + length
        if end > len(self.content):
            raise Unreadable(f"an item of {length:,} bytes at byte {self.position:,} goes beyond its end")
        taken, self.position = self.content[self.position : end], end
        return taken

    def header(self) -> tuple[str, int]:
        """The kind of the next item, and its size in bytes or items; for a number or flag, its value."""
        code = self.take(1)[0]
        if code < 0x80:
            return "number", code
        if code < 0xC0:
            return ("map", code & 15) if code < 0x90 else ("list", code & 15) if code < 0xA0 else ("text", code & 31)
        if code in (0xC2, 0xC3):
            return "flag", code & 1
        if 0xD4 <= code <= 0xD8:
            return "extension", 1 << (code - 0xD4)
        if code not in ITEM_KINDS:
            raise Unreadable(f"byte {self.position - 1:,} is {code:#x}, which begins no map, text or array")
        kind, width = ITEM_KINDS[code]
        return kind, int.from_bytes(self.take(width), "big")

    def expect(self, wanted: str) -> int:
        kind, size = self.header()
        if kind != wanted:
            raise Unreadable(f"a {kind} ends at byte {self.position:,} where a {wanted} belongs")
        return size

    def text(self) -> str:
        return str(self.take(self.expect("text")), "utf-8")

    def tree(self, depth: int = 0) -> Any:
        """The next item: a Tensor, a number, a flag, or a dict of such items."""
        kind, size = self.header()
        if kind in ("number", "flag"):
            return size
        if kind == "extension":
            code, content = self.take(1)[0], self.take(size)
            if code != ARRAY:
                raise Unreadable(f"extension {code} at byte {self.position:,} is no array")
            return Items(content).array()
        if kind != "map" or depth == MOST_DEPTH:
            raise Unreadable(f"a {kind} in {depth} maps at byte {self.position:,} is no map of arrays")
        self.num_names += size
        if self.num_names > MOST_NAMES:
            raise Unreadable(f"it has more than {MOST_NAMES:,} names")
        return unchunked({self.text(): self.tree(depth + 1) for _ in range(size)})

    def array(self) -> Tensor:
        """The array in an extension: [shape, dtype, bytes]."""
        if self.expect("list") != 3 or (dimensions := self.expect("list")) > MOST_DIMENSIONS:
            raise Unreadable("an array is no shape, dtype and bytes")
        shape = [self.expect("number") for _ in range(dimensions)]
        if (name := self.text()) not in DTYPES:
            raise Unreadable(f"an array of {name[:40]!r} holds no weights")
        dtype, size = DTYPES[name], self.expect("bytes")
        if not size or math.prod(shape) * dtype.itemsize != size:
            raise Unreadable(f"an array of the shape {tuple(shape)} in {name} has {size:,} bytes")
        return torch.frombuffer(bytearray(self.take(size)), dtype=dtype).view(shape)


def unchunked(tree: dict[str, Any]) -> Any:
    """The map, or the array that it holds in chunks."""
    if CHUNKED not in tree:
        return tree
    shape, chunks = (in_order(tree.get(name)) for name in ("shape", "chunks"))
    kinds = [(shape, int), (chunks, Tensor)]
    if not chunks or not all(isinstance(item, kind) for items, kind in kinds for item in items):
        raise Unreadable("the chunks of an array are no shape and arrays")
    flat = torch.cat([chunk.flatten() for chunk in chunks])
    if math.prod(shape) != flat.numel():
        raise Unreadable(f"an array of the shape {tuple(shape)} has chunks of {flat.numel():,} numbers")
    return flat.view(shape)


def in_order(tree: Any) -> list[Any]:
    """The values of {"0": ..., "1": ...}; Flax saves lists so."""
    return [tree.get(str(number)) for number in range(len(tree))] if isinstance(tree, dict) else []


def read_arrays(file: Path) -> dict[str, Tensor]:
    """The arrays of a file; names are paths in the tree, joined by dots. Raises Unreadable for anything else."""
    if not file.stat().st_size:
        raise Unreadable("it is empty")
    with file.open("rb") as opened:
        content = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    items = Items(content)
    arrays = dict(leaves(items.tree()))
    if items.position < len(content):
        raise Unreadable(f"its tree ends at byte {items.position:,} of {len(content):,}")
    return arrays


def leaves(tree: Any, *names: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, dict):
        for name, branch in tree.items():
            yield from leaves(branch, *names, name)
    elif isinstance(tree, Tensor) and names:
        yield ".".join(names), tree
    else:
        raise Unreadable(f"{'.'.join(names)[:200]!r} is no array")


def as_in_torch(name: str, array: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Converts an array of Flax to PyTorch's name and layout; yields one weight, or one for each layer."""
    last = name.rpartition(".")[2]
    if (stacked := STACKED.search(name)) and array.dim():
        for number, layer in enumerate(array):
            yield from as_in_torch(name.replace(stacked[0], f".{number}.", 1), layer)
    elif last == "kernel":  # (inputs, outputs); (width, inputs, outputs) for a convolution
        yield f"{name.removesuffix(last)}weight", array.permute(*reversed(range(array.dim()))).contiguous()
    else:
        yield (f"{name.removesuffix(last)}weight" if last in ("scale", "embedding") else name), array


def flax_weights(option: str, name: str, hub_options: dict[str, Any]) -> dict[str, Tensor]:
    """The Flax weights of a folder or Hub id, with PyTorch's names and layout. Raises UserError if there are none."""
    weights: dict[str, Tensor] = {}
    for file in flax_files(option, name, hub_options):
        try:
            arrays = read_arrays(file)
        except ValueError as error:
            raise no_weights(option, name, f"{file.name} is no file of Flax weights: {error}") from error
        for path in list(arrays):
            weights.update(as_in_torch(path, arrays.pop(path)))  # pop frees the array of Flax
    for shared in [key for key in weights if key.endswith("shared.weight")]:  # BART's encoder and decoder share it
        weights.setdefault(f"{shared.removesuffix('shared.weight')}decoder.embed_tokens.weight", weights[shared])
    return weights


def flax_files(option: str, name: str, hub_options: dict[str, Any]) -> list[Path]:
    """The files with Flax weights in a folder or Hub id. Raises UserError if there are none, or the index is damaged."""

    def stored(file: str) -> Path | None:
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub_options)
        return None if found is None else Path(found)

    if file := stored(FILE):
        return [file]
    if (index := stored(INDEX)) is None:
        raise no_weights(option, name, f"it holds neither {FILE} nor {INDEX}")
    values = plain_value(index, option, name, WRITE.format(option))
    if wrong := fault_of_index(values):
        raise no_weights(option, name, f"{INDEX} {wrong}")
    shards = {file: stored(file) for file in sorted(set(values["weight_map"].values()))}
    if absent := [file for file, path in shards.items() if path is None]:
        raise no_weights(option, name, f"{INDEX} names {absent[0][:200]!r}, which is not there")
    return [path for path in shards.values() if path is not None]


def no_weights(option: str, name: str, wrong: str) -> UserError:
    return UserError(option, name, wrong, WRITE.format(option))


def generation_config_of(name: str, hub_options: dict[str, Any]) -> GenerationConfig:
    """The generation config of a folder or Hub id; without that file, from the generation settings in config.json."""
    try:
        return GenerationConfig.from_pretrained(name, **hub_options)
    except OSError:
        return GenerationConfig.from_pretrained(
            name, config_file_name="config.json", _from_model_config=True, **hub_options
        )
