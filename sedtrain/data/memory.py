"""Memory that a process has freed."""

import ctypes
import sys


def return_freed_memory() -> None:
    """Hands memory that this process has freed back to Linux.

    The C library would keep it, in gaps too small for larger tensors: batches of many shapes would take half as much again.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
