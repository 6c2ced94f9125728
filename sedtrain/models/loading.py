"""Loads weights and tokenizers of a checkpoint, and explains a failure to load."""

import logging
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SpeechEncoderDecoderConfig,
)
from transformers.utils.quantization_config import QuantizationMethod

from sedtrain.errors import UserError, in_python, one_line
from sedtrain.hub import go_offline_if_unreachable
from sedtrain.models.attention import building
from sedtrain.models.flax_weights import FILE, INDEX, TORCH_FILES, flax_weights, generation_config_of
from sedtrain.models.foreign import HUB_OPTIONS, refuse_code
from sedtrain.models.speech_to_text_2 import register

logger = logging.getLogger(__name__)
register()

CROSS_ATTENTION = re.compile(r"cross_?att|encoder_att|enc_?dec|src_att", re.IGNORECASE)
SELF_EXPLAINING = (OSError, ValueError, RuntimeError, SafetensorError)
"""Errors whose message is clear without the name of their class."""


def load_weights(
    part: str, name: str, factory: Any, config: PreTrainedConfig, attention: str | None
) -> PreTrainedModel:
    """`factory.from_pretrained` in float32, whatever precision the weights have on disk.

    part: "encoder" or "decoder"
    Raises UserError if the weights belong to another model; logs missing weights.
    """
    with loading(f"{part}.checkpoint", name), building(part, config, (ValueError, ImportError)):
        model, loaded = pretrained(
            factory,
            name,
            option=f"{part}.checkpoint",
            config=config,
            dtype=torch.float32,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    assert isinstance(model, PreTrainedModel)
    used = model.get_encoder() if part == "encoder" and model.config.is_encoder_decoder else model
    check_loaded(f"{part}.checkpoint", name, model, loaded, used)
    return model


def check_loaded(
    option: str, name: str, model: nn.Module, loaded: Mapping[str, Any], used: nn.Module, *, is_trained: bool = False
) -> None:
    """Logs which weights are missing from the file and start at random. Raises UserError if most are, or if sizes differ.

    option: names the checkpoint on the command line
    loaded: the loading report of transformers: `missing_keys`, `mismatched_keys`, `unexpected_keys`
    used: the submodule that is needed
    is_trained: raises UserError for any missing weight, and logs unused ones
    """
    write = f"write {option}=FOLDER whose config.json and weights belong together"
    if loaded["mismatched_keys"]:
        weight, stored, wanted = min(loaded["mismatched_keys"])
        wrong = f"{weight} has the shape {tuple(stored)} in the file and {tuple(wanted)} in the model"
        raise UserError(option, name, wrong, f"{write}, without options that change sizes")
    used_weights = set(used.parameters())
    sizes = {key: weight.numel() for key, weight in model.named_parameters() if weight in used_weights}
    missing = sorted(sizes.keys() & set(loaded["missing_keys"]))
    lack = f"it lacks {len(missing)} of {len(sizes)}, such as {missing[0]}" if missing else ""
    if 2 * sum(sizes[key] for key in missing) > sum(sizes.values()):
        raise UserError(option, name, f"its weights belong to another model: {lack}", write)
    if is_trained and missing:
        raise UserError(option, name, f"its weights are incomplete: {lack}", write)
    if is_trained and (unused := sorted(loaded["unexpected_keys"])):
        logger.warning("%s=%s holds %d weights that its model does not use: %s", option, name, len(unused), unused[0])
    if new := {".".join(key.split(".")[:2]) for key in missing if not CROSS_ATTENTION.search(key)}:
        logger.warning("%s=%s lacks some weights, which start at random: %s", option, name, ", ".join(sorted(new)))


def joined_model(option: str, name: str) -> UserError:
    """The refusal of a joined model where an encoder or decoder belongs."""
    part = option.partition(".")[0]
    wrong = "this is a joined model of encoder and decoder"
    alone = f"{option}=FOLDER of a part alone, as model.{part}.save_pretrained(FOLDER) writes it"
    write, python = f"write task=evaluate checkpoint={name} to score it", f"write sedtrain.load({name!r}) to use it"
    return UserError(option, name, wrong, f"{write}, or {alone}", f"{python}, or {in_python(alone)}")


def load_tokenizer(option: str, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer in folder or Hub id `name`. Raises UserError if there is none; transformers would make an empty one."""
    with loading(option, name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    files = ["tokenizer.json", *tokenizer.vocab_files_names.values()]
    folder = Path(name).expanduser()
    if folder.is_dir() and not any((folder / file).is_file() for file in files):
        wrong = f"this folder has no tokenizer, it holds none of {', '.join(dict.fromkeys(files))}"
        raise UserError(option, name, wrong, f"write {option}=FOLDER with the tokenizer saved beside the model")
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


@contextmanager
def loading(option: str, name: str) -> Iterator[None]:
    """Turns a failure to load `name` into a UserError: a missing folder, a folder without a model, code, unreadable files.

    option: names the checkpoint on the command line, such as `encoder.checkpoint`
    """
    folder = Path(name).expanduser()
    write = f"write {option}=FOLDER saved by save_pretrained, or a Hub id if the Hub can be reached"
    if option.endswith(".checkpoint"):
        write += f", or without {option} size=tiny (random weights, needs no network)"
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not folder.is_dir():
        raise UserError(option, name, "there is no such folder", write)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise no_model(option, name, folder, write)
    if not folder.is_dir():
        go_offline_if_unreachable()
    try:
        refuse_code(option, name)
        yield
    except Exception as error:  # a folder's files may hold anything, so loading may raise anything
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("torchao"):
            wrong = "its weights are in 8 bits by torchao, which is not installed"
            raise UserError(option, name, wrong, "pip install 'sedtrain[int8]'") from error
        if isinstance(error, UserError) and not (option == "checkpoint" and error.option.endswith(".model_type")):
            raise
        error = error.__cause__ if isinstance(error, UserError) and isinstance(error.__cause__, Exception) else error
        where = "the folder" if folder.is_dir() else "there is no such folder here, and the Hub or its cache"
        raise UserError(option, name, f"{where} gave: {reason_of(error)}", write) from error


def reason_of(error: Exception) -> str:
    """One line that says why loading failed."""
    if isinstance(error, pickle.UnpicklingError):
        return "a pickle of weights that is damaged, or holds more than numbers and could run code"
    text = one_line(error, 160)
    if isinstance(error, KeyError):
        return f"no {text} in its files"
    return text if text and isinstance(error, SELF_EXPLAINING) else f"{type(error).__name__} {text}".rstrip()


def no_model(option: str, name: str, folder: Path, write: str) -> UserError:
    """The refusal of a folder without a config.json; it says if the folder is a run or an adapter instead."""
    wrong, python = "this folder is no model, it holds no config.json", ""
    if (folder / "model/config.json").is_file():
        return joined_model(option, name)
    if runs := [path for path in (folder, folder.parent) if (path / "config.yaml").is_file()]:
        wrong, ends = "this run has saved no model yet", "it saves a model when it ends or is stopped"
        again = f"run_dir={runs[0]} resume=auto"
        write, python = f"write {again} and the options of the run: {ends}", f"run python -m sedtrain {again}: {ends}"
    elif (folder / "adapter_config.json").is_file():
        wrong = "this is an adapter of peft without its model"
        write = f"write {option}=FOLDER of the merged model: model.merge_and_unload().save_pretrained(FOLDER)"
    return UserError(option, name, wrong, write, python)


def joint_config(encoder: PreTrainedModel, decoder: PreTrainedModel) -> SpeechEncoderDecoderConfig:
    """The joined configuration of two modules. Registers a user's own class, so that transformers finds it."""
    for part, factory in ((encoder, transformers.AutoModel), (decoder, transformers.AutoModelForCausalLM)):
        if part.config.model_type not in transformers.CONFIG_MAPPING:
            AutoConfig.register(part.config.model_type, type(part.config))
            factory.register(type(part.config), type(part))
    return SpeechEncoderDecoderConfig.from_encoder_decoder_configs(encoder.config, decoder.config)


def share_config(part: nn.Module, config: transformers.PreTrainedConfig) -> None:
    """Gives every module of the part this configuration object, so that a later change reaches all of them."""
    kind = type(part.config)
    for module in part.modules():
        if isinstance(getattr(module, "config", None), kind):
            module.config = config


def pretrained(
    factory: Any, name: Any, *args: Any, option: str = "checkpoint", from_flax: bool = False, **options: Any
) -> Any:
    """`factory.from_pretrained(name, ...)` without running the model's own code; also loads Flax weights.

    option: names the checkpoint on the command line
    from_flax: True loads Flax weights; False does so only from a folder without PyTorch weights
    """
    options.pop("trust_remote_code", None)
    hub_options = {key: options[key] for key in HUB_OPTIONS & options.keys()}
    folder = Path(name or "", hub_options.get("subfolder", ""))
    flax, torch_ = (any((folder / file).is_file() for file in files) for files in ((FILE, INDEX), TORCH_FILES))
    if name is None or not (from_flax or (flax and not torch_)):
        loaded = factory.from_pretrained(name, *args, trust_remote_code=False, **options)
        if "quantization_config" not in options:
            in_float32(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded
    options = {"generation_config": generation_config_of(str(name), hub_options), **options}
    options["state_dict"] = flax_weights(option, str(name), hub_options)
    # without a name, an Auto class cannot load a state_dict
    factory = getattr(factory, "_model_mapping", {}).get(type(options["config"]), factory)
    loaded = factory.from_pretrained(None, *args, trust_remote_code=False, **options)
    (loaded[0] if isinstance(loaded, tuple) else loaded).config._name_or_path = str(name)
    return loaded


def in_float32(model: Any) -> None:
    """Gives every weight that torchao holds in 8 bits its value in float32; other models stay as they are."""
    if getattr(model, "quantization_method", None) != QuantizationMethod.TORCHAO:
        return
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if hasattr(weight, "dequantize") and type(weight) is not nn.Parameter:
                setattr(module, name, nn.Parameter(weight.dequantize().float()))
                vars(module).pop("extra_repr", None)  # shows the weight's class, and cannot be pickled
    model.hf_quantizer.remove_quantization_config(model)
    model._weight_conversions = None  # with which transformers would save 8 bits again
