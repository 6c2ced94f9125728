"""Loads batches in worker processes; handles their signals and passes on their errors."""

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
"""Signals for the training process; its workers ignore them."""
SECONDS_BETWEEN_LOOKS = 0.2  # interval at which a worker checks that its parent is alive


def usual_workers() -> int:
    """Number of loader processes for a GPU: its share of the cores, at most 8; 0 on a CPU, where training uses the cores."""
    if not torch.cuda.is_available():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // torch.cuda.device_count(), 1), 8)


class Loader(DataLoader[Batch | UserError]):
    """A DataLoader whose workers start with SIGTERM blocked, also in the threads that libraries start in them.

    If a sampler yields a UserError in place of a batch, the loader raises it when that batch is due.

    waited: total seconds that the caller has waited for batches
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
    """Seeds a new worker of a DataLoader and sets up its signals."""
    pl_worker_init_function(worker_id)
    for number in SIGNALS_OF_RUN:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # in a thread that does not block it
        Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


def end_with(parent: int) -> None:
    """Ends the process when its parent has died or sends SIGTERM, as a DataLoader does to stuck workers.

    A worker keeps the connections of its parent open, so other ranks notice the parent's death only after this.
    """
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, SECONDS_BETWEEN_LOOKS)
        if received and received.si_pid == parent:
            break
    os._exit(0)
