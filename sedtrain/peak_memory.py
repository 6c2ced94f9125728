"""How much memory was taken at most: of this process, or of a GPU."""

import ctypes
import gc
import re
import sys
from pathlib import Path
from typing import Protocol

import torch

from sedtrain.batch import UserError

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
NEW_PEAK = "5"  # what has Linux forget the peak, proc(5)


class Memory(Protocol):
    """Memory that can be measured, in bytes."""

    def available(self) -> int:
        """What this process has and could still get."""

    def forget(self) -> None:
        """Gives back what is not in use, and begins a new peak."""

    def taken(self) -> int: ...

    def peak(self) -> int:
        """The most that was taken since `forget`."""


class ProcessMemory:
    """The resident memory of this process, weights and libraries included: what Linux counts where it ends a process.

    Linux keeps the peak, so that nothing is missed between two looks. The processes that load data are not in it.
    Raises UserError where there is no such count.
    """

    def __init__(self) -> None:
        try:
            CLEAR.write_text(NEW_PEAK)
            self.taken()
        except (OSError, AttributeError) as error:
            raise UserError(
                f"task=fit_batches: this system does not count the peak of a process's memory ({error})",
                "the same command on Linux, or trainer.accelerator=cuda",
            ) from error

    def available(self) -> int:
        return kilobytes(Path("/proc/meminfo"), "MemAvailable") + self.taken()

    def forget(self) -> None:
        gc.collect()
        return_freed_memory()
        CLEAR.write_text(NEW_PEAK)

    def taken(self) -> int:
        return kilobytes(STATUS, "VmRSS")

    def peak(self) -> int:
        return kilobytes(STATUS, "VmHWM")


class GpuMemory:
    """What PyTorch has reserved of a GPU; of the rest, what other processes leave is available."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def available(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] + self.taken()

    def forget(self) -> None:
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def taken(self) -> int:
        return torch.cuda.memory_reserved(self.device)

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_reserved(self.device)


def return_freed_memory() -> None:
    """Hands what this process has freed back to Linux; the C library would keep it, in gaps that larger tensors do not fit.

    Training on batches of many shapes takes half as much again without it.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def memory_of(device: torch.device) -> Memory:
    """Raises UserError where memory cannot be measured."""
    if device.type == "cuda":
        return GpuMemory(device)
    if device.type == "cpu":
        return ProcessMemory()
    raise UserError(
        f"task=fit_batches: the memory of {device.type} cannot be measured", "trainer.accelerator=cuda or =cpu"
    )


def kilobytes(file: Path, name: str) -> int:
    """A value of a file of /proc, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", file.read_text(), re.MULTILINE)
    return int(found[1]) * 1024  # type: ignore[index]  # AttributeError would hide that there is none
