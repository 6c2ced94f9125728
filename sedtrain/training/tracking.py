"""Passes what a run logs to its loggers; a logger that fails is left out, and training continues."""

import heapq
import logging
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any, TypeVar, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer

from sedtrain.batch import Batch
from sedtrain.errors import UserError
from sedtrain.evaluation.results import Hypothesis, Results, commit, installed_versions
from sedtrain.launch import is_first
from sedtrain.models.parts import part_of
from sedtrain.training.gradients import on_host

logger = logging.getLogger(__name__)

T = TypeVar("T")

NUM_SAMPLES = 8
"""Utterances whose texts are logged in every validation, always the same ones."""


def forwarded(name: str) -> Callable[..., Any]:
    """A method of Tracker that calls, or reads, the same attribute of its logger."""
    return lambda tracker, *args, **options: tracker.forward(name, *args, **options)


class Tracker(Logger):
    """Any logger, on the first rank only; its first exception leaves it out with a warning.

    label: its name in the group `logger`
    make: returns the logger; UserError and a missing package pass through, since the user can repair them
    """

    def __init__(self, label: str, make: Callable[[], Logger]) -> None:
        super().__init__()
        self.label = label
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

    def forward(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The result of the logger's method, or its property; None if it has neither or is left out."""
        if self.inner is None:
            return None
        try:
            found = getattr(self.inner, name, None)
            return found(*args, **kwargs) if callable(found) else found
        except (Exception, SystemExit) as error:
            self.leave_out(name, error)
            return None

    name = property(forwarded("name"))
    version = property(forwarded("version"))
    save_dir = property(forwarded("save_dir"))
    log_hyperparams = forwarded("log_hyperparams")
    log_graph = forwarded("log_graph")
    log_samples = forwarded("log_samples")
    after_save_checkpoint = forwarded("after_save_checkpoint")
    keep_before = forwarded("keep_before")
    save = forwarded("save")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.forward("log_metrics", dict(metrics), step)  # a copy: all loggers share the metrics

    def log_facts(self, facts: Mapping[str, Any]) -> None:
        """Logs named facts of the run, as hyperparameters if the logger has no `log_facts`."""
        self.forward("log_facts" if hasattr(self.inner, "log_facts") else "log_hyperparams", facts)

    def finalize(self, status: str) -> None:
        """Only saves after successful training, since the scores of the test split follow; `close` finalizes then."""
        self.forward(*(("save",) if status == "success" else ("finalize", status)))

    def close(self) -> None:
        self.forward("finalize", "success")


def root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


class Tracking(Callback):
    """Logs settings, commit and package versions of a run, its learning rates, and sample texts of every validation.

    config: all settings, resolved
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.groups: dict[str, list[int]] = {}
        self.samples: list[Hypothesis] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Maps the parts of the model to parameter groups of the optimizer, and logs the facts of the run."""
        parts = {id(weight): part_of(name) for name, weight in cast(Any, pl_module.model).named_parameters()}
        self.groups = {}
        for index, group in enumerate(trainer.optimizers[0].param_groups):
            for part in {parts[id(weight)] for weight in group["params"]}:
                self.groups.setdefault(part, []).append(index)
        for tracker in trackers(trainer) if trainer.is_global_zero else []:
            tracker.log_facts({"config": self.config, "commit": commit(), "versions": installed_versions()})

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Logs the highest learning rate of each part of the model, in the steps that are logged."""
        if not is_logged(trainer):
            return
        rates = [group["lr"] for group in optimizer.param_groups]
        highest = {f"learning_rate/{part}": max(rates[index] for index in self.groups[part]) for part in self.groups}
        pl_module.log_dict(on_host(highest), batch_size=1)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.samples = []

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, *_: Any) -> None:
        if outputs is not None:
            seen = [*self.samples, *map(Hypothesis, batch.ids, batch.texts, outputs["hypotheses"])]
            # hashes choose the same utterances in every validation, whatever the order of batches
            self.samples = heapq.nsmallest(NUM_SAMPLES, seen, key=lambda sample: sha256(sample.id.encode()).digest())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for tracker in trackers(trainer) if trainer.is_global_zero and not trainer.sanity_checking else []:
            tracker.log_samples(self.samples, logged_steps(trainer))


def trackers(trainer: Trainer) -> list[Tracker]:
    return [tracker for tracker in trainer.loggers if isinstance(tracker, Tracker)]


def logged_steps(trainer: Trainer) -> int:
    """Lightning's step number in logs: the steps completed before the current one."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def log_scores(trainer: Trainer, results: Results) -> None:
    """Logs the final scores with their intervals, and closes the loggers."""
    scores: dict[str, float] = {}
    for name, interval in results.metrics.items():
        metric = f"{results.split}/{name}"
        scores |= {metric: interval.value, f"{metric}_low": interval.low, f"{metric}_high": interval.high}
    for tracker in trackers(trainer):
        tracker.log_metrics(scores, logged_steps(trainer))
        tracker.close()


def callbacks_of(trainer: Trainer, kind: type[T]) -> list[T]:
    """The callbacks of a Trainer that are instances of `kind`."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def is_logged(trainer: Trainer) -> bool:
    """True if loggers take the values of this step (`trainer.log_every_n_steps`). Only a private part of Lightning knows."""
    return bool(trainer._logger_connector.should_update_logs)
