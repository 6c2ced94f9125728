"""Weights of Flax models (`flax_model.msgpack`): named arrays, read without flax, and without running anything.

A file is a tree of msgpack maps. A leaf is an extension, [shape, dtype, bytes]; an array beyond 1 GB is a map of chunks.
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
from sedtrain.models.foreign import HUB_OPTIONS, fault_of_index
from sedtrain.models.rounded import in_float32
from sedtrain.plain import plain_value

FILE, INDEX = "flax_model.msgpack", "flax_model.msgpack.index.json"
OF_TORCH = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
CHUNKED = "__msgpack_chunked_array__"
ARRAY = 1  # extension of an array; a complex number is 2, a scalar of numpy 3
KINDS = {  # first code of each kind of item whose size follows in 1, 2, 4 or 8 bytes
    **{0xC4 + width: ("bytes", 1 << width) for width in range(3)},
    **{0xC7 + width: ("extension", 1 << width) for width in range(3)},
    **{0xCC + width: ("number", 1 << width) for width in range(4)},
    **{0xD9 + width: ("text", 1 << width) for width in range(3)},
    **{0xDC + width: ("list", 2 << width) for width in range(2)},
    **{0xDE + width: ("map", 2 << width) for width in range(2)},
}
WRITE = "write {}=FOLDER saved by save_pretrained of a Flax or PyTorch model"
MOST_DEPTH, MOST_NAMES, MOST_DIMENSIONS = 32, 200_000, 8
STACKED = re.compile(r"\.Flax\w+Layers\.")  # all layers in one array, as nn.scan saves them


class Unreadable(ValueError):
    """A file holds something other than named arrays; says what and where."""


class Items:
    """The items of a msgpack file, one after the other; each is within the file, and none is copied."""

    def __init__(self, content: memoryview) -> None:
        self.content, self.position, self.num_names = content, 0, 0

    def take(self, length: int) -> memoryview:
        end = self.position + length
        if end > len(self.content):
            raise Unreadable(f"an item of {length:,} bytes at byte {self.position:,} goes beyond its end")
        taken, self.position = self.content[self.position : end], end
        return taken

    def header(self) -> tuple[str, int]:
        """The kind of the next item, and its size in bytes or items; of a number its value."""
        code = self.take(1)[0]
        if code < 0x80:
            return "number", code
        if code < 0xC0:
            return ("map", code & 15) if code < 0x90 else ("list", code & 15) if code < 0xA0 else ("text", code & 31)
        if code in (0xC2, 0xC3):
            return "flag", code & 1
        if 0xD4 <= code <= 0xD8:
            return "extension", 1 << (code - 0xD4)
        if code not in KINDS:
            raise Unreadable(f"byte {self.position - 1:,} is {code:#x}, which begins no map, text or array")
        kind, width = KINDS[code]
        return kind, int.from_bytes(self.take(width), "big")

    def expect(self, wanted: str) -> int:
        kind, size = self.header()
        if kind != wanted:
            raise Unreadable(f"a {kind} ends at byte {self.position:,} where a {wanted} belongs")
        return size

    def text(self) -> str:
        return str(self.take(self.expect("text")), "utf-8")

    def tree(self, depth: int = 0) -> Any:
        """The next item: a dict of these, a Tensor, a number or a flag."""
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
        """[shape, dtype, bytes]"""
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
    """The map itself, or the array whose chunks it holds."""
    if CHUNKED not in tree:
        return tree
    shape, chunks = (in_order(tree.get(name)) for name in ("shape", "chunks"))
    kinds = [(shape, int), (chunks, Tensor)]
    if not chunks or not all(isinstance(each, kind) for several, kind in kinds for each in several):
        raise Unreadable("the chunks of an array are no shape and arrays")
    flat = torch.cat([chunk.flatten() for chunk in chunks])
    if math.prod(shape) != flat.numel():
        raise Unreadable(f"an array of the shape {tuple(shape)} has chunks of {flat.numel():,} numbers")
    return flat.view(shape)


def in_order(tree: Any) -> list[Any]:
    return [tree.get(str(number)) for number in range(len(tree))] if isinstance(tree, dict) else []


def read_arrays(file: Path) -> dict[str, Tensor]:
    """The arrays of a file by their names in the tree, joined by dots. Raises Unreadable for anything else in it."""
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
        for name, each in tree.items():
            yield from leaves(each, *names, name)
    elif isinstance(tree, Tensor) and names:
        yield ".".join(names), tree
    else:
        raise Unreadable(f"{'.'.join(names)[:200]!r} is no array")


def as_in_torch(name: str, array: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The weights of PyTorch that an array of Flax stands for: one, or one of each layer."""
    last = name.rpartition(".")[2]
    if (stacked := STACKED.search(name)) and array.dim():
        for number, layer in enumerate(array):
            yield from as_in_torch(name.replace(stacked[0], f".{number}.", 1), layer)
    elif last == "kernel":  # (inputs, outputs), or (width, inputs, outputs) of a convolution
        yield f"{name.removesuffix(last)}weight", array.permute(*reversed(range(array.dim()))).contiguous()
    else:
        yield (f"{name.removesuffix(last)}weight" if last in ("scale", "embedding") else name), array


def pretrained(
    factory: Any, name: Any, *args: Any, option: str = "checkpoint", from_flax: bool = False, **options: Any
) -> Any:
    """`factory.from_pretrained(name, ...)` without code of the model's; also of a folder or Hub id with weights of Flax.

    option: names it on the command line
    from_flax: false takes weights of Flax only from a folder without others
    """
    options.pop("trust_remote_code", None)
    hub_options = {each: options[each] for each in HUB_OPTIONS & options.keys()}
    folder = Path(name or "", hub_options.get("subfolder", ""))
    flax, torch_ = (any((folder / file).is_file() for file in files) for files in ((FILE, INDEX), OF_TORCH))
    if name is None or not (from_flax or (flax and not torch_)):
        loaded = factory.from_pretrained(name, *args, trust_remote_code=False, **options)
        if "quantization_config" not in options:
            in_float32(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded
    options = {"generation_config": generation_config_of(str(name), hub_options), **options}
    options["state_dict"] = flax_weights(option, str(name), hub_options)
    factory = getattr(factory, "_model_mapping", {}).get(type(options["config"]), factory)  # AutoModel needs a name
    loaded = factory.from_pretrained(None, *args, trust_remote_code=False, **options)
    (loaded[0] if isinstance(loaded, tuple) else loaded).config._name_or_path = str(name)
    return loaded


def flax_weights(option: str, name: str, hub_options: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in a folder or Hub id, named and laid out as in PyTorch. Raises UserError where there are none."""
    weights: dict[str, Tensor] = {}
    for file in flax_files(option, name, hub_options):
        try:
            arrays = read_arrays(file)
        except ValueError as error:
            raise no_weights(option, name, f"{file.name} is no file of Flax weights: {error}") from error
        for each in list(arrays):
            weights.update(as_in_torch(each, arrays.pop(each)))  # held once
    for each in [each for each in weights if each.endswith("shared.weight")]:  # of encoder and decoder, as in BART
        weights.setdefault(f"{each.removesuffix('shared.weight')}decoder.embed_tokens.weight", weights[each])
    return weights


def flax_files(option: str, name: str, hub_options: dict[str, Any]) -> list[Path]:
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
    shards = {each: stored(each) for each in sorted(set(values["weight_map"].values()))}
    if absent := [each for each, path in shards.items() if path is None]:
        raise no_weights(option, name, f"{INDEX} names {absent[0][:200]!r}, which is not there")
    return [path for path in shards.values() if path is not None]


def no_weights(option: str, name: str, wrong: str) -> UserError:
    return UserError(option, name, wrong, WRITE.format(option))


def generation_config_of(name: str, hub_options: dict[str, Any]) -> GenerationConfig:
    """The generation config of a folder or Hub id; of an old one without that file, what config.json says of generation."""
    try:
        return GenerationConfig.from_pretrained(name, **hub_options)
    except OSError:
        return GenerationConfig.from_pretrained(
            name, config_file_name="config.json", _from_model_config=True, **hub_options
        )
