"""Memory that runs out in a step becomes an error that names the batch and the options to change."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.memory import is_oom_error

from sedtrain.batch import IGNORE_INDEX, Batch
from sedtrain.errors import UNSET, UserError


class OutOfMemory(UserError):
    """A batch was too large."""


@contextmanager
def memory_for(batch: Batch, data: Any) -> Iterator[None]:
    """Raises OutOfMemory if memory runs out in this context.

    data: the SpeechTextDataModule; None if batches come from plain loaders
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or is_oom_error(error)):
            raise
        num_tokens = int((batch.labels != IGNORE_INDEX).sum())
        raise OutOfMemory(
            "data.batch_seconds",
            getattr(data, "batch_seconds", UNSET),
            f"out of memory in a batch of {len(batch)} utterances: {batch.seconds:.1f} s of audio, "
            f"an input of shape {tuple(batch.inputs.shape)}, {num_tokens:,} target tokens",
            "write data.batches=FILE, which task=fit_batches measures for this device\n"
            "or a smaller data.batch_seconds, with trainer.accumulate_grad_batches=NUMBER for updates of the same size\n"
            "or data.batch_tokens=NUMBER, or trainer.precision=bf16-mixed\n"
            "or a smaller data.max_seconds, if a single utterance is too long",
        ) from error
