"""Loggers of a run, and what is logged with them; a logger that fails is left out, and training continues."""

import csv
import heapq
import io
import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, cast

import yaml  # type: ignore[import-untyped]
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from torch.optim import Optimizer

from sedtrain.batch import Batch
from sedtrain.errors import UserError
from sedtrain.evaluation.provenance import commit, installed_versions
from sedtrain.evaluation.results import Hypothesis, Results
from sedtrain.launch import is_first
from sedtrain.models.parts import part_of
from sedtrain.run_dir import keep_until, write_whole
from sedtrain.training.gradients import on_host

logger = logging.getLogger(__name__)

COLUMNS = ["utterance", "reference", "hypothesis"]
NUM_SAMPLES = 8
"""Utterances of a validation whose texts are logged, the same ones every time."""


class MetricsFile(Logger):
    """metrics.csv, samples.jsonl and environment.json in the run's folder; a run that resumes adds to them.

    Whenever the process is killed, the rows that were saved before are there.
    """

    name = version = None

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.folder = Path(save_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "metrics.csv"
        self.columns, _ = self.read()
        self.rows: list[dict[str, Any]] = []  # that are not saved yet

    def read(self) -> tuple[list[str], list[dict[str, Any]]]:
        """The columns and rows of the file, without a last line that is truncated. Raises UserError for another file."""
        try:
            text = self.file.read_text(encoding="utf-8") if self.file.is_file() else ""
            reader = csv.DictReader(io.StringIO(text.rpartition("\n")[0]))
            columns, rows = list(reader.fieldnames or []), list(reader)
            for row in rows:
                int(row["step"]), [float(value) for value in row.values() if value]
        except (ValueError, TypeError, KeyError, csv.Error) as error:
            wrong = f"metrics.csv in this folder is no table of metrics: {error}"
            write = "remove that file, or write run_dir=ANOTHER_FOLDER"
            raise UserError("run_dir", str(self.folder), wrong, write) from error
        return columns, rows

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Replaces the file as a whole."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.file, text.getvalue())

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append({**metrics, "step": step})

    def save(self) -> None:
        columns = sorted({*self.columns, *(name for row in self.rows for name in row)})
        if columns != self.columns:
            self.columns = columns
            self.write([*self.read()[1], *self.rows])
        elif self.rows:
            with self.file.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, columns).writerows(self.rows)
        self.rows = []

    def keep_before(self, step: int) -> None:
        """Drops the rows and samples of this step and later ones, which the run logs again."""
        if self.file.is_file():
            self.write([row for row in self.read()[1] if int(row["step"]) < step])
        keep_until(step - 1, self.folder / "samples.jsonl")

    def log_facts(self, facts: Mapping[str, Any]) -> None:
        """Writes them to environment.json, except the configuration, which lies in config.yaml."""
        rest = {name: fact for name, fact in facts.items() if name != "config"}
        write_whole(self.folder / "environment.json", json.dumps(rest, indent=2) + "\n")

    def log_samples(self, samples: Sequence[Hypothesis], step: int) -> None:
        """Adds a line of JSON for each to samples.jsonl."""
        lines = [json.dumps({"step": step, **asdict(sample)}, ensure_ascii=False) for sample in samples]
        with (self.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: they lie in config.yaml."""


class TensorBoard(TensorBoardLogger):
    """TensorBoard's event files in one folder; a run that resumes adds to them.

    Raises UserError where tensorboard is not installed.
    """

    def __init__(self, save_dir: str) -> None:
        try:
            import tensorboard  # noqa: F401
        except ImportError as error:
            write = "pip install 'sedtrain[tensorboard]', or write logger=csv"
            raise UserError("logger", "tensorboard", f"this logger needs tensorboard: {error}", write) from error
        super().__init__(save_dir, name="", version="", default_hp_metric=False)

    def keep_before(self, step: int) -> None:
        """Has TensorBoard hide this step and later ones, which the run logs again."""
        self.finalize("success")
        self._experiment, self._kwargs["purge_step"] = None, step

    def log_facts(self, facts: Mapping[str, Any]) -> None:
        for name, fact in facts.items():
            text = yaml.safe_dump(fact, sort_keys=False, allow_unicode=True)
            self.experiment.add_text(name, f"```yaml\n{text}```")

    def log_samples(self, samples: Sequence[Hypothesis], step: int) -> None:
        cells = [[" ".join(text.replace("|", "\\|").split()) for text in texts_of(sample)] for sample in samples]
        rows = [COLUMNS, ["---"] * len(COLUMNS), *cells]
        self.experiment.add_text("samples", "\n".join(f"| {' | '.join(row)} |" for row in rows), step)


class Wandb(WandbLogger):
    """A run of Weights & Biases with its files and its id in the run's folder; a run that resumes stays the same one there.

    mode: auto: the value of WANDB_MODE, else online where the user is logged in, else offline
    options: those of wandb.init
    """

    def __init__(
        self,
        save_dir: str,
        project: str = "sedtrain",
        name: str | None = None,
        mode: Literal["auto", "online", "offline"] = "auto",
        **options: Any,
    ) -> None:
        import wandb

        self.folder, self.mode = Path(save_dir) / "wandb", mode
        settings = wandb.Settings(console="off", quiet=True)  # sedtrain.log has what is printed
        super().__init__(name or Path(save_dir).name, save_dir, project=project, settings=settings, **options)
        del self._wandb_init["anonymous"]  # which wandb warns of

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of Weights & Biases, separate from any that another job of a sweep has left open in this process."""
        if self._experiment is None:
            import wandb

            mode = self.mode if self.mode != "auto" else None  # of WANDB_MODE
            if mode is None and not os.environ.get("WANDB_MODE"):
                mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
            file = self.folder / "id.txt"  # of the run that resumes
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(file, secrets.token_hex(4))
            options = {**self._wandb_init, "id": file.read_text(encoding="utf-8"), "mode": mode, "reinit": "create_new"}
            self._experiment = wandb.init(**options)
            self._experiment.define_metric("trainer/global_step")
            self._experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return self._experiment

    def log_samples(self, samples: Sequence[Hypothesis], step: int) -> None:
        self.log_table("samples", COLUMNS, [texts_of(sample) for sample in samples], step=step)

    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment = None


def texts_of(sample: Hypothesis) -> list[str]:
    return [sample.id, sample.reference, sample.hypothesis]


def asks(method: str) -> Callable[..., Any]:
    """A method of Tracker that is passed on to its logger."""
    return lambda tracker, *args, **options: tracker.ask(method, *args, **options)


class Tracker(Logger):
    """A logger of any kind, on the first rank alone; after the first exception it is left out with a warning.

    make: returns the logger; a UserError and a missing package are raised, since the user can repair them
    """

    def __init__(self, name: str, make: Callable[[], Logger]) -> None:
        super().__init__()
        self.label = name
        self.inner: Logger | None = None
        if is_first():
            try:
                self.inner = make()
            except (Exception, SystemExit) as error:
                if isinstance(root_cause(error), UserError | ImportError):
                    raise
                self.leave_out("its constructor", root_cause(error))

    def leave_out(self, method: str, error: BaseException) -> None:
        self.inner = None
        failed = f"logger={self.label} failed in {method} and is left out; training continues without it"
        logger.warning("%s: %s", failed, f"{type(error).__name__}: {error}".strip())

    def ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The value of the logger's method or property; None where it has none, or is left out."""
        if self.inner is None:
            return None
        try:
            found = getattr(self.inner, method, None)
            return found(*args, **kwargs) if callable(found) else found
        except (Exception, SystemExit) as error:
            self.leave_out(method, error)
            return None

    name = property(asks("name"))
    version = property(asks("version"))
    save_dir = property(asks("save_dir"))
    log_hyperparams = asks("log_hyperparams")
    log_graph = asks("log_graph")
    log_samples = asks("log_samples")
    after_save_checkpoint = asks("after_save_checkpoint")
    keep_before = asks("keep_before")
    save = asks("save")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.ask("log_metrics", dict(metrics), step)  # a copy: all loggers share the metrics

    def log_facts(self, facts: Mapping[str, Any]) -> None:
        """Logs facts of the run by name, as hyperparameters where the logger has no `log_facts`."""
        self.ask("log_facts" if hasattr(self.inner, "log_facts") else "log_hyperparams", facts)

    def finalize(self, status: str) -> None:
        """Only saves after a successful training: the scores of the test split follow."""
        self.ask(*(("save",) if status == "success" else ("finalize", status)))

    def close(self) -> None:
        self.ask("finalize", "success")


def root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


class Tracking(Callback):
    """Logs settings, commit and versions of a run, its learning rates, and texts of some utterances at every validation.

    config: all settings, resolved
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.groups: dict[str, list[int]] = {}
        self.samples: list[Hypothesis] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the optimizer's parameter groups of each part of the model, and logs the facts of the run."""
        parts = {id(weight): part_of(name) for name, weight in cast(Any, pl_module.model).named_parameters()}
        self.groups = {}
        for index, group in enumerate(trainer.optimizers[0].param_groups):
            for part in {parts[id(weight)] for weight in group["params"]}:
                self.groups.setdefault(part, []).append(index)
        for tracker in trackers(trainer) if trainer.is_global_zero else []:
            tracker.log_facts({"config": self.config, "commit": commit(), "versions": installed_versions()})

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Logs the highest learning rate of each part of the model, where logs are written."""
        if not trainer._logger_connector.should_update_logs:
            return
        rates = [group["lr"] for group in optimizer.param_groups]
        highest = {f"learning_rate/{part}": max(rates[index] for index in self.groups[part]) for part in self.groups}
        pl_module.log_dict(on_host(highest), batch_size=1)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.samples = []

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, *_: Any) -> None:
        if outputs is not None:
            seen = [*self.samples, *map(Hypothesis, batch.ids, batch.texts, outputs["hypotheses"])]
            # the same ones in whatever order they come
            self.samples = heapq.nsmallest(NUM_SAMPLES, seen, key=lambda sample: sha256(sample.id.encode()).digest())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for tracker in trackers(trainer) if trainer.is_global_zero and not trainer.sanity_checking else []:
            tracker.log_samples(self.samples, logged_steps(trainer))


def trackers(trainer: Trainer) -> list[Tracker]:
    return [tracker for tracker in trainer.loggers if isinstance(tracker, Tracker)]


def logged_steps(trainer: Trainer) -> int:
    """The step that Lightning logs with: the number of steps before the one under way."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def log_scores(trainer: Trainer, results: Results) -> None:
    """Logs the scores of a finished run with their intervals, and closes its loggers."""
    scores: dict[str, float] = {}
    for name, interval in results.metrics.items():
        metric = f"{results.split}/{name}"
        scores |= {metric: interval.value, f"{metric}_low": interval.low, f"{metric}_high": interval.high}
    for tracker in trackers(trainer):
        tracker.log_metrics(scores, logged_steps(trainer))
        tracker.close()
