"""A command in a process of its own: a copy of this one, which has imported already what a new one would first import."""

import gc
import os
import runpy
import signal
import sys
import time
import traceback
import warnings
from html import escape
from multiprocessing.util import _exit_function as end_workers
from pathlib import Path

import torch

import sedtrain.tasks  # noqa: F401 - what a copy need not import
from sedtrain.evaluation import html

TESTS = Path(__file__).parent


class Forked:
    """`python -m MODULE ARGUMENTS` in a session of its own, whose pages have no drawings; its words are in `out` and `err`.

    variables: of its environment, beside those of this process
    """

    def __init__(self, folder, *arguments, module="sedtrain", **variables):
        self.files = [folder / f"{name} {time.monotonic_ns()}" for name in ("out", "err")]
        self.returncode = None
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of threads, which only wait
            self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.environ |= variables
            for descriptor, path in enumerate(self.files, start=1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
            run(module, [*map(str, arguments)])

    @property
    def out(self):
        return self.files[0].read_text()

    @property
    def err(self):
        return self.files[1].read_text()

    def poll(self):
        """The exit status, None before the end."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, seconds=200):
        """The exit status; kills what takes longer."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if self.returncode is None:
            self.kill()
        return self.returncode

    def kill(self):
        """Ends it and all processes that it has started."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def undrawn(caption, draw, percent, height=None):
    """A figure of a page without its lines."""
    return f"<figure><figcaption>{escape(caption)}</figcaption></figure>"


def run(module, arguments):
    """Becomes `python -m MODULE ARGUMENTS`."""
    if torch.accelerator.is_available():  # its state is of no use in a copy
        os.environ["PYTHONPATH"] = f"{TESTS.parent}{os.pathsep}{TESTS}"
        os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
    status = 1
    gc.freeze()  # what this process copied: a group of processes that was garbage there would never end here
    sys.stdout, sys.stderr = (os.fdopen(each, "w", buffering=1) for each in (1, 2))
    sys.argv[:] = [module, *arguments]
    sys.modules.pop(f"{module}.__main__", None)
    html.figure = undrawn
    warnings.resetwarnings()  # pytest's, which make errors of them
    for each in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", each)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        end_workers()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
