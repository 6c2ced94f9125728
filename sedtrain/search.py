"""Searches by Optuna for the option values that score best; each trial is a job of a sweep.

The same command with the same `hydra.sweep.dir` resumes the study, and the trial that was running.
"""

import json
import math
import shlex
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.utils import JobReturn
from omegaconf import DictConfig

from sedtrain.annotations import suggest
from sedtrain.errors import UserError
from sedtrain.evaluation.metrics import chosen
from sedtrain.evaluation.scored_runs import stored_results
from sedtrain.run_dir import is_finished, write_json
from sedtrain.terminal import show, table

RESULT, DATABASE = "search.json", "study.db"  # files in the folder of the sweep
FOLDER, METRIC = "folder", "metric"  # attribute of a trial, and of a study
WRITE = "write the values that were searched before, or another hydra.sweep.dir"

Launch = Callable[..., Sequence[JobReturn]]


class Objective(NamedTuple):
    """The metric that ranks trials: of their validations (split `val`), or of their final scores on `split`."""

    split: str
    name: str
    direction: Literal["minimize", "maximize"]

    @property
    def metric(self) -> str:
        return f"{self.split}/{self.name}"

    def value(self, trial: Any, folder: Path) -> float | None:
        """The trial's value, for `val` the best of its validations; None if the run never logged it."""
        if self.split != "val":
            stored = stored_results(folder, "hydra.sweep.dir", str(folder), "write another hydra.sweep.dir")
            return cast(float, stored["metrics"][self.name]["value"])
        values = [value for value in trial.intermediate_values.values() if not math.isnan(value)]
        return (min if self.direction == "minimize" else max)(values, default=None)


def search(config: DictConfig, arguments: list[str], launch: Launch, loader: ConfigLoader) -> None:
    """Runs trials until there are `num_trials`, shows them, and writes search.json into the sweep's folder.

    Raises UserError.
    """
    settings, folder = config.hydra.sweeper, Path(config.hydra.sweep.dir).resolve()
    distributions, fixed = space_of(arguments, loader)
    job = loader.load_sweep_config(config, fixed)
    if job.task != "train":
        raise UserError("task", job.task, "a search only works with task=train", "leave hydra/sweeper=optuna out")
    if any(argument.lstrip("+").startswith("run_dir=") for argument in fixed):
        write = "leave it out, and write hydra.sweep.dir=FOLDER"
        raise UserError("run_dir", job.run_dir, "each trial has its own folder, named by its number", write)
    objective = objective_of(settings, job)
    folder.mkdir(parents=True, exist_ok=True)
    search = Search(settings, folder, distributions, fixed, objective)
    search.resume(launch)
    while (num_left := settings.num_trials - sum(trial.state.is_finished() for trial in search.study.trials)) > 0:
        search.run(search.ask(min(num_left, settings.num_parallel)), launch)
    search.show()


def space_of(arguments: list[str], loader: ConfigLoader) -> tuple[dict[str, Any], list[str]]:
    """The distributions of the searched options, and the arguments that all trials share.

    Raises UserError if nothing is searched.
    """
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
    sweeps = [override for override in parsed if override.is_sweep_override()]
    distributions = {sweep.get_key_element(): distribution(sweep) for sweep in sweeps}
    if not distributions:
        write = "write what to search, such as 'optimizer.lr=tag(log,interval(1e-5,1e-3))' or encoder=hubert,wavlm"
        raise UserError("hydra/sweeper", "optuna", "no option has several values", write)
    return distributions, [str(override.input_line) for override in parsed if override not in sweeps]


def distribution(override: Override) -> Any:
    """Optuna's distribution for a sweep: an interval (logarithmic with tag(log,...)), a range, or a choice."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep: Any = override.value()
    options: dict[str, Any]
    if isinstance(sweep, IntervalSweep):
        values, options = [sweep.start, sweep.end], {"log": "log" in sweep.tags}
    elif isinstance(sweep, RangeSweep):
        values, options = sorted(sweep.range()), {"step": abs(sweep.step)}
    else:
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    kind: Any = IntDistribution if isinstance(values[0], int) else FloatDistribution
    return kind(values[0], values[-1], **options)


def objective_of(settings: DictConfig, job: DictConfig) -> Objective:
    """The metric and direction of a search. Raises UserError for a metric that no run logs.

    job: the configuration of a trial, without the searched values
    """
    names = chosen(job.metrics, job.target)
    directions = {name: "maximize" if higher else "minimize" for name, higher in names.items() if higher is not None}
    known = {f"{split}/{name}": directions.get(name) for split in ("val", job.split) for name in names}
    known |= {"val/loss": "minimize", "val/audio_gain": "maximize"}
    metric = settings.metric or f"val/{next(iter(names))}"
    direction: Any = settings.direction or known.get(metric)
    if direction is None or not (metric in known or metric.startswith("val/")):
        wrong = f"a run with target={job.target} logs other metrics: {', '.join(sorted(known))}"
        write = f"{suggest(metric, known)}; for a val/NAME that your own callback logs, also hydra.sweeper.direction"
        raise UserError("hydra.sweeper.metric", metric, wrong, write)
    split, name = metric.split("/", 1)
    return Objective(split, name, direction)


class Search:
    """Runs the trials of a study."""

    def __init__(
        self, settings: DictConfig, folder: Path, distributions: dict[str, Any], fixed: list[str], objective: Objective
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.settings, self.folder, self.objective = settings, folder, objective
        self.distributions, self.fixed = distributions, fixed
        self.storage = settings.storage or f"sqlite:///{folder / DATABASE}"
        self.state = optuna.trial.TrialState
        self.study = optuna.create_study(
            storage=self.storage, study_name=settings.study, direction=objective.direction, load_if_exists=True
        )
        before = self.study.user_attrs.get(METRIC, objective.metric)
        if before != objective.metric:
            write = f"write hydra.sweeper.metric={before}, or another hydra.sweep.dir"
            raise UserError("hydra.sweeper.metric", objective.metric, f"this study was created for {before}", write)
        self.study.set_user_attr(METRIC, objective.metric)
        seed = settings.seed + len(self.study.trials)  # a resumed study must not draw its first values again
        samplers = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
        self.study.sampler = samplers[settings.sampler](seed=seed)

    def ask(self, number: int) -> list[int]:
        """Numbers of new trials. Raises UserError if the study has searched other values."""
        try:
            trials = [self.study.ask(self.distributions) for _ in range(number)]
        except ValueError as error:
            raise UserError("hydra.sweep.dir", str(self.folder), f"its study: {error}", WRITE) from error
        for trial in trials:
            trial.set_user_attr(FOLDER, str(self.folder))
        return [trial.number for trial in trials]

    def resume(self, launch: Launch) -> None:
        """Finishes the trials that were running when this sweep was killed, from their last checkpoints."""
        for number, trial in enumerate(self.study.trials):
            if trial.state == self.state.RUNNING and trial.user_attrs.get(FOLDER) == str(self.folder):
                self.refuse_other_options(trial.params)
                self.run([number], launch, "resume=auto")

    def refuse_other_options(self, params: dict[str, Any]) -> None:
        """Raises UserError for values that this search does not draw: a stranger's study may name any option and value."""
        for option, value in params.items():
            known = self.distributions.get(option)
            if known is None or not (isinstance(value, int | float) or value in getattr(known, "choices", ())):
                wrong = f"its study has a trial with {option}={value}, which this search does not draw"
                raise UserError("hydra.sweep.dir", str(self.folder), wrong, WRITE)

    def run(self, numbers: Sequence[int], launch: Launch, *more: str) -> None:
        """Runs trials, with consecutive numbers in parallel, and records in the study how they ended.

        more: further overrides
        """
        for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
            trials = [self.study.trials[number] for _, number in group]
            jobs = [[*self.arguments(trial.params), self.reporting(trial.number), *more] for trial in trials]
            for trial, job in zip(trials, launch(jobs, initial_job_idx=trials[0].number), strict=True):
                assert job.cfg is not None
                self.tell(trial.number, Path(job.cfg.run_dir))
            self.write()

    def arguments(self, params: dict[str, Any]) -> list[str]:
        return [*self.fixed, *(f"{option}={value}" for option, value in params.items())]

    def reporting(self, number: int) -> str:
        """The override that has a run report its validations to the study."""
        given = {name: self.settings[name] for name in ("study", "pruner", "full_trials", "warmup_steps")}
        options = {"storage": self.storage, "number": number, "metric": f"val/{self.objective.name}", **given}
        listed = ",".join(f"{name}:{json.dumps(value)}" for name, value in options.items())
        return f"+callbacks.search={{_target_:sedtrain.training.optuna_report.TrialReport,{listed}}}"

    def tell(self, number: int, folder: Path) -> None:
        """Records in the study how a trial ended, unless the run itself has recorded that it was pruned."""
        trial = self.study.trials[number]
        if not trial.state.is_finished():
            value = self.objective.value(trial, folder) if is_finished(str(folder)) else None
            self.study.tell(number, value, state=self.state.FAIL if value is None else self.state.COMPLETE)

    def write(self) -> dict[str, Any]:
        """Writes and returns search.json: the best completed trial, its command, and all trials."""
        trials = [
            {"number": trial.number, "state": trial.state.name.lower(), "value": trial.value, "params": trial.params}
            for trial in self.study.trials
        ]
        completed = any(trial["state"] == "complete" for trial in trials)
        best = self.study.best_trial if completed else None
        result = {
            "metric": self.objective.metric,
            "direction": self.objective.direction,
            "best": best and {"number": best.number, "value": best.value, "params": best.params},
            "command": best and shlex.join(["python", "-m", "sedtrain", *self.arguments(best.params)]),
            "trials": trials,
        }
        write_json(self.folder / RESULT, result)
        return result

    def show(self) -> None:
        """Prints the trials, best first, and the command of the best."""
        result, names = self.write(), self.distributions
        sign = 1 if self.objective.direction == "minimize" else -1
        title, right = f"{self.objective.metric}, {self.objective.direction}d", ("trial", "value")
        rows = table(title, "trial", "ended", "value", *names, right=right)
        by_value = sorted(result["trials"], key=lambda trial: (trial["value"] is None, sign * (trial["value"] or 0)))
        for trial in sorted(by_value, key=lambda trial: trial["state"] != "complete"):
            value = "" if trial["value"] is None else f"{trial['value']:.4g}"
            params = (cell(trial["params"].get(name)) for name in names)
            rows.add_row(str(trial["number"]), trial["state"], value, *params)
        best = result["best"]
        first = f"trial {best['number']} was best: {result['command']}" if best else "no trial ran to its end"
        show(rows, f"{first}\nsaved in {self.folder}: {RESULT}, {DATABASE}")


def cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
