"""Scores and hypotheses of a split, and everything that results.json says about them, with the code behind them."""

import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sedtrain.evaluation.metric_set import MetricSet
from sedtrain.evaluation.metrics import METRICS, Counts, title_of
from sedtrain.evaluation.statistics import Interval, Units
from sedtrain.run_dir import without_nan, write_json, write_whole

PACKAGES = ("sedtrain", "torch", "transformers", "lightning", "datasets", "rapidfuzz", "sacrebleu")


@dataclass(frozen=True)
class BestHypothesis:
    """An utterance's reference and the model's best text; speaker, language and seconds where they are known.

    score: score by which the search ranks texts; None if it computes none
    """

    id: str
    reference: str
    hypothesis: str
    speaker: str | None = None
    language: str | None = None
    seconds: float | None = None
    score: float | None = None


@dataclass(frozen=True)
class Hypothesis(BestHypothesis):
    """A best hypothesis with `others`, the next best texts of n-best search and their scores."""

    others: tuple[tuple[str, float | None], ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """Scores of a split: N hypotheses with counts (N, K); `num_cut` of them were cut at the limit of tokens."""

    metrics: dict[str, Interval]
    hypotheses: list[Hypothesis]
    counts: Counts
    audio_seconds: float
    rtfx: float
    num_cut: int = 0

    @property
    def speakers(self) -> list[str | None]:
        return [each.speaker for each in self.hypotheses]

    @property
    def units(self) -> Units:
        """Units that the intervals are computed by."""
        return Units.of(self.speakers)


@dataclass(frozen=True)
class TrainingTotals:
    """Cost of training: wall-clock seconds, optimizer steps, utterances seen, seconds of audio per second.

    ended_by: the option that ended training before the last of `planned_steps`
    """

    seconds: float
    steps: int
    utterances: int
    audio_seconds_per_second: float
    planned_steps: int | None = None
    ended_by: str | None = None


@dataclass(frozen=True)
class Results:
    """One evaluation of one split.

    metrics:             fractions, not percent
    rtfx:                seconds of audio decoded per second of wall clock
    train:               None if nothing was trained
    skipped:             utterances left out of any split of the run, counted by reason
    not_scored:          utterances left out of this split, counted by reason
    num_empty:           utterances with an empty reference: all words written for them are insertions
    training_normalizer: normalizer of the training texts; None if the model does not say
    signatures:          sacrebleu's descriptions of its metrics, and descriptions of the user's own
    resampled, num_speakers, num_without_speaker: units of the intervals, see `Units`
    data:                the dataset and its own name for the split
    checkpoint:          the scored model; None for the one trained in `run_dir`
    commit:              commit of the working directory, see `provenance.commit`
    float32:             the metrics without decoding.int8; None if that is off
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
    not_scored: Mapping[str, int] = field(default_factory=dict)
    num_empty: int = 0
    num_cut: int = 0
    signatures: Mapping[str, str] = field(default_factory=dict)
    resampled: str = "utterance"
    num_speakers: int | None = None
    num_without_speaker: int = 0
    data: str = ""
    run_dir: str = ""
    checkpoint: str | None = None
    commit: Mapping[str, Any] | None = None
    float32: Mapping[str, Interval] | None = None

    @property
    def headline(self) -> str:
        """Numbers of utterances that were scored, and of the others by reason, such as `155 scored, 4 too long`."""
        counts = {"scored": self.num_utterances, **self.not_scored}
        of_scored = {"with an empty reference": self.num_empty, "cut at the limit of tokens": self.num_cut}
        text = ", ".join(f"{count:,} {what}" for what, count in counts.items())
        special = ", ".join(f"{count:,} {what}" for what, count in of_scored.items() if count)
        return f"{text} (of the scored {special})" if special else text

    @property
    def interval_title(self) -> str:
        """Title of the intervals, with their units."""
        units = Units(self.resampled, self.num_speakers, self.num_without_speaker)
        return f"95 % interval, {units}"

    def rows(self) -> list[tuple[str, str, str]]:
        """Title, value and interval of each metric for people: in percent, except for the user's own metrics."""
        both = [("", self.metrics), (" in float32", self.float32 or {})]
        return [
            (title_of(name) + note, percent(each.value), each.ends)
            if name in METRICS
            else (name + note, f"{each.value:.4g}", "none")
            for note, metrics in both
            for name, each in metrics.items()
        ]

    def scored_as(self) -> list[str]:
        """Lines that say how texts were compared, see `scored_as`."""
        return scored_as(self.metrics, self.normalizer, self.signatures)

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))


def scored_as(names: Iterable[str], normalizer: Mapping[str, str], signatures: Mapping[str, str]) -> list[str]:
    """Lines that say how texts are compared: one for all metrics of normalized texts, one for each other metric."""
    normalized = [title_of(name) for name in names if name not in signatures]
    line = f"{', '.join(normalized)}: normalizer {' '.join(normalizer.values())}"
    signed = [f"{title_of(name)}: {text}" for name, text in signatures.items()]
    return [*([line] if normalized else []), *signed]


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def write_hypotheses(path: Path, evaluation: Evaluation, metric_set: MetricSet) -> None:
    """Writes a line of JSON per utterance, with its counts of the first metric of METRICS."""
    deciding = next(iter(metric_set.metrics))
    rows = zip(evaluation.hypotheses, evaluation.counts.tolist(), strict=True)
    values = ({**asdict(each), "errors": metric_set.named(counts, deciding)} for each, counts in rows)
    lines = (json.dumps(without_nan(each), ensure_ascii=False, allow_nan=False) for each in values)
    write_whole(path, "".join(f"{line}\n" for line in lines))


def installed_versions() -> dict[str, str | None]:
    """Versions of Python and of PACKAGES; None for a package that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def commit() -> dict[str, Any] | None:
    """The commit of the working directory, and whether its files have changed since; None outside a checkout.

    A checkout's configuration may name commands that git runs when it compares files (filters, fsmonitor, submodules'). So git
    compares them in an empty repository without configuration, by a copy of the index.
    """
    try:
        asked = git("rev-parse", "HEAD", "--show-toplevel", "--git-path", "objects", "--git-path", "index")
        if asked.returncode:
            return None
        head, *paths = asked.stdout.splitlines()
        top, objects, index = map(os.path.abspath, paths)
        with tempfile.TemporaryDirectory() as bare:
            for name in ("objects", "refs"):
                Path(bare, name).mkdir()
            Path(bare, "HEAD").write_text(head)
            shutil.copy2(index, bare)  # copy2 keeps its time, which git compares with those of files
            places = {"GIT_DIR": bare, "GIT_INDEX_FILE": f"{bare}/index", "GIT_WORK_TREE": top}
            options = "--quiet", "--ignore-submodules=dirty", "--no-ext-diff", "--no-textconv"
            compared = git("diff", *options, "HEAD", GIT_OBJECT_DIRECTORY=objects, **places)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return {"id": head, "dirty": compared.returncode == 1} if compared.returncode in (0, 1) else None


def git(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command, environment = ["git", *arguments], {**os.environ, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
