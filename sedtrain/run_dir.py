"""The folder of a run: paths of its files, its lock, and writing files whole."""

import errno
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from sedtrain.errors import UserError

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
"""The newest checkpoint, the one before it, and that of the best validation; a run can resume from each."""
LOCK_SECONDS = 5
"""How long to wait for the lock: workers of a killed process hold it for a moment longer."""

logger = logging.getLogger(__name__)


def model_of(checkpoint: str) -> str:
    """The argument of `from_pretrained`: the model inside a run's folder, or else the checkpoint itself, maybe a Hub id."""
    folder = Path(checkpoint).expanduser()
    return str(next((path for path in (folder / "model", folder) if path.is_dir()), checkpoint))


def config_of(checkpoint: str) -> Path:
    """The resolved configuration of a run. Only runs have this file, other checkpoints do not."""
    return Path(checkpoint).expanduser() / "config.yaml"


def checkpoints_of(run: str) -> Path:
    return Path(run).expanduser() / "checkpoints"


def is_finished(run: str) -> bool:
    """True if a run has trained and scored its model. The model card is the last file that it writes."""
    card = Path(run).expanduser() / "model" / "README.md"
    return card.is_file() and card.stat().st_size > 0


def claim(run: Path) -> FileLock:
    """Locks a run's folder until this process ends. Raises UserError if another process holds the lock."""
    lock = FileLock(run / ".lock", timeout=LOCK_SECONDS, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        write = "write run_dir=ANOTHER_FOLDER, or wait until that process has ended"
        raise UserError("run_dir", str(run), "another process is at work in this folder", write) from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        logger.warning("run_dir=%s: this disk has no locks; make sure that no other process uses the folder", run)
    return lock


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Raises UserError of the option `out` where the system refuses to write."""
    try:
        yield
    except OSError as error:
        write = "write out=FOLDER that you may write to, on a disk with room"
        raise UserError("out", str(folder), f"cannot be written to: {error}", write) from error


def write_whole(path: Path, content: str | Callable[[BinaryIO], object], keep: Path | None = None) -> None:
    """Writes a file whole or not at all, even if a kill or a power cut interrupts it. For one process at a time.

    The unfinished file has a fixed name beside the final one, so kills leave at most one. An exception removes it.

    content: the text, or a function that writes to the open file
    keep: path for the replaced file
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(content.encode()) if isinstance(content, str) else content(file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            path.replace(keep)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the new names durable
    finally:
        os.close(folder)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON, whole or not at all. NaN and infinity, which JSON lacks, become null."""
    write_whole(path, json.dumps(without_nan(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keep_until(step: int, file: Path) -> None:
    """Drops a truncated last line, and the entries of later steps, which the resumed run writes again."""
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        write_whole(file, "".join(line for line in lines if line.endswith("\n") and step_of(line) <= step))


def step_of(line: str) -> int:
    """The step in a line of JSON; 0 without one."""
    try:
        return int(json.loads(line).get("step", 0))
    except (ValueError, AttributeError):
        return 0
