"""Imports a task with everything that it needs, which takes most of the time of a short one."""

import gc
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOISY = ("torchao", "torch.utils._pytree")
"""Loggers that warn, whenever transformers imports torchao, of kernels for GPUs and of names that torch deprecates."""


def imported_task(name: str) -> Callable[[Any], None]:
    """The function of a task other than `compare`. Importing it takes seconds for the first job of a process."""
    for logger in NOISY:
        logging.getLogger(logger).setLevel(logging.ERROR)
    is_first_job = "torch" not in sys.modules
    if is_first_job:
        gc.disable()  # imports take a third less time without searches for garbage among objects that stay for good
        list_models_once()
    if name == "transcribe":
        from sedtrain.transcribe import transcribe as task
    elif name == "serve":
        from sedtrain.transcribe import serve as task
    else:
        from sedtrain import tasks

        task = getattr(tasks, name)
    if is_first_job:
        gc.freeze()
        gc.enable()
    return task


def list_models_once() -> None:
    """Hands `transformers.models` the list of classes that `transformers` has just read from two thousand files.

    A version of transformers without this function reads them twice.
    """
    import transformers
    from transformers.utils import import_utils

    read = getattr(import_utils, "create_import_structure_from_path", None)
    if read is None:
        return
    folder = Path(transformers.__file__).parent / "models"
    first = str(folder / "__init__.py")
    import_utils.create_import_structure_from_path = lambda path: read(folder if path == first else path)
