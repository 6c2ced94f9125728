"""What loggers are told of a training, and that none of them ever stops it."""

import hashlib
import heapq
import logging
import subprocess
from collections.abc import Callable, Mapping
from typing import Any, cast

import lightning
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer

from sedtrain.batch import Batch, UserError
from sedtrain.evaluation.evaluate import Hypothesis
from sedtrain.evaluation.results import Results, installed_versions
from sedtrain.models.parts import part_of

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
