"""Memory that a process has freed."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of malloc.h


def return_freed_memory() -> None:
    """Hands memory that this process has freed back to Linux.

    The C library would keep it, in gaps too small for larger tensors: batches of many shapes would take half as much again.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def keep_freed_memory() -> None:
    """Keeps memory that this process frees until `return_freed_memory`; each page that is had anew costs as much as to fill it.

    All threads take it from one heap: those of other threads would hand it back by themselves.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        for parameter, value in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, (1 << 31) - 1), (M_ARENA_MAX, 1)):
            library.mallopt(parameter, value)
