"""The CTC head's own file in the folder of a saved model, which `transformers` ignores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import cached_file

CTC_FILE = "ctc_head.safetensors"


def save_ctc_head(model: Any, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes the CTC head in `weights`, if the model has one."""
    if model.ctc_head is not None:
        head = {name: weights[f"ctc_head.{name}"].contiguous() for name in model.ctc_head.state_dict()}
        save_file(head, folder / CTC_FILE)


def load_ctc_head(model: Any, name: Any, **hub_options: Any) -> None:
    """Reads the CTC head from the folder or Hub id `name`, if the model has one."""
    if model.ctc_head is not None:
        model.ctc_head.load_state_dict(load_file(cached_file(name, CTC_FILE, **hub_options)))
