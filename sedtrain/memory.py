"""What a user is told where memory runs out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.memory import is_oom_error

from sedtrain.batch import IGNORE_INDEX, Batch, UserError


class OutOfMemory(UserError):
    """A batch was too large."""


@contextmanager
def enough_for(batch: Batch) -> Iterator[None]:
    """Raises OutOfMemory with the size of the batch and the settings to change where memory runs out within."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or is_oom_error(error)):
            raise
        num_tokens = int((batch.labels != IGNORE_INDEX).sum())
        raise OutOfMemory(
            f"out of memory in a batch of {len(batch)} utterances, {batch.seconds:.1f} s of audio as an input of "
            f"{tuple(batch.inputs.shape)}, {num_tokens:,} target tokens",
            "data.batches=FILE of task=fit_batches, which finds what fits, data.batch_seconds=LESS (with "
            "trainer.accumulate_grad_batches=MORE each update stays as large), data.batch_tokens=NUMBER, "
            "data.max_seconds=LESS where one utterance is too long by itself, or trainer.precision=bf16-mixed",
        ) from error
