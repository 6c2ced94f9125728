"""Checkpoint files: written whole, verified by a digest, read without running code; the random state that they hold."""

import hashlib
import logging
import pickle
import random
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO

from sedtrain.errors import UserError
from sedtrain.run_dir import BEST, LAST, PREVIOUS, write_whole

logger = logging.getLogger(__name__)

MARK = b"\nsha256:"
TRAILER_BYTES = len(MARK) + 64
"""MARK and digest follow the zip archive, where zip readers ignore them."""
CHUNK_BYTES = 1 << 22
INTACT: set[tuple[int, ...]] = set()
"""Device, inode, size and times of the files that this process has verified."""


class Hashed:
    """A file that computes the SHA-256 of all that is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint with its digest; a replaced `last.ckpt` stays as `previous.ckpt`.

    After a kill at any instant, one of these two is whole. Raises OSError if the file cannot be written, such as on a full
    disk, and then changes nothing.
    """

    def write(file: BinaryIO) -> None:
        hashed = Hashed(file)
        torch.save(content, cast(IO[bytes], hashed))
        file.write(MARK + hashed.sha256.hexdigest().encode())

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_whole(path, write, keep=path.with_name(PREVIOUS) if path.name == LAST else None)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch hides it behind an error of its own
            raise error.__context__ from None
        raise


def set_aside_damaged(folder: Path) -> None:
    """Renames a damaged `last.ckpt`, which the next write would otherwise move over the whole `previous.ckpt`."""
    last = folder / LAST
    if last.is_file() and not is_intact(last):
        last.replace(last.with_name(f"{LAST}.damaged"))


def is_intact(path: Path) -> bool:
    """True if the file ends with the digest of its content. An intact file is read once per process, until it changes."""
    found = path.stat()
    facts = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    if facts in INTACT:
        return True
    if not has_digest(path, found.st_size - TRAILER_BYTES):
        return False
    INTACT.add(facts)
    return True


def has_digest(path: Path, size: int) -> bool:
    """True if the digest of the first `size` bytes follows them."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(max(min(CHUNK_BYTES, size - file.tell()), 0)):
            sha256.update(chunk)
        return size > 0 and file.read() == MARK + sha256.hexdigest().encode()


def read_checkpoint(path: Path, mapped: bool = False) -> dict[str, Any]:
    """The content of a whole checkpoint, on the CPU. Raises UserError for any other file.

    mapped: leave each tensor in the file until it is used, for a reader of few of them
    """
    if not path.is_file():
        instead = "write resume=auto, or resume=FILE of a run's checkpoints"
        raise UserError("resume", str(path), "there is no such checkpoint", instead)
    if not is_intact(path):
        wrong = f"this checkpoint is damaged: the digest in {path.name} does not match its content"
        instead = f"write resume={path.with_name(PREVIOUS)} or {BEST}; resume=auto takes the newest that is whole"
        raise UserError("resume", str(path), wrong, instead)
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        wrong = f"this checkpoint could run code, since it holds more than numbers and plain values: {error}"
        raise UserError("resume", str(path), wrong, "write resume=FILE that sedtrain has written") from error
    return content


def newest_whole(folder: Path) -> Path | None:
    """The newest whole checkpoint of a folder; None without checkpoints. Raises UserError if all are damaged."""
    last = folder / LAST
    if last.is_file() and is_intact(last):
        return last
    if last.is_dir():
        write = f"write mv {last} ANOTHER_PLACE in your shell, then resume"
        raise UserError("run_dir", str(folder.parent), f"its {LAST} is a folder, not a checkpoint", write)
    found = [path for path in (folder / BEST, last, folder / PREVIOUS) if path.is_file()]
    if not found:
        return None
    steps = {path: read_checkpoint(path, mapped=True)["global_step"] for path in found if is_intact(path)}
    if not steps:
        names = ", ".join(path.name for path in found)
        wrong = f"every checkpoint of this run is damaged: {names}"
        raise UserError("run_dir", str(folder.parent), wrong, "write run_dir=ANOTHER_FOLDER, to train anew")
    newest = max(steps, key=lambda path: steps[path])
    logger.warning("%s is missing or damaged; continuing from %s", last, newest.name)
    return newest


class CheckpointFiles(CheckpointIO):
    """Has Lightning write and read checkpoints by the functions above."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Loads onto the CPU without running code, whatever `map_location` and `weights_only` say."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and PyTorch's generators, and of this process's GPU."""
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    keys = {**numpy["state"], "key": numpy["state"]["key"].tolist()}
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": keys},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
