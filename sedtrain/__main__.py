"""`python -m sedtrain`: settles signals and variables before anything else is imported, then runs the command."""

import contextlib
import multiprocessing
import os
import signal
import sys
from types import FrameType

from sedtrain.launch import is_first


def main() -> None:
    """Runs the command line. Exit status 2 is a mistake that the user can repair, 130 is Ctrl-C."""
    signal.signal(signal.SIGINT, interrupted)
    if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until training starts there is nothing to save
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(
            ""
        )  # a user's own classes, found from the console script too; no file hides an installed package
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    # Threads that spin for long while they wait bring two programs on the same cores to a near standstill.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Plans are kept of so many shapes that were computed last; of 1024, the default, they take a third of a gigabyte.
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, "32")
    from sedtrain.cli import run_command_line

    run_command_line(sys.argv[1:])


def interrupted(number: int, frame: FrameType | None) -> None:
    """Ends the process at once: libraries catch or change an exception that is raised while they run.

    The processes that load data leave it to the one that started them.
    """
    if multiprocessing.parent_process() is not None:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # it may be in the middle of a write
            stream.flush()
    if is_first():
        if os.isatty(2):
            os.write(2, b"\x1b[?25h")  # the cursor, which a bar hides
        os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
