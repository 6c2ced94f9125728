"""results.json: what was measured, on what, how it was decoded, and with which versions."""

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sedtrain.errors import UserError
from sedtrain.evaluation.intervals import Interval
from sedtrain.run_dir import write_whole

PACKAGES = ("sedtrain", "torch", "transformers", "lightning", "datasets", "jiwer", "sacrebleu")


@dataclass(frozen=True)
class TrainingTotals:
    """What training cost: wall-clock seconds, optimizer steps, utterances seen, audio seconds per second."""

    seconds: float
    steps: int
    utterances: int
    audio_seconds_per_second: float


@dataclass(frozen=True)
class Results:
    """One evaluation of one split. Metrics are fractions; `train` is None where nothing was trained.

    `rtfx` is seconds of audio decoded per second of wall clock; `skipped` counts utterances by reason;
    `normalizer` is that of the scores, `training_normalizer` that of the texts learnt, None where the model does not say.
    """

    task: str
    split: str
    num_utterances: int
    audio_seconds: float
    metrics: Mapping[str, Interval]
    normalizer: Mapping[str, str]
    decoding: Mapping[str, Any]
    rtfx: float
    train: TrainingTotals | None
    skipped: Mapping[str, int]
    versions: Mapping[str, str | None]
    training_normalizer: Mapping[str, str] | None = None

    def write(self, path: Path) -> None:
        """Write JSON, whole or not at all; numbers that JSON has no word for (NaN) become null."""
        text = json.dumps(_without_nan(asdict(self)), indent=2, ensure_ascii=False, allow_nan=False)
        write_whole(path, text + "\n")

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read what `write` wrote; a UserError where the file is missing or is something else."""
        instead = "the results.json in the folder of a run that has ended"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"there is no file {path}", instead) from None
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error}", instead) from None
        try:
            return cls._from_json(stored)
        except (TypeError, KeyError, AttributeError):
            expected = ", ".join(field.name for field in fields(cls))
            raise UserError(f"{path} holds no results: expected the keys {expected}", instead) from None

    @classmethod
    def _from_json(cls, stored: dict[str, Any]) -> "Results":
        metrics = {name: Interval(**_with_nan(interval)) for name, interval in stored["metrics"].items()}
        train = stored["train"] and TrainingTotals(**stored["train"])
        rtfx = _with_nan({"rtfx": stored["rtfx"]})
        return cls(**{**stored, "metrics": metrics, "train": train, **rtfx})


def installed_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide a number; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(numbers: dict[str, float | None]) -> dict[str, float]:
    return {key: math.nan if number is None else number for key, number in numbers.items()}
