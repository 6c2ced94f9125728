"""Memory that training takes: of the process on a CPU, of PyTorch on a GPU. Sizes are in bytes."""

import gc
import re
from pathlib import Path

import torch

from sedtrain.data.memory import return_freed_memory
from sedtrain.errors import UserError

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # written to clear_refs: see proc(5)


class ProcessMemory:
    """Resident memory of this process, weights and libraries included: Linux kills a process by this number.

    Linux itself keeps the peak, so no short peak is missed. Data-loading processes are not counted.
    Raises UserError on systems without this count.
    """

    def __init__(self) -> None:
        try:
            CLEAR.write_text(RESET_PEAK)
            self.used()
        except (OSError, IndexError) as error:
            wrong = f"this system does not count the peak of a process's memory ({error})"
            instead = "write the same command on Linux, or trainer.accelerator=cuda"
            raise UserError("task", "fit_batches", wrong, instead) from error

    def available(self) -> int:
        """Used and free memory together."""
        return read_proc_bytes(Path("/proc/meminfo"), "MemAvailable") + self.used()

    def reset(self) -> None:
        """Returns freed memory to the system and starts a new peak."""
        gc.collect()
        return_freed_memory()
        CLEAR.write_text(RESET_PEAK)

    def used(self) -> int:
        return read_proc_bytes(STATUS, "VmRSS")

    def peak(self) -> int:
        return read_proc_bytes(STATUS, "VmHWM")


class GpuMemory:
    """Memory of a GPU that PyTorch has reserved. Everything that other processes leave free is available."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def available(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] + self.used()

    def reset(self) -> None:
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def used(self) -> int:
        return torch.cuda.memory_reserved(self.device)

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_reserved(self.device)


MemoryMeter = ProcessMemory | GpuMemory


def memory_meter(device: torch.device) -> MemoryMeter:
    """The meter for a device. Raises UserError if its memory cannot be measured."""
    if device.type == "cpu":
        return ProcessMemory()
    if device.type == "cuda":
        return GpuMemory(device)
    instead = "write trainer.accelerator=cuda or trainer.accelerator=cpu"
    raise UserError("trainer.accelerator", device.type, "its memory cannot be measured", instead)


def read_proc_bytes(file: Path, name: str) -> int:
    """A size in a file of /proc, which counts in kB."""
    return 1024 * int(re.findall(rf"^{name}:\s+(\d+) kB$", file.read_text(), re.MULTILINE)[0])
