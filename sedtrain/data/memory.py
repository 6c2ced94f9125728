"""Controls what the C library does with memory that a process has freed."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of malloc.h


def return_freed_memory() -> None:
    """Hands memory that this process has freed back to Linux.

    The C library would keep it in gaps that are too small for larger tensors. Batches of many shapes would then take
    half as much memory again.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def keep_freed_memory() -> None:
    """Keeps the memory that this process frees until `return_freed_memory`, for reuse.

    To get a new page from Linux takes as long as to fill the page. All threads share one heap, because the heaps of
    other threads would hand memory back by themselves.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        for parameter, value in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, (1 << 31) - 1), (M_ARENA_MAX, 1)):
            library.mallopt(parameter, value)
