"""Where a part's weights come from: a published checkpoint, a folder, or chance."""

import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sedtrain.batch import UserError
from sedtrain.hub import go_offline_if_unreachable


def published_name(part: str, size: str, checkpoint: str | None, published: Mapping[str, str | None]) -> str | None:
    """The Hub id or folder to load: `checkpoint` if given, else the family's member of this size; None for size=tiny."""
    if checkpoint is not None or size == "tiny":
        return checkpoint
    if published.get(size) is None:
        sizes = ", ".join(["tiny", *(name for name, hub_id in published.items() if hub_id)])
        raise UserError(f"size={size}: this {part} has no published checkpoint of this size", f"size=ONE_OF {sizes}")
    return published[size]


def load_config(
    part: str, name: str | None, model_type: str, tiny: Mapping[str, Any], **options: Any
) -> PreTrainedConfig:
    """The part's configuration: of checkpoint `name`, else the family's tiny member; `options` overwrite its values."""
    if name is None:
        config = AutoConfig.for_model(model_type)
    else:
        with loading(f"{part}.checkpoint", name):
            config = AutoConfig.from_pretrained(name)
    values = {**(tiny if name is None else {}), **options}
    if unknown := [key for key in values if not hasattr(config, key)]:
        close = difflib.get_close_matches(unknown[0], vars(config), n=1)
        raise UserError(
            f"{part}.options.{unknown[0]}: {type(config).__name__} has no such option"
            + (f"; did you mean {close[0]!r}?" if close else ""),
            f"{part}.options.NAME=VALUE with a NAME of {type(config).__name__}",
        )
    try:
        return type(config).from_dict({**config.to_dict(), **values})
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(
            f"{part}.options: {' '.join(str(error).split())[:200]}", f"{part}.options.NAME=VALUE that fits"
        ) from error


def load_weights(part: str, name: str, factory: Any, config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    """`factory.from_pretrained` in float32, whatever precision the weights have on disk."""
    with loading(f"{part}.checkpoint", name), attention_of(part, config):
        model = factory.from_pretrained(name, config=config, dtype=torch.float32, attn_implementation=attention)
    assert isinstance(model, PreTrainedModel)
    return model


def load_tokenizer(option: str, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer saved in folder or Hub id `name`. Raises UserError where none is: transformers makes an empty one then."""
    with loading(option, name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    files = ["tokenizer.json", *tokenizer.vocab_files_names.values()]
    folder = Path(name).expanduser()
    if folder.is_dir() and not any((folder / file).is_file() for file in files):
        raise UserError(
            f"{option}={name}: this folder has no tokenizer, it holds none of {', '.join(dict.fromkeys(files))}",
            f"{option}=FOLDER into which the tokenizer was saved beside the model",
        )
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


@contextmanager
def attention_of(part: str, config: PreTrainedConfig) -> Iterator[None]:
    """While a model is made, its family's refusal of an attention implementation becomes a UserError."""
    try:
        yield
    except (ValueError, ImportError) as error:
        attention = config._attn_implementation
        reason = " ".join(str(error).split())
        if not re.search("attention|attn", reason, re.IGNORECASE):
            raise
        raise UserError(
            f"{part}.attention={attention}: {config.model_type} cannot use it here: {reason[:160]}",
            f"{part}.attention=eager, which every family has",
        ) from error


@contextmanager
def loading(option: str, name: str) -> Iterator[None]:
    """Turns the failures of loading `name` into a UserError that says which of three things is wrong.

    option: what the user writes to name another one, such as `encoder.checkpoint`
    """
    folder = Path(name).expanduser()
    alternatives = f"{option}=FOLDER saved by save_pretrained, or a Hub id where the Hub can be reached"
    if option != "checkpoint":
        alternatives += ", or size=tiny (random weights, needs no network)"
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not folder.is_dir():
        raise UserError(f"{option}={name}: there is no such folder", alternatives)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{option}={name}: this folder is no model, it holds no config.json", alternatives)
    if not folder.is_dir():
        go_offline_if_unreachable()
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:
        where = "the folder" if folder.is_dir() else "there is no such folder here, and the Hub or its cache"
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{option}={name}: {where} gave: {reason}", alternatives) from error
