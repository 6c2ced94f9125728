"""Where a part's weights come from: a published checkpoint, a folder, or chance."""

import copy
import difflib
import logging
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from sedtrain.errors import UserError
from sedtrain.hub import go_offline_if_unreachable

ATTENTION_FLAGS = {
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}


@contextmanager
def attention_of(part: str, config: PreTrainedConfig) -> Iterator[None]:
    """While a model is made, an attention implementation that the family or the machine lacks becomes a UserError.

    None, which `attention=auto` stands for, is never refused: transformers then takes sdpa where the family has it, else eager.
    """
    attention = config._attn_implementation
    if attention == "flex_attention":
        refuse_flex(part, config)
    try:
        yield
    except (ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, UserError):
            raise
        if not re.search("attention(?! heads)|attn", reason, re.IGNORECASE):
            raise UserError(f"{part}.options: {reason[:200]}", f"{part}.options.NAME=VALUE that fits") from error
        raise unusable_attention(part, config, reason[:160]) from error


def attention_wanted(part: str, config: PreTrainedConfig, options: Mapping[str, Any]) -> AbstractContextManager[None]:
    """`attention_of` where loading options ask for an implementation, else nothing."""
    if options.get("attn_implementation") is None:
        return nullcontext()
    config._attn_implementation = options["attn_implementation"]
    return attention_of(part, config)


def refuse_unsupported(config: PreTrainedConfig, attention: str | dict[str, str] | None) -> None:
    """Raises UserError for an attention implementation that a part of this joined model does not have.

    attention: of both parts, or of each by its name
    """
    for part in ("encoder", "decoder"):
        wanted = attention.get(part) if isinstance(attention, dict) else attention
        flag, family = ATTENTION_FLAGS.get(wanted or ""), family_of(getattr(config, part))
        if flag and family and not getattr(family, flag, False):
            described = copy.copy(getattr(config, part))
            described._attn_implementation = wanted
            raise unusable_attention(part, described, f"{family.__name__} does not have it")


def family_of(config: PreTrainedConfig) -> Any:
    """The class of transformers with this configuration, None for a class of the user's own."""
    return MODEL_MAPPING.get(type(config), None) or MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def unusable_attention(part: str, config: PreTrainedConfig, reason: str) -> UserError:
    usable = " or ".join(f"{part}.attention={each}" for each in attentions_of(config))
    return UserError(
        f"{part}.attention={config._attn_implementation}: {config.model_type} cannot use it here: {reason}",
        f"{usable}, or attention=auto, the best that each part can",
    )


def attentions_of(config: PreTrainedConfig) -> list[str]:
    """The attention implementations that this family can train with on this machine; the refused one is none of them."""
    family = family_of(config)
    usable = {
        "eager": True,
        "sdpa": getattr(family, "_supports_sdpa", False),
        "flash_attention_2": getattr(family, "_supports_flash_attn", False) and is_flash_attn_2_available(True),
        "flex_attention": getattr(family, "_supports_flex_attn", False) and torch.cuda.is_available(),
    }
    return [name for name, possible in usable.items() if possible and name != config._attn_implementation]


def refuse_flex(part: str, config: PreTrainedConfig) -> None:
    """Raises UserError for what FlexAttention would refuse in the middle of training: a CPU, and dropout."""
    if not torch.cuda.is_available():
        raise unusable_attention(part, config, "FlexAttention has no backward on a CPU")
    for name in ("attention_dropout", "attention_probs_dropout_prob"):
        if rate := getattr(config, name, 0.0):
            raise UserError(
                f"{part}.attention=flex_attention: it has no dropout, and {name} is {rate}",
                f"{part}.options.{name}=0, or attention=auto, the best that each part can",
            )


logger = logging.getLogger(__name__)


CROSS_ATTENTION = re.compile(r"cross_?att|encoder_att|enc_?dec|src_att", re.IGNORECASE)


UNLOADABLE = (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError)


HUB_OPTIONS = {"cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder"}


LOADING_OPTIONS = {"dtype", "torch_dtype", "attn_implementation"}


def published_name(part: str, size: str, checkpoint: str | None, published: Mapping[str, str | None]) -> str | None:
    """The Hub id or folder to load: `checkpoint` if given, else the family's member of this size; None for size=tiny."""
    if checkpoint is not None:
        return str(Path(checkpoint).expanduser()) if checkpoint.startswith("~") else checkpoint
    if size == "tiny":
        return None
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
        if model_type == "parakeet_encoder":
            config = encoder_within(config)
        refuse_other_family(part, name, config, model_type)
    values = {**(tiny if name is None else {}), **options}
    unknown = [key for key in values if not hasattr(config, key)]
    if "add_adapter" in unknown:
        raise UserError(
            f"adapter=family: {type(config).__name__} has no adapter of its own",
            "adapter=conv, which is much the same, or encoder=wav2vec2, wavlm, wav2vec2_conformer, w2v_bert or data2vec",
        )
    if unknown:
        close = difflib.get_close_matches(unknown[0], vars(config), n=1)
        raise UserError(
            f"{part}.options.{unknown[0]}: {type(config).__name__} has no such option"
            + (f"; did you mean {close[0]!r}?" if close else ""),
            f"{part}.options.NAME=VALUE with a NAME of {type(config).__name__}",
        )
    try:
        return type(config).from_dict({**({} if name is None else config.to_dict()), **values})
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(
            f"{part}.options: {' '.join(str(error).split())[:200]}", f"{part}.options.NAME=VALUE that fits"
        ) from error


def encoder_within(config: PreTrainedConfig) -> PreTrainedConfig:
    """Of Parakeet, which is published as whole models, the encoder's own configuration; any other as it is."""
    if not (config.model_type.startswith("parakeet_") and hasattr(config, "encoder_config")):
        return config
    encoder: PreTrainedConfig = config.encoder_config
    encoder._name_or_path = config._name_or_path
    return encoder


def configured(name: Any, options: Mapping[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The configuration of checkpoint `name` with what `options` say of it, and the options that are left for loading."""
    loading = {key: value for key, value in options.items() if key in HUB_OPTIONS | LOADING_OPTIONS}
    rest = {key: value for key, value in options.items() if key not in LOADING_OPTIONS}
    config, unused = AutoConfig.from_pretrained(name, return_unused_kwargs=True, **rest)
    return config, {**unused, **loading}


def load_weights(
    part: str, name: str, factory: Any, config: PreTrainedConfig, attention: str | None
) -> PreTrainedModel:
    """`factory.from_pretrained` in float32, whatever precision the weights have on disk.

    Raises UserError where the weights are another model's; what they lack is logged.
    """
    with loading(f"{part}.checkpoint", name), attention_of(part, config):
        model, loaded = factory.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    assert isinstance(model, PreTrainedModel)
    used = model.get_encoder() if part == "encoder" and model.config.is_encoder_decoder else model
    check_loaded(f"{part}.checkpoint={name}", model, loaded, used)
    return model


def check_loaded(option: str, model: nn.Module, loaded: Mapping[str, Any], used: nn.Module) -> None:
    """Raises UserError where a file of weights fits the model badly; else what starts at random is logged.

    option: as the user wrote it
    loaded: what transformers says of the file: `missing_keys`, `mismatched_keys`
    used: the part of the model that matters
    """
    instead = f"{option.partition('=')[0]}=FOLDER whose config.json and weights belong together"
    if loaded["mismatched_keys"]:
        weight, stored, wanted = min(loaded["mismatched_keys"])
        sizes = f"{weight} has the shape {tuple(stored)} in the file and {tuple(wanted)} in the model"
        raise UserError(f"{option}: {sizes}", f"{instead}, without options that change sizes")
    of_used = set(used.parameters())
    sizes_of = {name: weight.numel() for name, weight in model.named_parameters() if weight in of_used}
    missing = sorted(sizes_of.keys() & set(loaded["missing_keys"]))
    if 2 * sum(sizes_of[name] for name in missing) > sum(sizes_of.values()):
        lack = f"it lacks {len(missing)} of {len(sizes_of)}, such as {missing[0]}"
        raise UserError(f"{option}: its weights are of another model: {lack}", instead)
    if new := parts(name for name in missing if not CROSS_ATTENTION.search(name)):
        logger.warning("%s lacks some weights, which start at random: %s", option, new)


def parts(names: Iterable[str]) -> str:
    """What parameters of these names belong to, in a few words."""
    return ", ".join(
        sorted({"cross-attention" if CROSS_ATTENTION.search(name) else ".".join(name.split(".")[:2]) for name in names})
    )


def refuse_other_family(part: str, name: str, config: PreTrainedConfig, model_type: str) -> None:
    """Raises UserError for a checkpoint of a joined model, or of another family than the one that is asked for."""
    if config.model_type.endswith("speech-encoder-decoder"):
        raise joined_model(f"{part}.checkpoint", name)
    if not isinstance(config, CONFIG_MAPPING[model_type]):
        other = config.model_type
        raise UserError(
            f"{part}.checkpoint={name}: this is a {other} model, and {part}.model_type is {model_type}",
            f"{part}={other.replace('-', '_')}, or where no option has that name {part}.model_type={other}",
        )


def joined_model(option: str, name: str) -> UserError:
    part = option.partition(".")[0]
    return UserError(
        f"{option}={name}: this is a joined model of encoder and decoder",
        f"task=evaluate checkpoint={name} to score it, or {option}=FOLDER of a part alone,"
        f" as model.{part}.save_pretrained(FOLDER) writes it",
    )


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
def loading(option: str, name: str) -> Iterator[None]:
    """Turns the failures of loading `name` into a UserError that says which of four things is wrong.

    option: what the user writes to name another one, such as `encoder.checkpoint`
    """
    folder = Path(name).expanduser()
    alternatives = f"{option}=FOLDER saved by save_pretrained, or a Hub id where the Hub can be reached"
    if option != "checkpoint":
        alternatives += f", or without {option} size=tiny (random weights, needs no network)"
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not folder.is_dir():
        raise UserError(f"{option}={name}: there is no such folder", alternatives)
    if folder.is_dir() and not (folder / "config.json").is_file():
        if (folder / "model/config.json").is_file():
            raise joined_model(option, name)
        raise UserError(f"{option}={name}: this folder is no model, it holds no config.json", alternatives)
    if not folder.is_dir():
        go_offline_if_unreachable()
    try:
        yield
    except UserError:
        raise
    except UNLOADABLE as error:
        where = "the folder" if folder.is_dir() else "there is no such folder here, and the Hub or its cache"
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{option}={name}: {where} gave: {reason}", alternatives) from error
