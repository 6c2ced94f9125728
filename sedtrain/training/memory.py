"""Memory that training takes: of the process on a CPU, of PyTorch on a GPU; an error of its own where it runs out.

Sizes are in bytes.
"""

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.memory import is_oom_error

from sedtrain.batch import IGNORE_INDEX, Batch
from sedtrain.data.memory import return_freed_memory
from sedtrain.errors import UNSET, UserError

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


class OutOfMemory(UserError):
    """A batch was too large."""


@contextmanager
def memory_for(batch: Batch, data: Any) -> Iterator[None]:
    """Raises OutOfMemory if memory runs out in this context.

    data: the SpeechTextDataModule; None if batches come from plain loaders
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or is_oom_error(error)):
            raise
        num_tokens = int((batch.labels != IGNORE_INDEX).sum())
        raise OutOfMemory(
            "data.batch_seconds",
            getattr(data, "batch_seconds", UNSET),
            f"out of memory in a batch of {len(batch)} utterances: {batch.seconds:.1f} s of audio, "
            f"an input of shape {tuple(batch.inputs.shape)}, {num_tokens:,} target tokens",
            "write data.batches=FILE, which task=fit_batches measures for this device\n"
            "or a smaller data.batch_seconds, with trainer.accumulate_grad_batches=NUMBER for updates of the same size\n"
            "or data.batch_tokens=NUMBER, or trainer.precision=bf16-mixed\n"
            "or a smaller data.max_seconds, if a single utterance is too long",
        ) from error
