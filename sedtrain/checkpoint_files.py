"""Checkpoint files: written whole or not at all, with a digest at their end, read without running any code."""

import hashlib
import logging
import os
import pickle
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from lightning.fabric.plugins import CheckpointIO

from sedtrain.batch import UserError
from sedtrain.run_folder import BEST, LAST, PREVIOUS

logger = logging.getLogger(__name__)

MARK = b"\nsha256:"
TRAILER_BYTES = len(MARK) + 64  # behind the zip archive, which readers of zip files pass over
CHUNK_BYTES = 1 << 22


class Hashed:
    """A file for writing that knows the SHA-256 of what went into it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Writes beside the file and then takes its place; the one that `last.ckpt` replaces stays as `previous.ckpt`.

    Whenever the process is killed, a whole checkpoint lies under one of these names. Raises OSError where it cannot be
    written, such as on a full disk, and leaves everything as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            hashed = Hashed(file)
            torch.save(content, cast(IO[bytes], hashed))
            file.write(MARK + hashed.sha256.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error.__context__, OSError):  # torch raises an error of its own over it
            raise error.__context__ from None
        raise
    if path.name == LAST and path.exists():
        path.replace(path.with_name(PREVIOUS))
    unfinished.replace(path)
    sync_folder(path.parent)


def set_aside_damaged(folder: Path) -> None:
    """Renames a damaged `last.ckpt`, which at the next write would take the place of the whole one before it."""
    last = folder / LAST
    if last.is_file() and not is_whole(last):
        last.replace(last.with_name(f"{LAST}.damaged"))


def sync_folder(folder: Path) -> None:
    """Brings the new names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_whole(path: Path) -> bool:
    """Whether a file ends with the digest of what stands before it."""
    size = path.stat().st_size - TRAILER_BYTES
    if size <= 0:
        return False
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(min(CHUNK_BYTES, size - file.tell())):
            sha256.update(chunk)
        return file.read() == MARK + sha256.hexdigest().encode()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a whole checkpoint, on the CPU; raises UserError for any other file."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such checkpoint", "resume=auto, or resume=FILE of a run's checkpoints")
    if not is_whole(path):
        raise UserError(
            f"{path}: this checkpoint is damaged: its digest is not that of its content",
            f"the {PREVIOUS} or best.ckpt beside it; resume=auto takes the newest that is whole",
        )
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: this checkpoint holds more than numbers and plain values, and could run code: {error}",
            "a checkpoint that a training of sedtrain wrote",
        ) from error
    return content


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint of a folder that is not damaged, None where there is none; raises UserError where all are."""
    last = folder / LAST
    if last.is_file() and is_whole(last):
        return last
    found = [path for path in (folder / BEST, last, folder / PREVIOUS) if path.is_file()]
    if not found:
        return None
    steps = {path: read_checkpoint(path)["global_step"] for path in found if is_whole(path)}
    if not steps:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{folder}: every checkpoint is damaged: {names}", "run_dir=ANOTHER_FOLDER, to train anew")
    newest = max(steps, key=lambda path: steps[path])
    logger.warning("%s is missing or damaged; continuing from %s", last, newest.name)
    return newest


class CheckpointFiles(CheckpointIO):
    """How Lightning writes and reads checkpoints."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Whatever `map_location` and `weights_only` say: onto the CPU, and without running code."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)
