"""Refuses a saved model whose JSON files ask for code, kernels or another model to be loaded."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_files

from sedtrain.errors import UserError
from sedtrain.plain import plain_value

ADAPTER = "adapter_config.json"
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")  # for weights in several files
SETTINGS = (
    *("config.json", "generation_config.json", *INDICES),
    *("tokenizer_config.json", "preprocessor_config.json", "processor_config.json", ADAPTER),
)
HUB_OPTIONS = {"cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder"}
CODE = ("auto_map", "auto_mapping", "custom_pipelines")  # keys that name Python files or modules
KERNELS = re.compile("(attn|experts)_implementation")  # keys whose value names code on the Hub if it has a slash
LAYERS, MOST_LAYERS = re.compile("layers?$"), 10_000
ASKED: set[tuple[Any, ...]] = set()
"""Hub ids, with options, that this process has looked up on the Hub; the next look-up uses the cache."""


def refuse_code(option: str, name: str, **hub_options: Any) -> None:
    """Raises UserError if loading the folder or Hub id `name` would run or fetch something that its files name.

    hub_options: such as `revision`
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
                wrong = f"{key}: it asks for Python code from elsewhere, and sedtrain runs no code of a model"
                raise UserError(option, name, f"{file.name} has {wrong}", write)
            if LAYERS.search(key) and isinstance(value, int) and value > MOST_LAYERS:
                wrong = f"{key}={value}, which would take hours to build; no model has {MOST_LAYERS:,}"
                trusted = f"write {option}=FOLDER from a source that you trust"
                raise UserError(option, name, f"{file.name} has {wrong}", trusted)


def fault_of_index(values: Any) -> str:
    """The reason to refuse an index of weights, whose files must lie in its own folder; "" for none."""
    weights = values.get("weight_map") if isinstance(values, dict) else None
    if not (isinstance(weights, dict) and weights and isinstance(values.get("metadata"), dict)):
        return "names no files of weights"
    outside = [file for file in weights.values() if not isinstance(file, str) or Path(file).name != file]
    return f"names {str(outside[0])[:200]!r}, which is no file of weights beside it" if outside else ""


def settings_files(name: str, hub_options: dict[str, Any]) -> list[Path]:
    """The JSON settings files of `name` that exist; for a Hub id, from its cache or the Hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        inside = folder / hub_options.get("subfolder", "")
        return [inside / file for file in SETTINGS if (inside / file).is_file()]
    quietly = {f"_raise_exceptions_for_{key}": False for key in ("gated_repo", "missing_entries", "connection_errors")}
    question = (name, *sorted(hub_options.items()))
    from_cache = {"local_files_only": True} if question in ASKED else {}
    if found := cached_files(name, list(SETTINGS), **quietly, **{**hub_options, **from_cache}):
        ASKED.add(question)
    return [Path(file) for file in found or []]


def entries(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values in JSON, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key), inner
            yield from entries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from entries(inner)
