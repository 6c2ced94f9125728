"""Messages of the command, on the console and in the log file, and the status it exits with."""

import logging
import sys
import time
import warnings
from pathlib import Path

from sedtrain.launch import is_first

CANNOT_WORK, INTERRUPTED = 2, 130
"""Exit statuses: a mistake that the user can repair, and Ctrl-C."""
SPEAK_FIRST_SECONDS = 10
"""How long other processes wait while the first reports an error for all; the launcher ends them meanwhile."""
IRRELEVANT = (
    ".*does not have many workers.*",  # small audio decodes faster than it travels between processes
    ".*Experiment logs directory.*",  # the run's folder is new: open_run_folder made it
    ".*Support for mismatched key_padding_mask.*",  # between WavLM and PyTorch
    ".*smaller than the logging interval.*",  # expected with a small corpus
    ".*LeafSpec.*",  # between Lightning and PyTorch
    ".*your dataloader is not resumable.*",  # the data module resumes it
    ".*callbacks used to create the checkpoint.*",  # a new run may start from it; a resumed one cannot change them
    ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
)
"""Warnings of libraries that do not concern the user."""

logger = logging.getLogger("sedtrain")


class Failed(SystemExit):
    """Ends the command with a status, after its message has been printed."""


def fail(message: str, status: int = CANNOT_WORK) -> None:
    """Prints and logs a message, and ends the command. The first process reports a user's mistake for all."""
    if status == CANNOT_WORK and not is_first():
        time.sleep(SPEAK_FIRST_SECONDS)
    if logger.handlers:
        logger.error(message)
    else:
        print(message, file=sys.stderr)
    raise Failed(status)


def open_log() -> None:
    """Prints sedtrain's messages on the console, as they are."""
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    in_notebook = "ipykernel" in sys.modules  # notebooks show standard error in red
    to_console = logging.StreamHandler(sys.stdout if in_notebook else sys.stderr)
    to_console.setLevel(logging.INFO if is_first() else logging.WARNING)
    to_console.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(to_console)


def log_to_file(path: Path) -> None:
    """Adds the messages, with time and level, to a log file. Raises OSError if it cannot be opened."""
    to_file = logging.FileHandler(path)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(to_file)


def quieten_libraries() -> None:
    """Hides irrelevant messages of libraries; call it after imports, since Lightning's own import resets this."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in IRRELEVANT:
        warnings.filterwarnings("ignore", message)


def close_log() -> None:
    """Ends the log of this job; the next job of a sweep opens its own."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True
