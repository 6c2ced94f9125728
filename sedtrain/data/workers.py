"""What signals do to the processes that load data: nothing, unless they come from the process that started them.

A cluster that ends a job sends them to all of its processes; a training needs its data until its checkpoint is written.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader

from sedtrain.batch import Batch

TO_TRAINING = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
LOOK_EVERY_SECONDS = 0.2


class Loader(DataLoader[Batch]):
    """A DataLoader whose workers begin with SIGTERM blocked, and so do the threads that libraries start in them."""

    def __iter__(self) -> Any:
        with sigterm_blocked():
            return super().__iter__()


@contextmanager
def sigterm_blocked() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(worker_id: int) -> None:
    """What a DataLoader's worker does first."""
    pl_worker_init_function(worker_id)
    for each in TO_TRAINING:
        signal.signal(each, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # in a thread that does not block it
        Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


def end_with(parent: int) -> None:
    """Ends the process at the SIGTERM of its parent, by which a DataLoader ends workers that are stuck, and after its death.

    A worker holds the connections of its parent open, so that other ranks would not learn of that death before.
    """
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, LOOK_EVERY_SECONDS)
        if received and received.si_pid == parent:
            break
    os._exit(0)
