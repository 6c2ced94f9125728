"""The CTC head's file beside a saved model, which `transformers` does not look at."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import cached_file

CTC_FILE = "ctc_head.safetensors"


def save_ctc_head(model: Any, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes the CTC head of these weights into the model's folder, if it has one."""
    if model.ctc_head is not None:
        head = {name: weights[f"ctc_head.{name}"].contiguous() for name in model.ctc_head.state_dict()}
        save_file(head, folder / CTC_FILE)


def load_ctc_head(model: Any, name: Any, **hub_options: Any) -> None:
    """Reads the CTC head that lies in the model's folder or Hub repository, if it has one."""
    if model.ctc_head is not None:
        model.ctc_head.load_state_dict(load_file(cached_file(name, CTC_FILE, **hub_options)))
