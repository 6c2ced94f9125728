"""Outputs of the frozen front of a model, kept on disk: each utterance is encoded once, not once an epoch.

Every utterance is encoded alone and rounded to 16 bits, whether it is kept or not. So what the model sees of it does not
depend on what the cache holds: a run that resumes, shares the cache or finds it full computes the same numbers.

B batch, S inputs (samples or feature frames), T frames, D width.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from sedtrain.batch import Batch
from sedtrain.models.masking import MatrixProductFeatureEncoder

logger = logging.getLogger(__name__)

VERSION = 2  # to be counted up where other numbers are computed from the same inputs
DIGEST_BYTES = 32
LARGEST = torch.finfo(torch.float16).max
FILES_AT_ONCE = 8  # that a batch reads


class Front(NamedTuple):
    """The frozen module that begins the model, and its name there."""

    name: str
    module: nn.Module

    def output(self, inputs: Tensor, attention_mask: Tensor) -> Tensor:
        """(1, S) or (1, S, F) inputs without padding and their mask -> (T, D)."""
        if isinstance(self.module, MatrixProductFeatureEncoder):
            channels: Tensor = self.module(inputs)[0]
            return channels.T
        frames: Tensor = self.module(inputs, attention_mask=attention_mask, return_dict=True).last_hidden_state[0]
        return frames

    def padded(self, frames: list[Tensor]) -> Any:
        """Frames of each utterance -> what the module returns for all of them, with zeros where padded."""
        together = pad_sequence(frames, batch_first=True)
        if isinstance(self.module, MatrixProductFeatureEncoder):
            return together.transpose(1, 2)
        return BaseModelOutput(last_hidden_state=together)


def frozen_front(model: Any) -> Front | None:
    """The whole encoder if none of its weights moves, else its convolutions of the waveform if none of theirs does."""
    for name, module in model.encoder.named_modules(prefix="encoder"):  # the encoder itself comes first
        begins = module is model.encoder or isinstance(module, MatrixProductFeatureEncoder)
        if begins and not any(weight.requires_grad for weight in module.parameters()):
            return Front(name, module)
    return None


class Store:
    """A folder with a file for each utterance, which processes share; a damaged file is as good as none.

    folder: of all stores, each named by its `key`
    most_bytes: of all stores; this process may add its share
    """

    def __init__(self, folder: Path, key: str, most_bytes: float, num_ranks: int) -> None:
        self.folder, self.most_bytes, self.num_ranks = folder / key, most_bytes, num_ranks
        self.left, self.is_full = self.share(), False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.utime(self.folder)  # now is its last use
        except OSError as error:
            self.stop(self.folder, error)

    def share(self) -> int:
        """Bytes that this process may still add."""
        return int(self.most_bytes - size_of(self.folder.parent)) // self.num_ranks

    def file(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def read(self, key: str) -> Tensor | None:
        """(T, D) in 16 bits; None where there is no such file, or not as it was written."""
        try:
            content = self.file(key).read_bytes()
        except OSError:
            return None
        if content[:DIGEST_BYTES] != digest(key, content[DIGEST_BYTES:]):
            return None
        try:
            return load(content[DIGEST_BYTES:])["frames"]
        except (SafetensorError, KeyError):
            return None

    def write(self, key: str, frames: Tensor) -> None:
        """Adds an utterance where there is room for it; files appear whole or not at all."""
        content = save({"frames": frames.contiguous()})
        content = digest(key, content) + content
        if self.is_full or not self.has_room(len(content)):
            return
        file = self.file(key)
        unfinished = file.with_name(f"{key}.{uuid4().hex}")  # other processes may write the same
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(content)
            unfinished.replace(file)
        except OSError as error:
            self.stop(file, error)
        finally:  # also where Ctrl-C ends the run
            unfinished.unlink(missing_ok=True)
        self.left -= len(content)

    def stop(self, path: Path, error: OSError) -> None:
        """Adds no more utterances."""
        self.is_full = True
        logger.warning("features are no longer cached, since %s cannot be written: %s", path, error)

    def has_room(self, num_bytes: int) -> bool:
        """True if so many bytes may be added; for them, stores are removed that were not used for longest."""
        if num_bytes > self.left:
            others = (each for each in self.folder.parent.iterdir() if each != self.folder)
            oldest_first = iter(sorted(others, key=last_use))
            while (left := self.share()) < num_bytes and (oldest := next(oldest_first, None)):
                shutil.rmtree(oldest, ignore_errors=True)
            self.left, self.is_full = left, left < num_bytes
            if self.is_full:
                logger.warning(
                    "the feature cache is full, and encodes the rest in every epoch; a higher data.cache_gb helps"
                )
        return not self.is_full


def size_of(folder: Path) -> int:
    """Bytes of all files in it; those that vanish meanwhile have none."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.path.getsize(os.path.join(place, name))
    return total


def digest(key: str, content: bytes) -> bytes:
    """Also tells a file that was moved to the place of another."""
    return hashlib.blake2b(content, key=key.encode(), digest_size=DIGEST_BYTES).digest()


class FeatureCache:
    """Gives a model what its frozen front returned earlier for the same inputs, weights and settings.

    store_of:     key -> the store of this name
    settings:     that decide the numbers beside the weights and the configuration, such as the precision
    time_is_last: in inputs of three dimensions
    """

    def __init__(
        self, store_of: Callable[[str], Store], settings: Mapping[str, Any], time_is_last: bool = False
    ) -> None:
        self.store_of, self.settings, self.time_is_last = store_of, settings, time_is_last
        self.opened: tuple[Front, Store] | None = None
        self.pool = ThreadPoolExecutor(FILES_AT_ONCE)

    @contextmanager
    def serve(self, model: Any, batch: Batch) -> Iterator[None]:
        """Inside, the frozen front of `model` returns its cached output of `batch`; what was not cached is computed.

        A front that has thawed is no longer served, nor is a batch without keys.
        """
        front = frozen_front(model) if batch.keys else None
        if front is None:
            yield
            return
        assert not front.module.training, "it would draw random numbers"
        output = front.padded(self.frames(front, self.store(front, model), batch))
        front.module.forward = lambda *args, **options: output
        try:
            yield
        finally:
            del front.module.forward

    def frames(self, front: Front, store: Store, batch: Batch) -> list[Tensor]:
        """(T, D) of each utterance."""
        weight = next(front.module.parameters())
        found = enumerate(self.pool.map(store.read, batch.keys))
        frames = [self.computed(front, store, batch, number) if each is None else each for number, each in found]
        return [each.to(weight.device, weight.dtype, non_blocking=True) for each in frames]

    def computed(self, front: Front, store: Store, batch: Batch, number: int) -> Tensor:
        """(T, D) of the utterance of this number, rounded to 16 bits and stored where these can hold it."""
        mask = batch.attention_mask[number : number + 1]
        length, inputs = int(batch.on_host.attention_mask[number].sum()), batch.inputs[number : number + 1]
        inputs = inputs[..., :length] if self.time_is_last else inputs[:, :length]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # draws none of the random numbers of training
            frames = front.output(inputs, mask[:, :length])
        if not frames.abs().max() <= LARGEST:  # or NaN
            return frames
        store.write(batch.keys[number], frames.half().cpu())
        return frames.half()

    def store(self, front: Front, model: Any) -> Store:
        """The store of the front as it is, opened once."""
        if self.opened is None or self.opened[0] != front:
            self.opened = front, self.store_of(key_of(front, model.encoder.config, self.settings))
        return self.opened[1]


def key_of(front: Front, config: PreTrainedConfig, settings: Mapping[str, Any]) -> str:
    """Another one for other weights, another configuration or attention, other settings, or other versions."""
    facts = {
        "versions": [VERSION, torch.__version__, transformers.__version__],
        "front": [front.name, type(front.module).__name__],
        "config": {name: value for name, value in config.to_dict().items() if name != "_name_or_path"},
        "attention": config._attn_implementation,
        "products": torch.get_float32_matmul_precision(),
        **settings,
    }
    hashed = hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16)
    for name, weight in front.module.state_dict().items():
        hashed.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        hashed.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()


def last_use(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0
