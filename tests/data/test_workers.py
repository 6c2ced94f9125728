"""Processes that load data end with the training, and not by what is sent to all processes of a job."""

import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path
from threading import Thread

import pytest

from sedtrain.data.workers import sigterm_blocked, start_worker

FORK = multiprocessing.get_context("fork")


def work(ready):
    start_worker(0)
    ready.send(os.getpid())
    time.sleep(60)


def work_beside_a_thread(ready):
    Thread(target=time.sleep, args=(60,), daemon=True).start()  # as libraries do, some of them at every fork
    work(ready)


def work_and_wait(ready):
    with sigterm_blocked():
        FORK.Process(target=work, args=(ready,)).start()
    time.sleep(60)


@pytest.fixture(params=[work, work_and_wait])
def started(request):
    """A process and the pid of the worker that it is, or has."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=request.param, args=(there,))
    with sigterm_blocked():
        process.start()
    yield process, here.recv()
    process.kill()
    process.join()


def is_alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def has_ended(pid):
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


@pytest.mark.parametrize("started", [work_beside_a_thread], indirect=True)
def test_what_is_sent_to_all_does_not_end_a_worker_with_threads_of_libraries(started):
    _, pid = started
    subprocess.run(["kill", "-TERM", str(pid)], check=True)
    time.sleep(0.5)
    assert is_alive(pid)


@pytest.mark.parametrize("started", [work, work_beside_a_thread], indirect=True)
def test_a_worker_ends_when_its_parent_says_so_and_not_when_others_do(started):
    process, pid = started
    for name in ("TERM", "INT", "USR1", "USR2"):
        subprocess.run(["kill", f"-{name}", str(pid)], check=True)
    time.sleep(0.5)
    assert is_alive(pid)
    process.terminate()
    assert has_ended(pid)
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("started", [work_and_wait], indirect=True)
def test_a_worker_does_not_outlive_its_parent(started):
    process, pid = started
    assert is_alive(pid)
    os.kill(process.pid, signal.SIGKILL)
    assert has_ended(pid)
