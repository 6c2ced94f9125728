"""Checkpoint files: written whole, verified by a digest, read without running code; which one a run resumes from."""

import hashlib
import logging
import pickle
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from lightning.fabric.plugins import CheckpointIO

from sedtrain.errors import UserError
from sedtrain.launch import is_first
from sedtrain.plain import plain_value
from sedtrain.run_dir import BEST, LAST, PREVIOUS, checkpoints_of, config_of, is_finished, keep_until, write_whole

logger = logging.getLogger(__name__)

MARK = b"\nsha256:"
TRAILER_BYTES = len(MARK) + 64  # behind the zip archive, where readers of zip files ignore it
CHUNK_BYTES = 1 << 22

FREE = {
    "run_dir", "resume", "logger", "activation_checkpointing", "compile", "packing", "checkpoint", "audio",
    "vocabulary_texts", "hub", "dry_run", "export", "serve",
    "callbacks.average.dirpath", "data.folder", "data.num_workers", "data.keep_decoded_hours", "data.cache_gb",
    "trainer.accelerator", "trainer.devices", "trainer.enable_progress_bar", "trainer.inference_mode",
    "trainer.log_every_n_steps", "trainer.max_time", "trainer.num_nodes", "trainer.strategy", "data.max_bad_fraction",
    "data.on_bad_utterance",
}  # fmt: skip
"""Settings that may change when a run resumes: they decide where and how fast the same weights are computed."""
NOT_SCORED_ANEW = {"split", "data.test_split"}
"""Settings that may change while a run has not finished: they decide what its model is scored on."""
AVERAGES = ("callbacks.ema", "callbacks.average")
"""Callbacks that decide the weights; all others may come and go."""
LISTS = ("skipped.jsonl", "bad_steps.jsonl")
"""Files of a run with a line of JSON for each entry; most lines name their step."""


class Hashed:
    """A file for writing that computes the SHA-256 of what is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint with its digest; the `last.ckpt` that is replaced stays as `previous.ckpt`.

    Whenever the process is killed, a whole checkpoint lies under one of these names. Raises OSError where it cannot be
    written, such as on a full disk, and leaves everything as it was.
    """

    def write(file: BinaryIO) -> None:
        hashed = Hashed(file)
        torch.save(content, cast(IO[bytes], hashed))
        file.write(MARK + hashed.sha256.hexdigest().encode())

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_whole(path, write, keep=path.with_name(PREVIOUS) if path.name == LAST else None)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch raises an error of its own over it
            raise error.__context__ from None
        raise


def set_aside_damaged(folder: Path) -> None:
    """Renames a damaged `last.ckpt`; the next write would put it in the place of the whole `previous.ckpt`."""
    last = folder / LAST
    if last.is_file() and not is_whole(last):
        last.replace(last.with_name(f"{LAST}.damaged"))


def is_whole(path: Path) -> bool:
    """True if a file ends with the digest of what stands before it."""
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
        instead = "write resume=auto, or resume=FILE of a run's checkpoints"
        raise UserError("resume", str(path), "there is no such checkpoint", instead)
    if not is_whole(path):
        wrong = f"this checkpoint is damaged: {path.name} has another digest than its content"
        instead = f"write resume={path.with_name(PREVIOUS)} or {BEST}; resume=auto takes the newest that is whole"
        raise UserError("resume", str(path), wrong, instead)
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wrong = f"this checkpoint holds more than numbers and plain values, and could run code: {error}"
        raise UserError("resume", str(path), wrong, "write resume=FILE that sedtrain has written") from error
    return content


def newest_whole(folder: Path) -> Path | None:
    """The newest undamaged checkpoint of a folder; None without checkpoints. Raises UserError where all are damaged."""
    last = folder / LAST
    if last.is_file() and is_whole(last):
        return last
    if last.is_dir():
        write = f"write mv {last} ANOTHER_PLACE in your shell, then resume"
        raise UserError("run_dir", str(folder.parent), f"its {LAST} is a folder, not a checkpoint", write)
    found = [path for path in (folder / BEST, last, folder / PREVIOUS) if path.is_file()]
    if not found:
        return None
    steps = {path: read_checkpoint(path)["global_step"] for path in found if is_whole(path)}
    if not steps:
        names = ", ".join(path.name for path in found)
        wrong = f"every checkpoint of this run is damaged: {names}"
        raise UserError("run_dir", str(folder.parent), wrong, "write run_dir=ANOTHER_FOLDER, to train anew")
    newest = max(steps, key=lambda path: steps[path])
    logger.warning("%s is missing or damaged; continuing from %s", last, newest.name)
    return newest


class CheckpointFiles(CheckpointIO):
    """Has Lightning write and read checkpoints in this way."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Onto the CPU and without running code, whatever `map_location` and `weights_only` say."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


# --- what `resume` means


def starting_point(resume: str, run_dir: Path, settings: Mapping[str, Any]) -> Path | None:
    """The checkpoint that `resume` means, verified; None to start anew.

    settings: the whole configuration as plain values

    Raises UserError where there is none that is whole, or where the run of this folder had other settings.
    """
    if resume == "none":
        return None
    if resume != "auto":
        return checkpoint_of(resume)
    start = newest_whole(checkpoints_of(str(run_dir)))
    if start is None:
        forget(run_dir)
        return None
    refuse_other_settings(run_dir, settings)
    step = read_checkpoint(start)["global_step"]
    logger.info("continuing from %s, step %d", start, step)
    if is_first():
        for name in LISTS:
            keep_until(step, run_dir / name)
    return start


def checkpoint_of(name: str) -> Path:
    """The checkpoint of that name, or the newest of the run in that folder; raises UserError where there is none."""
    path = Path(name).expanduser()
    newest = newest_whole(checkpoints_of(name)) if path.is_dir() else path
    if newest is None or not newest.is_file():
        instead = f"write resume=auto, resume=none or resume=RUN/checkpoints/{LAST}"
        raise UserError("resume", name, "there is no such checkpoint", instead)
    if "optimizer_states" not in read_checkpoint(newest):
        instead = f"write resume=RUN, or its checkpoints/{LAST}"
        raise UserError("resume", str(newest), "this checkpoint holds weights alone", instead)
    return newest


def forget(folder: Path) -> None:
    """Removes what a run wrote that was killed before its first checkpoint."""
    if is_first():
        for name in ("metrics.csv", "samples.jsonl", *LISTS):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def refuse_other_settings(run_dir: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError with the settings of this folder's run that differ and would change its weights, or scores that exist.

    What the run was not asked, such as an option of a later version, was false then.
    """
    stored, own = config_of(str(run_dir)), checkpoints_of(str(run_dir)) / LAST
    another = f"resume={own} run_dir=ANOTHER_FOLDER to start another run from it"
    if not stored.exists():
        wrong = "its config.yaml is missing: nothing says with which settings its checkpoints were trained"
        raise UserError("run_dir", str(run_dir), wrong, f"write {another}")
    written = plain_value(stored, "run_dir", str(run_dir), f"write {another}")
    if not isinstance(written, dict):
        raise UserError("run_dir", str(run_dir), "its config.yaml holds no options", f"write {another}")
    free = FREE if is_finished(str(run_dir)) else FREE | NOT_SCORED_ANEW
    before, now = (dict(decisive(settings, free)) for settings in (written, settings))
    before |= {name: False for name, value in now.items() if value is False and name not in before}
    changed = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    if changed:
        listed = "".join(f"\n  {name}: {before.get(name)} then, {now.get(name)} now" for name in changed)
        wrong = f"this folder holds a run with other settings:{listed}"
        raise UserError("run_dir", str(run_dir), wrong, f"write the settings of that run, or {another}")


def decisive(config: Mapping[Any, Any], free: set[str], path: str = "") -> Iterator[tuple[str, Any]]:
    """The settings by dotted name that are not `free`; a list is one value."""
    for key, value in config.items():
        name = f"{path}{key}"
        if name in free or (path == "callbacks." and name not in AVERAGES):
            continue
        if isinstance(value, dict) and value:
            yield from decisive(value, free, f"{name}.")
        else:
            yield name, value
