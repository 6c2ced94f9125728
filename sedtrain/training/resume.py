"""What `resume` means: a fresh start, the newest checkpoint of the run's folder, or a checkpoint of another run."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from sedtrain.errors import UserError
from sedtrain.launch import is_first
from sedtrain.run_dir import LAST, checkpoints_of, config_of, keep_until
from sedtrain.training.checkpoint_files import newest_whole, read_checkpoint

logger = logging.getLogger(__name__)

FREE = {
    "run_dir", "resume", "logger", "activation_checkpointing", "compile", "checkpoint", "audio", "vocabulary_texts",
    "callbacks.average.dirpath", "data.folder", "data.num_workers", "data.keep_decoded_hours", "trainer.accelerator",
    "trainer.devices", "trainer.enable_progress_bar", "trainer.inference_mode", "trainer.log_every_n_steps",
    "trainer.max_time", "trainer.num_nodes", "trainer.strategy",
}  # fmt: skip
"""Settings that may change when a run resumes: they decide where and how fast the same weights are computed."""
AVERAGES = ("callbacks.ema", "callbacks.average")
"""Callbacks that decide the weights; all others may come and go."""
LISTS = ("skipped.jsonl", "bad_steps.jsonl")
"""Files of a run with a line of JSON for each entry, many of which say their step."""


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
    """Raises UserError with every setting that decides the weights and that the run in this folder has otherwise."""
    stored = config_of(str(run_dir))
    written = yaml.safe_load(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
    before, now = dict(decisive(written)), dict(decisive(settings))
    changed = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    if changed:
        listed = "".join(f"\n  {name}: {before.get(name)} then, {now.get(name)} now" for name in changed)
        instead = f"resume={checkpoints_of(str(run_dir)) / LAST} run_dir=ANOTHER_FOLDER"
        raise UserError(
            "run_dir",
            str(run_dir),
            f"this folder holds a run with other settings:{listed}",
            f"write the settings of that run, or {instead} to start another run from it",
        )


def decisive(config: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The settings that decide the weights, by dotted name; a list is one value."""
    for key, value in config.items():
        name = f"{path}{key}"
        if name in FREE or (path == "callbacks." and name not in AVERAGES):
            continue
        if isinstance(value, dict) and value:
            yield from decisive(value, f"{name}.")
        else:
            yield name, value
