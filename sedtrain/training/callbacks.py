"""Finds the callbacks of a Trainer by class."""

from typing import TypeVar

from lightning import Trainer

T = TypeVar("T")


def callbacks_of(trainer: Trainer, kind: type[T]) -> list[T]:
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]
