"""Where a training starts: anew, from where its run folder stands, or from another run's checkpoint."""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sedtrain.data.buckets import buckets_of
from sedtrain.data.paths import absolute_path
from sedtrain.errors import UserError
from sedtrain.launch import is_first
from sedtrain.run_dir import LAST, checkpoints_of, config_of, write_whole
from sedtrain.training.checkpoints import newest_whole, read_checkpoint

logger = logging.getLogger(__name__)

FREE = {
    "run_dir", "resume", "logger", "activation_checkpointing", "compile", "checkpoint", "audio", "vocabulary_texts",
    "callbacks.average.dirpath", "data.folder", "data.num_workers", "data.keep_decoded_hours", "trainer.accelerator",
    "trainer.devices", "trainer.enable_progress_bar", "trainer.inference_mode", "trainer.log_every_n_steps",
    "trainer.max_time", "trainer.num_nodes", "trainer.strategy",
}  # fmt: skip
"""What a run may go on with differently: it decides where and how fast the same weights are computed."""
AVERAGES = ("callbacks.ema", "callbacks.average")
"""The callbacks that decide the weights; others, such as what a user watches with, may come and go."""
LISTS = ("skipped.jsonl", "bad_steps.jsonl")


def starting_point(cfg: DictConfig) -> Path | None:
    """The checkpoint that `resume` means, verified; None to start anew.

    Raises UserError where there is none that is whole, or where the run of this folder had other settings.
    """
    if cfg.resume == "none":
        return None
    if cfg.resume != "auto":
        return named(cfg.resume)
    start = newest_whole(checkpoints_of(cfg.run_dir))
    if start is None:
        forget(Path(cfg.run_dir))
        return None
    refuse_other_settings(cfg)
    step = read_checkpoint(start)["global_step"]
    logger.info("continuing from %s, step %d", start, step)
    for name in LISTS:
        keep_until(step, Path(cfg.run_dir) / name)
    return start


def named(name: str) -> Path:
    """A checkpoint, or the newest of a run's folder."""
    path = Path(name).expanduser()
    newest = newest_whole(checkpoints_of(name)) if path.is_dir() else path
    if newest is None or not newest.is_file():
        raise UserError(
            f"resume={name}: there is no such checkpoint", f"resume=auto, resume=none or resume=RUN/checkpoints/{LAST}"
        )
    if "optimizer_states" not in read_checkpoint(newest):
        raise UserError(f"{newest}: this checkpoint holds weights alone", f"resume=RUN, or its checkpoints/{LAST}")
    return newest


def forget(folder: Path) -> None:
    """Removes what a run left that was killed before its first checkpoint."""
    if is_first():
        for name in ("metrics.csv", "samples.jsonl", *LISTS):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def keep_until(step: int, file: Path) -> None:
    """Drops the lines that were written later, which will be written again, and a last one that was cut."""
    if not file.is_file() or not is_first():
        return
    lines = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    kept = "".join(line for line in lines if step_of(line) <= step)
    write_whole(file, kept)


def step_of(line: str) -> int:
    """Of a line of a list, 0 where it does not say."""
    try:
        return int(json.loads(line).get("step", 0))
    except (ValueError, AttributeError):
        return 0


def refuse_other_settings(cfg: DictConfig) -> None:
    """Raises UserError with every setting that decides the weights and is not that of the run in this folder."""
    stored = config_of(cfg.run_dir)
    written = OmegaConf.to_container(OmegaConf.load(stored)) if stored.is_file() else {}
    assert isinstance(written, dict)
    before, now = dict(settings(written)), dict(settings(plain(cfg)))
    changed = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    if changed:
        listed = "".join(f"\n    {name}: {before.get(name)} then, {now.get(name)} now" for name in changed)
        raise UserError(
            f"run_dir={cfg.run_dir} holds a training with other settings:{listed}",
            f"the settings of that training, or resume={checkpoints_of(cfg.run_dir) / LAST} run_dir=ANOTHER_FOLDER "
            "to start another one from where it stands",
        )


def settings(config: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value that decides the weights, by its dotted name; lists count as one value."""
    for key, value in config.items():
        name = f"{path}{key}"
        if name in FREE or (path == "callbacks." and name not in AVERAGES):
            continue
        if isinstance(value, dict) and value:
            yield from settings(value, f"{name}.")
        else:
            yield name, value


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration, with the data as it is found from any folder, and the buckets that its batches are cut by."""
    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    data = resolved["data"]
    for source in (data, *(data.get("mix") or {}).values()):
        if source.get("path"):
            source["path"] = absolute_path(source["path"])
    if data.get("batches"):  # what stands in the file may change
        data["batches"] = [bucket._asdict() for bucket in buckets_of(data["batches"])]
    return {str(key): value for key, value in resolved.items()}
