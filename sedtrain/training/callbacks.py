"""What callbacks ask of a Trainer."""

from typing import TypeVar

from lightning import Trainer

T = TypeVar("T")


def callbacks_of(trainer: Trainer, kind: type[T]) -> list[T]:
    """The callbacks of a class."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def is_logged(trainer: Trainer) -> bool:
    """True if loggers take the values of this step (`trainer.log_every_n_steps`). Only a private part of Lightning knows."""
    return bool(trainer._logger_connector.should_update_logs)
