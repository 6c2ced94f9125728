"""The loader of batches and its worker processes: the signals that they take, and the errors that they hand on."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader

from sedtrain.batch import Batch
from sedtrain.errors import UserError

SIGNALS_OF_RUN = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Signals for the process that trains, which its workers ignore."""
SECONDS_BETWEEN_LOOKS = 0.2  # at the parent of a worker


def usual_workers() -> int:
    """Processes that load audio for a GPU: its share of the cores, 8 at most; none where training itself runs on the cores."""
    if not torch.cuda.is_available():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // torch.cuda.device_count(), 1), 8)


class Loader(DataLoader[Batch | UserError]):
    """A DataLoader whose workers, and the threads that libraries start in them, begin with SIGTERM blocked.

    Raises the UserError that a sampler yields in place of a batch, where that batch was due.

    waited: seconds in which its user has waited for batches
    """

    waited = 0.0

    def __iter__(self) -> Any:
        with sigterm_blocked():
            batches = super().__iter__()
        return self.delivered(batches)

    def delivered(self, batches: Iterator[Batch | UserError]) -> Iterator[Batch]:
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            if isinstance(batch, UserError):
                raise batch
            yield batch


@contextmanager
def sigterm_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(worker_id: int) -> None:
    """The first call in a worker of a DataLoader."""
    pl_worker_init_function(worker_id)
    for number in SIGNALS_OF_RUN:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # in a thread that does not block it
        Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


def end_with(parent: int) -> None:
    """Ends the process when its parent sends SIGTERM, as a DataLoader does to workers that are stuck, or has died.

    A worker holds the connections of its parent open, so other ranks notice the death only after this.
    """
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, SECONDS_BETWEEN_LOOKS)
        if received and received.si_pid == parent:
            break
    os._exit(0)
