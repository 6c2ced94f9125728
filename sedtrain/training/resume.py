"""Finds the checkpoint that `resume` means, and refuses to resume with other settings."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sedtrain.errors import UserError
from sedtrain.launch import is_first
from sedtrain.plain import plain_value
from sedtrain.run_dir import LAST, checkpoints_of, config_of, is_finished, keep_until
from sedtrain.training.checkpoint_files import newest_whole, read_checkpoint

logger = logging.getLogger(__name__)

FREE = {
    "run_dir", "resume", "logger", "activation_checkpointing", "compile", "packing", "checkpoint", "audio",
    "vocabulary_texts", "hub", "dry_run", "export", "serve",
    "callbacks.average.dirpath", "data.folder", "data.num_workers", "data.keep_decoded_hours", "data.cache_gb",
    "trainer.accelerator", "trainer.devices", "trainer.enable_progress_bar", "trainer.inference_mode",
    "trainer.log_every_n_steps", "trainer.max_time", "trainer.num_nodes", "trainer.strategy", "data.max_bad_fraction",
    "data.on_bad_utterance",
}  # fmt: skip
"""Settings that may change when a run resumes: they decide where and how fast the weights are computed, not which."""
FREE_UNTIL_SCORED = {"split", "data.test_split"}
"""Settings that may change until the run has finished: they decide on which data the model is scored."""
AVERAGES = ("callbacks.ema", "callbacks.average")
"""Callbacks that change the weights; all others may come and go."""
LISTS = ("skipped.jsonl", "bad_steps.jsonl")
"""Files of a run with one entry in JSON per line; most entries name their step."""


def starting_point(resume: str, run_dir: Path, settings: Mapping[str, Any]) -> Path | None:
    """The verified checkpoint to start from; None to start anew.

    settings: the whole configuration as plain values

    Raises UserError if the checkpoint is missing or damaged, or if the folder holds a run with other settings.
    """
    if resume == "none":
        return None
    if resume != "auto":
        return checkpoint_of(resume)
    start = newest_whole(checkpoints_of(str(run_dir)))
    if start is None:
        remove_leftovers(run_dir)
        return None
    refuse_other_settings(run_dir, settings)
    step = read_checkpoint(start, mapped=True)["global_step"]
    logger.info("continuing from %s, step %d", start, step)
    if is_first():
        for name in LISTS:
            keep_until(step, run_dir / name)
    return start


def checkpoint_of(name: str) -> Path:
    """The checkpoint file `name`, or the newest checkpoint of the run in the folder `name`. Raises UserError if missing."""
    path = Path(name).expanduser()
    newest = newest_whole(checkpoints_of(name)) if path.is_dir() else path
    if newest is None or not newest.is_file():
        instead = f"write resume=auto, resume=none or resume=RUN/checkpoints/{LAST}"
        raise UserError("resume", name, "there is no such checkpoint", instead)
    if "optimizer_states" not in read_checkpoint(newest, mapped=True):
        instead = f"write resume=RUN, or its checkpoints/{LAST}"
        raise UserError("resume", str(newest), "this checkpoint holds only weights", instead)
    return newest


def remove_leftovers(folder: Path) -> None:
    """Removes the logs of a run that was killed before its first checkpoint."""
    if is_first():
        for name in ("metrics.csv", "samples.jsonl", *LISTS):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def refuse_other_settings(run_dir: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError if settings that decide the weights, or scores that exist, differ from the run in this folder.

    An option that the run did not know, such as one of a later version, counts as false then.
    """
    stored, own = config_of(str(run_dir)), checkpoints_of(str(run_dir)) / LAST
    another = f"resume={own} run_dir=ANOTHER_FOLDER to start another run from it"
    if not stored.exists():
        wrong = "its config.yaml is missing, so the settings of its checkpoints are unknown"
        raise UserError("run_dir", str(run_dir), wrong, f"write {another}")
    written = plain_value(stored, "run_dir", str(run_dir), f"write {another}")
    if not isinstance(written, dict):
        raise UserError("run_dir", str(run_dir), "its config.yaml holds no options", f"write {another}")
    free = FREE if is_finished(str(run_dir)) else FREE | FREE_UNTIL_SCORED
    before, now = (dict(decisive(settings, free)) for settings in (written, settings))
    before |= {name: False for name, value in now.items() if value is False and name not in before}
    changed = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    if changed:
        listed = "".join(f"\n  {name}: {before.get(name)} then, {now.get(name)} now" for name in changed)
        wrong = f"this folder holds a run with other settings:{listed}"
        raise UserError("run_dir", str(run_dir), wrong, f"write the settings of that run, or {another}")


def decisive(config: Mapping[Any, Any], free: set[str], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of the settings that are not `free`; a list is one value."""
    for key, value in config.items():
        name = f"{path}{key}"
        if name in free or (path == "callbacks." and name not in AVERAGES):
            continue
        if isinstance(value, dict) and value:
            yield from decisive(value, free, f"{name}.")
        else:
            yield name, value
