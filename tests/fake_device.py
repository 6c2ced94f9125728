"""A device without values, PyTorch's meta device, that counts how often the host would wait for an accelerator."""

import traceback
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
DEVICE = torch.device("meta")
FROM_DATA = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
SHAPED_BY_VALUES = (
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
)


def is_on_device(value):
    return isinstance(value, torch.Tensor) and value.device == DEVICE


def is_mask(indices):
    return any(is_on_device(each) and each.dtype in (torch.bool, torch.uint8) for each in indices if each is not None)


class Waits(TorchDispatchMode):
    """What makes the host wait, each with the line of this project that asked for it.

    A number that is read is 1; what depends on values is taken for true.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def note(self, what):
        stack = [
            each for each in traceback.extract_stack() if "/torch/" not in each.filename and __file__ != each.filename
        ]
        self.found.append(f"{what} in {stack[-1].filename}, line {stack[-1].lineno}")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args else None
        if function in (aten._local_scalar_dense.default, aten.equal.default) and is_on_device(first):
            self.note(function)
            return torch.ones((), dtype=getattr(first, "dtype", torch.bool)).item()
        if function in SHAPED_BY_VALUES and is_on_device(first):
            self.note(function)
            return torch.ones(first.shape, device="cpu").nonzero().to(DEVICE, non_blocking=True)
        by_mask = function in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) and is_mask(args[1])
        if by_mask and not (len(args) > 2 and args[2].ndim == 0):  # a single number is filled in without looking
            self.note(function)
            args = (
                first,
                [torch.ones(each.shape, dtype=torch.bool).nonzero().to(DEVICE) for each in args[1]],
                *args[2:],
            )
        if function is aten._to_copy.default and self.is_copied(first.device, kwargs):
            self.note(function)
            if is_on_device(first):
                return torch.ones(first.shape, dtype=kwargs.get("dtype") or first.dtype)
        if function is aten.copy_.default and first.device != args[1].device and not (len(args) > 2 and args[2]):
            self.note(function)
        if function is aten._ctc_loss.Tensor and is_on_device(first):
            if is_on_device(args[2]) or is_on_device(args[3]):
                self.note(function)
            frames, rows, _ = first.shape
            return first.new_empty(rows), first.new_empty(rows, frames, 2 * args[1].shape[1] + 1)
        if function is aten._ctc_loss_backward.Tensor and is_on_device(first):
            return torch.empty_like(args[1])
        return function(*args, **kwargs)

    @staticmethod
    def is_copied(source, options):
        """True for a copy between the host and the device that the host waits for: all to the host, since it reads them."""
        target = options.get("device") or source
        return target != source and (source == DEVICE or not options.get("non_blocking"))


class Transfers(TorchFunctionMode):
    """Notes tensors that are made on the device out of Python's numbers: the host waits for the copy."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if (
            function in FROM_DATA
            and is_on_device(made)
            and not is_on_device(args[0] if function != FROM_DATA[2] else None)
        ):
            self.waits.note(function.__name__)
        return made


@contextmanager
def counted():
    waits = Waits()
    with waits, Transfers(waits):
        yield waits
