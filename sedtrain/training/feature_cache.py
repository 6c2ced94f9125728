"""Keeps the outputs of a frozen encoder, or of its frozen front end, on disk: each utterance is encoded once.

Every utterance is encoded alone and rounded to 16 bits, whether it is kept or not. So the numbers do not depend on the
state of the cache: a run that resumes, shares the cache or finds it full computes the same.

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

VERSION = 2  # increase it when the same inputs give other numbers
DIGEST_BYTES = 32
LARGEST = torch.finfo(torch.float16).max
NUM_READERS = 8  # threads


class Front(NamedTuple):
    """The frozen first module of a model, and its name there."""

    name: str
    module: nn.Module

    def output(self, inputs: Tensor, attention_mask: Tensor) -> Tensor:
        """Inputs (1, S) or (1, S, F) without padding, and their mask -> (T, D)."""
        if isinstance(self.module, MatrixProductFeatureEncoder):
            channels: Tensor = self.module(inputs)[0]
            return channels.T
        frames: Tensor = self.module(inputs, attention_mask=attention_mask, return_dict=True).last_hidden_state[0]
        return frames

    def padded(self, frames: list[Tensor]) -> Any:
        """Frames of each utterance -> the module's output for the batch, padded with zeros."""
        together = pad_sequence(frames, batch_first=True)
        if isinstance(self.module, MatrixProductFeatureEncoder):
            return together.transpose(1, 2)
        return BaseModelOutput(last_hidden_state=together)


def frozen_front(model: Any) -> Front | None:
    """The whole encoder if it is frozen, else its waveform convolutions if they are frozen, else None."""
    for name, module in model.encoder.named_modules(prefix="encoder"):  # the encoder itself comes first
        begins = module is model.encoder or isinstance(module, MatrixProductFeatureEncoder)
        if begins and not any(weight.requires_grad for weight in module.parameters()):
            return Front(name, module)
    return None


class Store:
    """A folder with one file per utterance, shared by processes. A damaged file counts as missing.

    folder: holds all stores, each in a folder named by its `key`
    max_bytes: limit of all stores together, divided among the ranks
    """

    def __init__(self, folder: Path, key: str, max_bytes: float, num_ranks: int) -> None:
        self.folder, self.max_bytes, self.num_ranks = folder / key, max_bytes, num_ranks
        self.left, self.is_full = self.share(), False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.utime(self.folder)  # marks it as used now
        except OSError as error:
            self.stop(self.folder, error)

    def share(self) -> int:
        """Bytes that this process may still add."""
        return int(self.max_bytes - size_of(self.folder.parent)) // self.num_ranks

    def file(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def read(self, key: str) -> Tensor | None:
        """(T, D) in 16 bits; None if the file is missing or damaged."""
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
        """Adds an utterance if there is room. Files appear whole or not at all."""
        content = save({"frames": frames.contiguous()})
        content = digest(key, content) + content
        if self.is_full or not self.has_room(len(content)):
            return
        file = self.file(key)
        unfinished = file.with_name(f"{key}.{uuid4().hex}")  # other processes may write the same utterance
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(content)
            unfinished.replace(file)
        except OSError as error:
            self.stop(file, error)
        finally:  # also after Ctrl-C
            unfinished.unlink(missing_ok=True)
        self.left -= len(content)

    def stop(self, path: Path, error: OSError) -> None:
        """Stops adding utterances."""
        self.is_full = True
        logger.warning("features are no longer cached, since %s cannot be written: %s", path, error)

    def has_room(self, num_bytes: int) -> bool:
        """True if `num_bytes` fit. Makes room by removing other stores, the least recently used first."""
        if num_bytes > self.left:
            others = (store for store in self.folder.parent.iterdir() if store != self.folder)
            oldest_first = iter(sorted(others, key=last_use))
            while (left := self.share()) < num_bytes and (oldest := next(oldest_first, None)):
                shutil.rmtree(oldest, ignore_errors=True)
            self.left, self.is_full = left, left < num_bytes
            if self.is_full:
                logger.warning(
                    "the feature cache is full: the rest is encoded in every epoch; a higher data.cache_gb helps"
                )
        return not self.is_full


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder. Files that vanish meanwhile count as empty."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.path.getsize(os.path.join(place, name))
    return total


def digest(key: str, content: bytes) -> bytes:
    """A digest of content and key, so that a file under another key's name counts as damaged."""
    return hashlib.blake2b(content, key=key.encode(), digest_size=DIGEST_BYTES).digest()


class FeatureCache:
    """Replaces the frozen front of a model by its earlier outputs for the same inputs, weights and settings.

    store_of:     key -> the store of this name
    settings:     that change the outputs beside weights and configuration, such as the precision
    time_is_last: inputs of three dimensions are (B, F, S), not (B, S, F)
    """

    def __init__(
        self, store_of: Callable[[str], Store], settings: Mapping[str, Any], time_is_last: bool = False
    ) -> None:
        self.store_of, self.settings, self.time_is_last = store_of, settings, time_is_last
        self.opened: tuple[Front, Store] | None = None
        self.pool = ThreadPoolExecutor(NUM_READERS)

    @contextmanager
    def serve(self, model: Any, batch: Batch) -> Iterator[None]:
        """Inside, the frozen front of `model` returns its cached output for `batch`, computing only missing utterances.

        Does nothing for a batch without keys, or once the front has thawed.
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
        frames = [self.computed(front, store, batch, row) if cached is None else cached for row, cached in found]
        return [tensor.to(weight.device, weight.dtype, non_blocking=True) for tensor in frames]

    def computed(self, front: Front, store: Store, batch: Batch, row: int) -> Tensor:
        """(T, D) of one utterance, rounded to 16 bits and stored, unless a value is too large for 16 bits or NaN."""
        mask = batch.attention_mask[row : row + 1]
        length, inputs = int(batch.on_host.attention_mask[row].sum()), batch.inputs[row : row + 1]
        inputs = inputs[..., :length] if self.time_is_last else inputs[:, :length]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # leaves the random numbers of training alone
            frames = front.output(inputs, mask[:, :length])
        if not frames.abs().max() <= LARGEST:  # NaN compares false
            return frames
        store.write(batch.keys[row], frames.half().cpu())
        return frames.half()

    def store(self, front: Front, model: Any) -> Store:
        """The store for this front, opened once."""
        if self.opened is None or self.opened[0] != front:
            self.opened = front, self.store_of(key_of(front, model.encoder.config, self.settings))
        return self.opened[1]


def key_of(front: Front, config: PreTrainedConfig, settings: Mapping[str, Any]) -> str:
    """A digest of all that decides the outputs: weights, configuration, attention, settings, versions."""
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
    """Seconds since the epoch; 0 if the folder has vanished."""
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0
