"""A search by Optuna for the values of options with which a run scores best: a trial is a job of a sweep.

The study is kept: the same command with the same `hydra.sweep.dir` resumes it, and the trial that was running too.
"""

import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.utils import JobReturn
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from sedtrain.config.annotations import suggest
from sedtrain.errors import UserError
from sedtrain.evaluation.metrics import METRICS, TRANSCRIPTION, TRANSLATION
from sedtrain.evaluation.results import Results
from sedtrain.run_dir import is_finished, write_whole
from sedtrain.training.pruning import PRUNED_AT

RESULT, DATABASE = "search.json", "study.db"  # files in the folder of the sweep
FOLDER, METRIC = "folder", "metric"  # attributes of a trial, of a study

Launch = Callable[..., Sequence[JobReturn]]


@dataclass(frozen=True)
class Space:
    """The options that are searched, with their distributions, and the arguments that every trial has."""

    distributions: dict[str, Any]
    fixed: list[str]

    def arguments(self, params: dict[str, Any]) -> list[str]:
        return [*self.fixed, *(f"{option}={value}" for option, value in params.items())]


@dataclass(frozen=True)
class Objective:
    """The metric that trials are compared by, and the one that they report while they run."""

    metric: str
    direction: Literal["minimize", "maximize"]
    reported: str

    def value(self, trial: Any, folder: Path) -> float | None:
        """None where the run never logged it."""
        if self.metric == self.reported:
            values = [each for each in trial.intermediate_values.values() if not math.isnan(each)]
            best = min if self.direction == "minimize" else max
            return best(values, default=None)
        name = self.metric.partition("/")[2]
        return Results.read(folder / "results.json").metrics[name].value


def search(config: DictConfig, arguments: list[str], launch: Launch, loader: ConfigLoader) -> None:
    """Runs trials until there are `num_trials`; shows the best, and writes search.json into the folder of the sweep.

    Raises UserError.
    """
    settings, folder = config.hydra.sweeper, Path(config.hydra.sweep.dir).resolve()
    space = space_of(arguments, loader)
    job = loader.load_sweep_config(config, space.fixed)
    refuse_unusable(job, space)
    objective = objective_of(settings, job)
    folder.mkdir(parents=True, exist_ok=True)
    search = Search(settings, folder, space, objective)
    search.resume(launch)
    while search.num_left() > 0:
        search.run(search.ask(min(search.num_left(), settings.num_parallel)), launch)
    search.show()


def space_of(arguments: list[str], loader: ConfigLoader) -> Space:
    """Raises UserError where nothing is searched."""
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
    distributions = {each.get_key_element(): distribution(each) for each in parsed if each.is_sweep_override()}
    if not distributions:
        write = "write what to search, such as 'optimizer.lr=tag(log,interval(1e-5,1e-3))' or encoder=hubert,wavlm"
        raise UserError("hydra/sweeper", "optuna", "no option has several values", write)
    return Space(distributions, [str(each.input_line) for each in parsed if not each.is_sweep_override()])


def distribution(override: Override) -> Any:
    """Optuna's distribution of a sweep: an interval, its logarithm with tag(log,...), a range, or a choice."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep: Any = override.value()
    if isinstance(sweep, IntervalSweep):
        kind: Any = IntDistribution if isinstance(sweep.start, int) else FloatDistribution
        return kind(sweep.start, sweep.end, log="log" in sweep.tags)
    if isinstance(sweep, RangeSweep):
        values: list[Any] = sorted(sweep.range())
        kind = IntDistribution if isinstance(values[0], int) else FloatDistribution
        return kind(values[0], values[-1], step=abs(sweep.step))
    return CategoricalDistribution(list(override.sweep_string_iterator()))


def refuse_unusable(job: DictConfig, space: Space) -> None:
    """Raises UserError for arguments with which no trial could run."""
    if job.task != "train":
        raise UserError("task", job.task, "a search trains", "leave hydra/sweeper=optuna out")
    if any(each.lstrip("+").startswith("run_dir=") for each in space.fixed):
        write = "leave it out, and write hydra.sweep.dir=FOLDER"
        raise UserError("run_dir", job.run_dir, "each trial has a folder of its own, by its number", write)


def objective_of(settings: DictConfig, job: DictConfig) -> Objective:
    """Raises UserError for a metric that no run logs.

    job: the configuration of a trial, without the values that are searched
    """
    names = TRANSLATION if job.target == "translation" else TRANSCRIPTION
    directions = {name: "maximize" if METRICS[name].higher_is_better else "minimize" for name in names}
    known = {f"{split}/{name}": directions[name] for split in ("val", job.split) for name in names}
    known |= {"val/loss": "minimize", "val/audio_gain": "maximize"}
    metric = settings.metric or f"val/{names[0]}"
    direction: Any = settings.direction or known.get(metric)
    if direction is None or not (metric in known or metric.startswith("val/")):
        wrong = f"no run with target={job.target} logs it; these are logged: {', '.join(sorted(known))}"
        write = f"{suggest(metric, known)}; for a val/NAME that your own callback logs, also hydra.sweeper.direction"
        raise UserError("hydra.sweeper.metric", metric, wrong, write)
    return Objective(metric, direction, metric if metric.startswith("val/") else f"val/{metric.partition('/')[2]}")


class Search:
    """A study, and the runs of its trials."""

    def __init__(self, settings: DictConfig, folder: Path, space: Space, objective: Objective) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.settings, self.folder, self.space, self.objective = settings, folder, space, objective
        self.storage = settings.storage or f"sqlite:///{folder / DATABASE}"
        self.state = optuna.trial.TrialState
        self.study = optuna.create_study(
            storage=self.storage, study_name=settings.study, direction=objective.direction, load_if_exists=True
        )
        before = self.study.user_attrs.get(METRIC, objective.metric)
        if before != objective.metric:
            write = f"write hydra.sweeper.metric={before}, or another hydra.sweep.dir"
            raise UserError("hydra.sweeper.metric", objective.metric, f"this study is by {before}", write)
        self.study.set_user_attr(METRIC, objective.metric)
        seed = settings.seed + len(self.study.trials)  # a study that is resumed draws other values than at its start
        samplers = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
        self.study.sampler = samplers[settings.sampler](seed=seed)

    def num_left(self) -> int:
        finished: int = sum(each.state.is_finished() for each in self.study.trials)
        return int(self.settings.num_trials) - finished

    def ask(self, number: int) -> list[int]:
        """Numbers of new trials. Raises UserError where the study has searched other values."""
        try:
            trials = [self.study.ask(self.space.distributions) for _ in range(number)]
        except ValueError as error:
            write = "write the values that were searched, or another hydra.sweep.dir"
            raise UserError("hydra.sweep.dir", str(self.folder), f"its study: {error}", write) from error
        for trial in trials:
            trial.set_user_attr(FOLDER, str(self.folder))
        return [trial.number for trial in trials]

    def resume(self, launch: Launch) -> None:
        """Finishes the trials that were running when this sweep was killed, each from its last checkpoint."""
        for number, trial in enumerate(self.study.trials):
            if trial.state != self.state.RUNNING or trial.user_attrs.get(FOLDER) != str(self.folder):
                continue
            if PRUNED_AT in trial.user_attrs:
                self.tell(number, self.folder)
            else:
                self.run([number], launch, "resume=auto")

    def run(self, numbers: Sequence[int], launch: Launch, *more: str) -> None:
        """Runs trials, those of consecutive numbers in parallel, and tells the study how they ended."""
        while numbers:
            consecutive = [number for index, number in enumerate(numbers) if number == numbers[0] + index]
            numbers = numbers[len(consecutive) :]
            jobs = [
                [*self.space.arguments(self.study.trials[number].params), self.reporting(number), *more]
                for number in consecutive
            ]
            for number, job in zip(consecutive, launch(jobs, initial_job_idx=consecutive[0]), strict=True):
                assert job.cfg is not None
                self.tell(number, Path(job.cfg.run_dir))
            self.write()

    def reporting(self, number: int) -> str:
        """The override by which a run reports its validations to the study."""
        options = {
            "storage": self.storage,
            "study": self.study.study_name,
            "number": number,
            "metric": self.objective.reported,
            "prunes": self.settings.pruner != "none",
            "full_trials": self.settings.full_trials,
            "warmup_steps": self.settings.warmup_steps,
        }
        listed = ",".join(f"{name}:{json.dumps(value)}" for name, value in options.items())
        return f"+callbacks.search={{_target_:sedtrain.training.pruning.Reporting,{listed}}}"

    def tell(self, number: int, folder: Path) -> None:
        """Tells the study how the trial in a folder ended."""
        trial = self.study.trials[number]
        if PRUNED_AT in trial.user_attrs:
            self.study.tell(number, state=self.state.PRUNED)
            return
        value = self.objective.value(trial, folder) if is_finished(str(folder)) else None
        self.study.tell(number, value, state=self.state.FAIL if value is None else self.state.COMPLETE)

    # --- the result

    def best(self) -> Any:
        """The best of the trials that ran to their end; None where there is none."""
        complete = [each for each in self.study.trials if each.state == self.state.COMPLETE]
        return self.study.best_trial if complete else None

    def command(self, params: dict[str, Any]) -> str:
        """A run with these values."""
        return shlex.join(["python", "-m", "sedtrain", *self.space.arguments(params)])

    def write(self) -> None:
        """Writes search.json, whole or not at all."""
        best = self.best()
        result = {
            "metric": self.objective.metric,
            "direction": self.objective.direction,
            "best": best and {"number": best.number, "value": best.value, "params": best.params},
            "command": best and self.command(best.params),
            "trials": [
                {"number": each.number, "state": each.state.name.lower(), "value": each.value, "params": each.params}
                for each in self.study.trials
            ],
        }
        write_whole(self.folder / RESULT, json.dumps(result, indent=2, ensure_ascii=False) + "\n")

    def show(self) -> None:
        """Prints the trials, the best first, and the command that trains with its values."""
        self.write()
        table = Table(title=f"{self.objective.metric}, {self.objective.direction}d", title_justify="left")
        for heading in ("trial", "ended", "value", *self.space.distributions):
            table.add_column(heading, justify="right" if heading in ("trial", "value") else "left")
        sign = 1 if self.objective.direction == "minimize" else -1
        by_value = sorted(self.study.trials, key=lambda each: (each.value is None, sign * (each.value or 0)))
        for each in sorted(by_value, key=lambda each: each.state != self.state.COMPLETE):
            value = "" if each.value is None else f"{each.value:.4g}"
            params = [cell(each.params.get(name)) for name in self.space.distributions]
            table.add_row(str(each.number), each.state.name.lower(), value, *params)
        console, best = Console(highlight=False), self.best()
        console.print(table)
        first = f"trial {best.number} was best: {self.command(best.params)}" if best else "no trial ran to its end"
        console.print(f"{first}\nsaved in {self.folder}: {RESULT}, {DATABASE}", soft_wrap=True)


def cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
