"""What loggers are told of a training, and that none of them ever stops it."""

import csv
import hashlib
import heapq
import io
import json
import logging
import os
import secrets
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any, Literal, cast

import lightning
import yaml  # type: ignore[import-untyped]
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from torch.optim import Optimizer

from sedtrain.batch import Batch
from sedtrain.errors import UserError
from sedtrain.evaluation.evaluate import Hypothesis
from sedtrain.evaluation.results import Results, installed_versions
from sedtrain.models.parts import part_of
from sedtrain.run_dir import write_whole

COLUMNS = ["utterance", "reference", "hypothesis"]


class TensorBoard(TensorBoardLogger):
    """TensorBoard's event files in one folder, where a run that goes on adds to them.

    Raises UserError where tensorboard is not installed.
    """

    def __init__(self, save_dir: str) -> None:
        try:
            import tensorboard  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"logger=tensorboard needs tensorboard: {error}", "pip install 'sedtrain[tensorboard]', or logger=csv"
            ) from error
        super().__init__(save_dir, name="", version="", default_hp_metric=False)

    def keep_before(self, step: int) -> None:
        """Has TensorBoard not show this step and later ones, which will be made again."""
        self.finalize("success")
        self._experiment, self._kwargs["purge_step"] = None, step

    def log_facts(self, facts: Mapping[str, Any]) -> None:
        for name, fact in facts.items():
            written = yaml.safe_dump(fact, sort_keys=False, allow_unicode=True)
            self.experiment.add_text(name, f"```yaml\n{written}```")

    def log_samples(self, samples: Sequence[Hypothesis], step: int) -> None:
        rows = [COLUMNS, ["---"] * len(COLUMNS), *([escaped(each) for each in astuple(sample)] for sample in samples)]
        self.experiment.add_text("samples", "\n".join(f"| {' | '.join(row)} |" for row in rows), step)


def escaped(text: str) -> str:
    """A text as it stands in a cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())


class Wandb(WandbLogger):
    """A run of Weights & Biases, its files and its id in the run's folder, so that a run that goes on is the same there too.

    mode: auto is what WANDB_MODE says, else online where the user is logged in, else offline
    options: those of wandb.init

    Raises UserError where wandb is not installed.
    """

    def __init__(
        self,
        save_dir: str,
        project: str = "sedtrain",
        name: str | None = None,
        mode: Literal["auto", "online", "offline"] = "auto",
        **options: Any,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"logger=wandb needs wandb: {error}", "pip install 'sedtrain[wandb]', or logger=csv"
            ) from error
        self.folder, self.mode = Path(save_dir) / "wandb", mode
        settings = wandb.Settings(console="off", quiet=True)  # sedtrain.log has what is printed
        super().__init__(name or Path(save_dir).name, save_dir, project=project, settings=settings, **options)
        del self._wandb_init["anonymous"]  # which wandb warns of

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run; not that which another training of this process, a job of a sweep, may have left open."""
        if self._experiment is None:
            import wandb

            mode = self.mode if self.mode != "auto" else mode_by_login()
            options = {**self._wandb_init, "id": self.run_id(), "mode": mode, "reinit": "create_new"}
            self._experiment = wandb.init(**options)
            self._experiment.define_metric("trainer/global_step")
            self._experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return self._experiment

    def run_id(self) -> str:
        """That of this folder, drawn when the run begins."""
        file = self.folder / "id.txt"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(secrets.token_hex(4), encoding="utf-8")
        return file.read_text(encoding="utf-8")

    def log_facts(self, facts: Mapping[str, Any]) -> None:
        self.log_hyperparams(dict(facts))

    def log_samples(self, samples: Sequence[Hypothesis], step: int) -> None:
        self.log_table("samples", COLUMNS, [list(astuple(sample)) for sample in samples], step=step)

    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment = None


def mode_by_login() -> str | None:
    """None where wandb reads WANDB_MODE itself."""
    import wandb

    if os.environ.get("WANDB_MODE"):
        return None
    return "online" if wandb.login(prompt=False, verify=False) else "offline"


SAMPLES, ENVIRONMENT = "samples.jsonl", "environment.json"


class MetricsFile(CSVLogger):
    """Lightning's CSV logger, which does not delete the rows of a run that goes on."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the file; on other ranks than the first one that writes nothing."""
        if self._experiment is None:
            self._experiment = Appending(self.log_dir)
        return self._experiment

    def keep_before(self, step: int) -> None:
        """Drops the rows of this step and later ones, which will be made again."""
        self.experiment.keep_before(step)
        samples = Path(self.log_dir) / SAMPLES
        if samples.is_file():
            lines = samples.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            write_whole(samples, "".join(line for line in whole if json.loads(line)["step"] < step))

    def log_facts(self, facts: Mapping[str, Any]) -> None:
        """Writes them to environment.json, save the configuration, which lies in config.yaml."""
        rest = {name: fact for name, fact in facts.items() if name != "config"}
        write_whole(Path(self.log_dir) / ENVIRONMENT, json.dumps(rest, indent=2) + "\n")

    def log_samples(self, samples: Sequence[Hypothesis], step: int) -> None:
        """Adds a line of JSON for each to samples.jsonl."""
        lines = [json.dumps({"step": step, **asdict(each)}, ensure_ascii=False) for each in samples]
        with (Path(self.log_dir) / SAMPLES).open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)


class Appending(ExperimentWriter):
    """Adds rows to what the file holds; whenever the process is killed, what was saved before is there."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.path = Path(self.metrics_file_path)
        if self.path.is_file():
            self.metrics_keys = list(self.read()[0])

    def _check_log_dir_exists(self) -> None:
        """Nothing, unlike in the class above, which deletes the file."""

    def read(self) -> tuple[list[str], list[dict[str, str]]]:
        """Heading and rows; a last line that was cut is left out."""
        text, _, _ = self.path.read_text(encoding="utf-8").rpartition("\n")
        reader = csv.DictReader(io.StringIO(text))
        return list(reader.fieldnames or []), list(reader)

    def write(self, heading: list[str], rows: list[dict[str, str]]) -> None:
        """Replaces the file as a whole."""
        unfinished = self.path.with_suffix(".unfinished")
        with unfinished.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, heading)
            writer.writeheader()
            writer.writerows(rows)
        unfinished.replace(self.path)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self.write(fieldnames, self.read()[1])

    def keep_before(self, step: int) -> None:
        if self.path.is_file():
            heading, rows = self.read()
            self.write(heading, [row for row in rows if int(row["step"]) < step])


logger = logging.getLogger(__name__)


NUM_SAMPLES = 8
"""Utterances of a validation whose texts are logged, the same ones every time."""


class Tracker(Logger):
    """A logger of any kind, on the first rank alone. The first thing that it raises is told, and it is left out from there on.

    make: returns the logger. What it raises for the user to repair, a UserError or a package that is missing, comes out.
    """

    def __init__(self, name: str, make: Callable[[], Logger]) -> None:
        super().__init__()
        self.label = name
        self.inner: Logger | None = None
        if is_first_rank():
            try:
                self.inner = make()
            except (Exception, SystemExit) as error:
                if isinstance(cause(error), UserError | ImportError):
                    raise
                self.leave_out("its constructor", cause(error))

    def leave_out(self, where: str, error: BaseException) -> None:
        self.inner = None
        what = f"{type(error).__name__}: {error}".strip()
        logger.warning(
            "logger=%s failed in %s and is left out; training goes on without it: %s", self.label, where, what
        )

    def tell(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """What the logger's method returns; None where it has no such method, or is left out."""
        if self.inner is None or not is_first_rank():
            return None
        try:
            act = getattr(self.inner, method, None)
            return act(*args, **kwargs) if callable(act) else act
        except (Exception, SystemExit) as error:
            self.leave_out(method, error)
            return None

    @property
    def name(self) -> str | None:
        return cast(str | None, self.tell("name"))

    @property
    def version(self) -> int | str | None:
        return cast(int | str | None, self.tell("version"))

    @property
    def save_dir(self) -> str | None:
        return cast(str | None, self.tell("save_dir"))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.tell("log_metrics", dict(metrics), step)  # a copy: it is for all loggers

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.tell("log_hyperparams", params, *args, **kwargs)

    def log_facts(self, facts: Mapping[str, Any]) -> None:
        """What a run is made with, where the logger has no own way to hold it as hyperparameters."""
        self.tell("log_facts" if hasattr(self.inner, "log_facts") else "log_hyperparams", facts)

    def log_samples(self, samples: list[Hypothesis], step: int) -> None:
        self.tell("log_samples", samples, step)

    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        self.tell("log_graph", *args, **kwargs)

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.tell("after_save_checkpoint", checkpoint_callback)

    def keep_before(self, step: int) -> None:
        """Drops what was logged of this step and later ones, which will be made again, where the logger can."""
        self.tell("keep_before", step)

    def save(self) -> None:
        self.tell("save")

    def finalize(self, status: str) -> None:
        """Only saves where training has come to its end: the scores of the test split are yet to come."""
        self.tell("save" if status == "success" else "finalize", *(() if status == "success" else (status,)))

    def close(self) -> None:
        self.tell("finalize", "success")


def is_first_rank() -> bool:
    return rank_zero_only.rank == 0  # type: ignore[attr-defined,no-any-return]


def cause(error: BaseException) -> BaseException:
    """What an error goes back to."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


class Tracking(lightning.Callback):
    """Logs what a run is made with, the learning rates, and texts of some utterances at every validation.

    config: resolved
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.groups: dict[str, list[int]] = {}
        self.samples: list[Hypothesis] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Learns which groups of the optimizer's parameters are of which part of the model."""
        parts = {id(weight): part_of(name) for name, weight in cast(Any, pl_module.model).named_parameters()}
        self.groups = {}
        for index, group in enumerate(trainer.optimizers[0].param_groups):
            for part in {parts[id(weight)] for weight in group["params"]}:
                self.groups.setdefault(part, []).append(index)
        for each in trackers(trainer) if trainer.is_global_zero else []:
            each.log_facts({"config": self.config, "commit": commit(), "versions": installed_versions()})

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: Optimizer
    ) -> None:
        """Logs the learning rate of each part, of several the highest."""
        rates = [group["lr"] for group in optimizer.param_groups]
        highest = {f"learning_rate/{part}": max(rates[index] for index in self.groups[part]) for part in self.groups}
        pl_module.log_dict(highest, batch_size=1)

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.samples = []

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if outputs is not None:
            seen = [*self.samples, *map(Hypothesis, batch.ids, batch.texts, outputs["hypotheses"])]
            self.samples = heapq.nsmallest(NUM_SAMPLES, seen, key=place)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        for each in trackers(trainer) if trainer.is_global_zero and not trainer.sanity_checking else []:
            each.log_samples(self.samples, logged_steps(trainer))


def place(sample: Hypothesis) -> bytes:
    """By which utterances are picked: any ones, whatever their order."""
    return hashlib.sha256(sample.id.encode()).digest()


def trackers(trainer: lightning.Trainer) -> list[Tracker]:
    return [each for each in trainer.loggers if isinstance(each, Tracker)]


def logged_steps(trainer: lightning.Trainer) -> int:
    """The step that Lightning logs by: of the step under way, the number of those before it."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def log_scores(trainer: lightning.Trainer, results: Results) -> None:
    """Gives the scores of a finished training, with their intervals, to its loggers, and closes them."""
    scores: dict[str, float] = {}
    for name, interval in results.metrics.items():
        metric = f"{results.split}/{name}"
        scores |= {metric: interval.value, f"{metric}_low": interval.low, f"{metric}_high": interval.high}
    for each in trackers(trainer):
        each.log_metrics(scores, logged_steps(trainer))
        each.close()


def commit() -> dict[str, Any] | None:
    """The commit that the working directory stands at, and whether its files differ; None where there is none."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    name, _, dirty = ended.stdout.strip().partition("-")
    return {"id": name, "dirty": bool(dirty)} if ended.returncode == 0 and name else None
