"""Refuses a saved model whose JSON asks for more than its values: code of its own, kernels or another model."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_files

from sedtrain.errors import UserError
from sedtrain.plain import plain_value

ADAPTER = "adapter_config.json"
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")  # of weights in several files
SETTINGS = (
    *("config.json", "generation_config.json", *INDICES),
    *("tokenizer_config.json", "preprocessor_config.json", "processor_config.json", ADAPTER),
)
HUB_OPTIONS = {"cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder"}
CODE = ("auto_map", "auto_mapping", "custom_pipelines")  # name Python files or modules
KERNELS = re.compile("(attn|experts)_implementation")  # with a slash: code from the Hub
LAYERS, MOST_LAYERS = re.compile("layers?$"), 10_000
ASKED: set[tuple[Any, ...]] = set()
"""Hub ids with their options that this process has looked up on the Hub; from then on it looks in the cache."""


def refuse_code(option: str, name: str, **hub_options: Any) -> None:
    """Raises UserError where loading the folder or Hub id `name` would import or fetch what its own files name.

    hub_options: such as `revision`, by which it is looked up
    """
    write = f"write {option}=FOLDER of a model that transformers knows without other code"
    for file in settings_files(name, hub_options):
        if file.name == ADAPTER:
            wrong = f"{ADAPTER} makes it an adapter of peft, whose base model would be fetched"
            merge = f"write {option}=FOLDER of the merged model: model.merge_and_unload().save_pretrained(FOLDER)"
            raise UserError(option, name, wrong, merge)
        values = plain_value(file, option, name, write)
        if file.name in INDICES and (wrong := fault_of_index(values)):
            raise UserError(option, name, f"{file.name} {wrong}", f"write {option}=FOLDER saved by save_pretrained")
        for key, value in entries(values):
            if (key in CODE and value) or (KERNELS.search(key) and "/" in str(value)):
                wrong = f"{key}: it asks for Python code from elsewhere, and no code of a model's is run"
                raise UserError(option, name, f"{file.name} has {wrong}", write)
            if LAYERS.search(key) and isinstance(value, int) and value > MOST_LAYERS:
                wrong = f"{key}={value}, which would not be built for hours; no model has {MOST_LAYERS:,}"
                trusted = f"write {option}=FOLDER from a source that you trust"
                raise UserError(option, name, f"{file.name} has {wrong}", trusted)


def fault_of_index(values: Any) -> str:
    """The reason why an index of weights is not believed: files of weights lie beside it; "" for none."""
    weights = values.get("weight_map") if isinstance(values, dict) else None
    if not (isinstance(weights, dict) and weights and isinstance(values.get("metadata"), dict)):
        return "names no files of weights"
    outside = [file for file in weights.values() if not isinstance(file, str) or Path(file).name != file]
    return f"names {str(outside[0])[:200]!r}, which is no file of weights beside it" if outside else ""


def settings_files(name: str, hub_options: dict[str, Any]) -> list[Path]:
    """The existing JSON files by which `name` is loaded; for a Hub id, from its cache or the Hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        inside = folder / hub_options.get("subfolder", "")
        return [inside / file for file in SETTINGS if (inside / file).is_file()]
    quietly = {f"_raise_exceptions_for_{key}": False for key in ("gated_repo", "missing_entries", "connection_errors")}
    of_hub = (name, *sorted(hub_options.items()))
    again = {"local_files_only": True} if of_hub in ASKED else {}
    if found := cached_files(name, list(SETTINGS), **quietly, **{**hub_options, **again}):
        ASKED.add(of_hub)
    return [Path(file) for file in found or []]


def entries(value: Any) -> Iterator[tuple[str, Any]]:
    """The keys with their values, at any depth."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield str(key), each
            yield from entries(each)
    elif isinstance(value, list):
        for each in value:
            yield from entries(each)
