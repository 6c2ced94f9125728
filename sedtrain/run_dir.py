"""The folder of a run: where its files lie, and how a file is written whole."""

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
"""The newest checkpoint, the one before it, and the checkpoint of the best validation; a run resumes from any of them."""
SECONDS_FOR_ORPHANS = 5

logger = logging.getLogger(__name__)


def model_of(checkpoint: str) -> str:
    """The argument of `from_pretrained`: the model within a run's folder, else the checkpoint, maybe the Hub's name of one."""
    folder = Path(checkpoint).expanduser()
    return str(next((path for path in (folder / "model", folder) if path.is_dir()), checkpoint))


def config_of(checkpoint: str) -> Path:
    """The resolved configuration of a run; no other checkpoint has this file."""
    return Path(checkpoint).expanduser() / "config.yaml"


def checkpoints_of(run: str) -> Path:
    return Path(run).expanduser() / "checkpoints"


def is_finished(run: str) -> bool:
    """True if a run has trained and scored its model: the model card is the last file that it writes."""
    card = Path(run).expanduser() / "model" / "README.md"
    return card.is_file() and card.stat().st_size > 0


def claim(run: Path) -> FileLock:
    """The lock of a run's folder, which ends with this process. Raises UserError where another process holds it.

    A process that was killed leaves workers that hold it for a moment longer.
    """
    lock = FileLock(run / ".lock", timeout=SECONDS_FOR_ORPHANS, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        write = "write run_dir=ANOTHER_FOLDER, or wait until that process has ended"
        raise UserError("run_dir", str(run), "another process is at work in this folder", write) from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        logger.warning("run_dir=%s: this disk knows no locks; take care that no other process uses the folder", run)
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
    """Writes a file whole or not at all, also through a kill or a power cut; one process at a time.

    The unfinished file always has the same name beside it, so that kills leave at most one; it is removed if writing raises.

    content: the text, or a function that writes to the open file
    keep: where the file that is replaced goes
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
        os.fsync(folder)  # the names
    finally:
        os.close(folder)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON, whole or not at all; NaN, for which JSON has no word, becomes null."""
    write_whole(path, json.dumps(without_nan(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keep_until(step: int, file: Path) -> None:
    """Drops the lines of JSON of later steps, which the run writes again, and a last line that is truncated."""
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        write_whole(file, "".join(line for line in lines if line.endswith("\n") and step_of(line) <= step))


def step_of(line: str) -> int:
    """The step that a line of JSON names, 0 where it names none."""
    try:
        return int(json.loads(line).get("step", 0))
    except (ValueError, AttributeError):
        return 0
