"""The device that a command computes on, and the precision of training there."""

from importlib.util import find_spec

import torch

from sedtrain.errors import UserError


def device(accelerator: object) -> torch.device:
    """The accelerator of this process; the CPU without one, or for `cpu`. Raises UserError for one that is absent.

    accelerator: the option `trainer.accelerator`
    """
    refuse_absent(accelerator)
    may_use = accelerator != "cpu" and torch.accelerator.is_available()
    return (torch.accelerator.current_accelerator() if may_use else None) or torch.device("cpu")


def refuse_absent(accelerator: object) -> None:
    """Raises UserError for an accelerator that this machine does not have."""
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    is_here = {"cuda": has_cuda, "mps": has_mps, "gpu": has_cuda or has_mps, "tpu": find_spec("torch_xla") is not None}
    if not is_here.get(str(accelerator), True):
        wrong, write = "PyTorch finds none on this machine", "write trainer.accelerator=auto or cpu"
        raise UserError("trainer.accelerator", accelerator, wrong, write)


def precision_of(device: torch.device) -> str:
    """bf16-mixed on a CUDA device with bfloat16 arithmetic, which some only emulate; else 32-true."""
    computes_in_16_bits = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if computes_in_16_bits else "32-true"
