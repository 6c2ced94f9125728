"""Memory that a training step takes, measured in bytes: of this process on a CPU, of PyTorch on a GPU."""

import gc
import re
from pathlib import Path

import torch

from sedtrain.data.datamodule import return_freed_memory
from sedtrain.errors import UserError

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
NEW_PEAK = "5"  # has Linux reset the peak, proc(5)


class ProcessMemory:
    """The resident memory of this process in bytes, weights and libraries included: Linux ends a process by this count.

    Linux keeps the peak, so that none is missed. Processes that load data are not counted.
    Raises UserError where there is no such count.
    """

    def __init__(self) -> None:
        try:
            CLEAR.write_text(NEW_PEAK)
            self.taken()
        except (OSError, AttributeError) as error:
            wrong = f"this system does not count the peak of a process's memory ({error})"
            instead = "write the same command on Linux, or trainer.accelerator=cuda"
            raise UserError("task", "fit_batches", wrong, instead) from error

    def available(self) -> int:
        """What this process has and could still get."""
        return kilobytes(Path("/proc/meminfo"), "MemAvailable") + self.taken()

    def reset(self) -> None:
        """Gives back unused memory and starts a new peak."""
        gc.collect()
        return_freed_memory()
        CLEAR.write_text(NEW_PEAK)

    def taken(self) -> int:
        return kilobytes(STATUS, "VmRSS")

    def peak(self) -> int:
        return kilobytes(STATUS, "VmHWM")


class GpuMemory:
    """The bytes of a GPU that PyTorch has reserved; what other processes do not use is available."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def available(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] + self.taken()

    def reset(self) -> None:
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def taken(self) -> int:
        return torch.cuda.memory_reserved(self.device)

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_reserved(self.device)


def kilobytes(file: Path, name: str) -> int:
    """A value of a file of /proc, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", file.read_text(), re.MULTILINE)
    return int(found[1]) * 1024  # type: ignore[index]  # AttributeError would hide that there is none


Memory = ProcessMemory | GpuMemory


def memory_of(device: torch.device) -> Memory:
    """Raises UserError where memory cannot be measured."""
    if device.type == "cuda":
        return GpuMemory(device)
    if device.type == "cpu":
        return ProcessMemory()
    instead = "write trainer.accelerator=cuda or trainer.accelerator=cpu"
    raise UserError("trainer.accelerator", device.type, "its memory cannot be measured", instead)
