"""`python -m sedtrain`: sets signal handlers and environment variables before other imports, then runs the command."""

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
        sys.path.append("")  # finds a user's own classes; at the end, so that no file hides an installed package
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    # Waiting threads that spin for long nearly stop two programs on the same cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # oneDNN and PyTorch cache plans for this many shapes; the default of 1024 costs a third of a gigabyte.
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, "32")
    from sedtrain.cli import run_command_line

    run_command_line(sys.argv[1:])


def interrupted(number: int, frame: FrameType | None) -> None:
    """Ends the process at once, because libraries catch or change exceptions that are raised inside them.

    Data-loading processes ignore Ctrl-C; the process that started them ends them.
    """
    if multiprocessing.parent_process() is not None:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the signal may have interrupted a write
            stream.flush()
    if is_first():
        if os.isatty(2):
            os.write(2, b"\x1b[?25h")  # shows the cursor, which a progress bar hides
        os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
