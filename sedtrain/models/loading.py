"""Loading an encoder or decoder: its configuration, its weights, its tokenizer, its attention implementation.

`part` is "encoder" or "decoder": what the options that an error names begin with.
"""

import copy
import difflib
import logging
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
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
from transformers.utils import is_flash_attn_2_available

from sedtrain.errors import UserError, in_python, one_line
from sedtrain.hub import go_offline_if_unreachable
from sedtrain.models.flax_weights import pretrained
from sedtrain.models.foreign import HUB_OPTIONS, refuse_code
from sedtrain.models.options import UNBUILDABLE, refuse_impossible, refuse_uneven
from sedtrain.models.speech_to_text_2 import register
from sedtrain.models.stacks import decoder_config, whole_type

logger = logging.getLogger(__name__)
register()

CROSS_ATTENTION = re.compile(r"cross_?att|encoder_att|enc_?dec|src_att", re.IGNORECASE)
LOADING_OPTIONS = {"dtype", "torch_dtype", "attn_implementation"}
OWN_WORDS = (OSError, ValueError, RuntimeError, SafetensorError)
"""Errors that say what is wrong, without the name of their class."""
ATTENTION_FLAGS = {
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}


def published_name(part: str, size: str, checkpoint: str | None, published: Mapping[str, str | None]) -> str | None:
    """The Hub id or folder to load: `checkpoint` if given, else the family's member of this size; None for size=tiny."""
    if checkpoint is not None:
        return str(Path(checkpoint).expanduser()) if checkpoint.startswith("~") else checkpoint
    if size == "tiny":
        return None
    if published.get(size) is None:
        sizes = ", ".join(["tiny", *(name for name, hub_id in published.items() if hub_id)])
        wrong = f"this {part} has no published checkpoint of this size"
        raise UserError("size", size, wrong, f"write size=ONE_OF {sizes}")
    return published[size]


def load_config(
    part: str, name: str | None, model_type: str, tiny: Mapping[str, Any], /, **options: Any
) -> PreTrainedConfig:
    """The configuration of checkpoint `name`, else of the family's tiny member; `options` overwrite its values."""
    config = default_config(part, model_type)
    if name is not None:
        with loading(f"{part}.checkpoint", name):
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if model_type == "parakeet_encoder":
            config = encoder_within(config)
        if part == "decoder":
            config = decoder_config(config)
        refuse_other_family(part, name, config, model_type)
    values = {**(tiny if name is None else {}), **options}
    unknown = [key for key in values if key == "model_type" or not hasattr(config, key) or is_computed(config, key)]
    kind = type(config).__name__
    if "add_adapter" in unknown:
        others = "encoder=wav2vec2, wavlm, wav2vec2_conformer, w2v_bert or data2vec"
        write = f"write adapter=conv, which is much the same, or {others}"
        python = "leave add_adapter out; ConvAdapter is much the same"
        raise UserError("adapter", "family", f"{kind} has no adapter of its own", write, python)
    if "adapter_stride" in unknown and "add_adapter" in values:
        write = "write adapter=linear, and encoder.options.adaptor_stride=NUMBER to change its stride"
        python = "leave add_adapter out, and write adaptor_stride=NUMBER to change its stride"
        raise UserError("adapter", "family", f"{kind} has its own adapter already", write, python)
    if unknown:
        close = difflib.get_close_matches(unknown[0], vars(config), n=1)
        wrong = f"{kind} has no such option" + (f"; did you mean {close[0]!r}?" if close else "")
        where = f"{part}.options" if unknown[0] in options else f"{part}.tiny"
        write = f"write {part}.options.NAME=VALUE with a NAME of {kind}"
        if unknown[0] not in options:
            option = f"{part}={model_type.replace('-', '_')}"
            write = f"write {option}, or if no option has that name '~{where}.{unknown[0]}' to leave it out"
        raise UserError(f"{where}.{unknown[0]}", values[unknown[0]], wrong, write)
    given = {"tiny": {key: each for key, each in values.items() if key not in options}, "options": options}
    refuse_impossible(part, given, type(config)())
    try:
        made = type(config).from_dict({**({} if name is None else config.to_dict()), **values})
    except (StrictDataclassError, *UNBUILDABLE) as error:
        write = f"write {part}.options.NAME=VALUE that fits"
        raise UserError(f"{part}.options", options, one_line(error, 200), write) from error
    refuse_uneven(part, given, made)
    return made


def is_computed(config: PreTrainedConfig, name: str) -> bool:
    """True for a value that the family's configuration class computes from others."""
    value = getattr(type(config), name, None)
    return isinstance(value, property) and value.fset is None


def default_config(part: str, model_type: str) -> PreTrainedConfig:
    """The configuration of a family as it is. Raises UserError for one that transformers does not know."""
    if model_type not in transformers.CONFIG_MAPPING:
        close = difflib.get_close_matches(model_type, list(transformers.CONFIG_MAPPING), n=1)
        wrong = "transformers knows no such family" + (f"; did you mean {close[0]!r}?" if close else "")
        raise UserError(
            f"{part}.model_type", model_type, wrong, f"write {part}=OPTION, or a model_type of transformers"
        )
    config: PreTrainedConfig = AutoConfig.for_model(model_type)
    return decoder_config(config) if part == "decoder" else config


def encoder_within(config: PreTrainedConfig) -> PreTrainedConfig:
    """The encoder's configuration inside a whole Parakeet model's, as it is published; any other unchanged."""
    if not (config.model_type.startswith("parakeet_") and hasattr(config, "encoder_config")):
        return config
    encoder: PreTrainedConfig = config.encoder_config
    encoder._name_or_path = config._name_or_path
    return encoder


def configured(name: Any, options: Mapping[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The configuration of checkpoint `name` with the `options` that it has, and the options that remain for loading."""
    loading = {key: value for key, value in options.items() if key in HUB_OPTIONS | LOADING_OPTIONS}
    rest = {key: value for key, value in options.items() if key not in LOADING_OPTIONS | {"trust_remote_code"}}
    refuse_code("checkpoint", str(name), **{key: value for key, value in options.items() if key in HUB_OPTIONS})
    config, unused = AutoConfig.from_pretrained(name, return_unused_kwargs=True, trust_remote_code=False, **rest)
    return config, {**unused, **loading}


def load_weights(
    part: str, name: str, factory: Any, config: PreTrainedConfig, attention: str | None
) -> PreTrainedModel:
    """`factory.from_pretrained` in float32, whatever precision the weights have on disk.

    Raises UserError if the weights are of another model; weights that are missing are logged.
    """
    with loading(f"{part}.checkpoint", name), attention_of(part, config, (ValueError, ImportError)):
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
    """Logs which weights start at random because the file lacks them; raises UserError if most do, or if sizes differ.

    option: names the checkpoint, as on the command line
    loaded: what transformers says of the file: `missing_keys`, `mismatched_keys`, `unexpected_keys`
    used: the part of the model that is needed
    is_trained: no weight may start at random; what the file holds beside them is logged
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
        raise UserError(option, name, f"its weights are of another model: {lack}", write)
    if is_trained and missing:
        raise UserError(option, name, f"its weights are incomplete: {lack}", write)
    if is_trained and (others := sorted(loaded["unexpected_keys"])):
        logger.warning("%s=%s holds %d weights that its model does not use: %s", option, name, len(others), others[0])
    if new := {".".join(key.split(".")[:2]) for key in missing if not CROSS_ATTENTION.search(key)}:
        logger.warning("%s=%s lacks some weights, which start at random: %s", option, name, ", ".join(sorted(new)))


def refuse_other_family(part: str, name: str, config: PreTrainedConfig, model_type: str) -> None:
    """Raises UserError for a checkpoint of a joined model, or of another family than `model_type`."""
    if config.model_type.endswith("speech-encoder-decoder"):
        raise joined_model(f"{part}.checkpoint", name)
    if not isinstance(config, type(default_config(part, model_type))):
        other = whole_type(config)
        wrong = f"this is a {other} model, no {model_type}"
        write = f"write {part}={other.replace('-', '_')}, or if no option has that name {part}.model_type={other}"
        raise UserError(f"{part}.checkpoint", name, wrong, write, f"write model_type={other!r}")


def joined_model(option: str, name: str) -> UserError:
    part = option.partition(".")[0]
    wrong = "this is a joined model of encoder and decoder"
    alone = f"{option}=FOLDER of a part alone, as model.{part}.save_pretrained(FOLDER) writes it"
    write, python = f"write task=evaluate checkpoint={name} to score it", f"write sedtrain.load({name!r}) to use it"
    return UserError(option, name, wrong, f"{write}, or {alone}", f"{python}, or {in_python(alone)}")


def load_tokenizer(option: str, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer saved in folder or Hub id `name`. Raises UserError if there is none: transformers makes an empty one."""
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
    """Turns a failure to load `name` into a UserError: no such folder, no model in it, a joined model, code, unreadable files.

    option: names it on the command line, such as `encoder.checkpoint`
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
    except Exception as error:  # of whatever kind: the values of a folder's files may be anything
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("torchao"):
            wrong = "its weights are in 8 bits by torchao, which is not installed"
            raise UserError(option, name, wrong, "pip install 'sedtrain[int8]'") from error
        if isinstance(error, UserError) and not (option == "checkpoint" and error.option.endswith(".model_type")):
            raise
        error = error.__cause__ if isinstance(error, UserError) and isinstance(error.__cause__, Exception) else error
        where = "the folder" if folder.is_dir() else "there is no such folder here, and the Hub or its cache"
        raise UserError(option, name, f"{where} gave: {reason_of(error)}", write) from error


def reason_of(error: Exception) -> str:
    """The message of a failure to load, in one line."""
    if isinstance(error, pickle.UnpicklingError):
        return "weights in a pickle that is damaged, or holds more than numbers and could run code"
    text = one_line(error, 160)
    if isinstance(error, KeyError):
        return f"no {text} in its files"
    return text if text and isinstance(error, OWN_WORDS) else f"{type(error).__name__} {text}".rstrip()


def no_model(option: str, name: str, folder: Path, write: str) -> UserError:
    """The refusal of a folder without a config.json, which says what else it is."""
    wrong, python = "this folder is no model, it holds no config.json", ""
    if (folder / "model/config.json").is_file():
        return joined_model(option, name)
    if runs := [each for each in (folder, folder.parent) if (each / "config.yaml").is_file()]:
        wrong, ends = "this run has saved no model yet", "it saves a model when it ends or is stopped"
        again = f"run_dir={runs[0]} resume=auto"
        write, python = f"write {again} and the options of the run: {ends}", f"run python -m sedtrain {again}: {ends}"
    elif (folder / "adapter_config.json").is_file():
        wrong = "this is an adapter of peft without its model"
        write = f"write {option}=FOLDER of the merged model: model.merge_and_unload().save_pretrained(FOLDER)"
    return UserError(option, name, wrong, write, python)


def joint_config(encoder: PreTrainedModel, decoder: PreTrainedModel) -> SpeechEncoderDecoderConfig:
    """The joined configuration of two modules: transformers finds a class of the user's own once it is registered."""
    for part, factory in ((encoder, transformers.AutoModel), (decoder, transformers.AutoModelForCausalLM)):
        if part.config.model_type not in transformers.CONFIG_MAPPING:
            AutoConfig.register(part.config.model_type, type(part.config))
            factory.register(type(part.config), type(part))
    return SpeechEncoderDecoderConfig.from_encoder_decoder_configs(encoder.config, decoder.config)


def share_config(part: nn.Module, config: transformers.PreTrainedConfig) -> None:
    """Gives every module of the part this one configuration object, so that a later change of it reaches them all."""
    kind = type(part.config)
    for module in part.modules():
        if isinstance(getattr(module, "config", None), kind):
            module.config = config


# --- attention implementations


@contextmanager
def attention_of(
    part: str, config: PreTrainedConfig, failures: tuple[type[Exception], ...] = UNBUILDABLE
) -> Iterator[None]:
    """Turns failures to build a model into a UserError, such as an attention implementation that the family lacks.

    None, for which `attention=auto` stands, is never refused: transformers takes sdpa if the family has it, else eager.
    """
    if config._attn_implementation == "flex_attention":
        refuse_flex(part, config)
    try:
        yield
    except UserError:
        raise
    except failures as error:
        reason = one_line(error, 160) or type(error).__name__
        if re.search("attention(?! heads)|attn", str(error), re.IGNORECASE):
            raise unusable_attention(part, config, reason) from error
        write = f"write {part}.options.NAME=VALUE that fits"
        raise UserError(f"{part}.model_type", config.model_type, reason, write) from error


def attention_wanted(part: str, config: PreTrainedConfig, options: Mapping[str, Any]) -> AbstractContextManager[None]:
    """`attention_of` if loading options ask for an implementation."""
    if options.get("attn_implementation") is None:
        return nullcontext()
    config._attn_implementation = options["attn_implementation"]
    return attention_of(part, config)


def refuse_unsupported(config: PreTrainedConfig, attention: str | dict[str, str] | None) -> None:
    """Raises UserError for an attention implementation that encoder or decoder of this joined model lacks.

    attention: of both, or of each by its name
    """
    for part in ("encoder", "decoder"):
        wanted = attention.get(part) if isinstance(attention, dict) else attention
        flag, family = ATTENTION_FLAGS.get(wanted or ""), family_of(getattr(config, part))
        if flag and family and not getattr(family, flag, False):
            refused = copy.copy(getattr(config, part))
            refused._attn_implementation = wanted
            raise unusable_attention(part, refused, f"{family.__name__} does not have it")


def family_of(config: PreTrainedConfig) -> Any:
    """The class of transformers with this configuration; None for a class of the user's own."""
    kind = type(config)
    return transformers.MODEL_MAPPING.get(kind, None) or transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None)


def unusable_attention(part: str, config: PreTrainedConfig, reason: str) -> UserError:
    """Offers what the family can train with on this machine, other than the refused implementation."""
    family, refused = family_of(config), config._attn_implementation
    machine_lacks = {
        "flash_attention_2": not is_flash_attn_2_available(True),
        "flex_attention": not torch.cuda.is_available(),
    }
    family_has = [name for name, flag in ATTENTION_FLAGS.items() if getattr(family, flag, False)]
    usable = [name for name in ("eager", *family_has) if name != refused and not machine_lacks.get(name)]
    offered = " or ".join(f"{part}.attention={name}" for name in usable)
    wrong = f"{config.model_type} cannot use it here: {reason}"
    return UserError(f"{part}.attention", refused, wrong, *or_best_attention(offered))


def or_best_attention(offered: str) -> tuple[str, str]:
    """Remedies for an attention implementation that cannot be used, on the command line and in Python."""
    best = "the best that encoder and decoder each can"
    return f"write {offered}, or attention=auto, {best}", f"write {in_python(offered)}, or none, for {best}"


def refuse_flex(part: str, config: PreTrainedConfig) -> None:
    """Raises UserError for what FlexAttention would refuse in the middle of training: a CPU, and dropout."""
    if not torch.cuda.is_available():
        raise unusable_attention(part, config, "FlexAttention has no backward on a CPU")
    for name in ("attention_dropout", "attention_probs_dropout_prob"):
        if rate := getattr(config, name, 0.0):
            wrong = f"it has no dropout, and {name} is {rate}"
            write = or_best_attention(f"{part}.options.{name}=0")
            raise UserError(f"{part}.attention", "flex_attention", wrong, *write)
