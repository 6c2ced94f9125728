"""Settings that a family or a checkpoint decides: the configuration of an encoder or decoder, and the feature extractor.

The user's options overwrite the configuration. `part` is "encoder" or "decoder"; options in error messages begin with it.
"""

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoFeatureExtractor, PreTrainedConfig, PreTrainedModel, SequenceFeatureExtractor

from sedtrain.errors import UserError, one_line
from sedtrain.models.config_ranges import UNBUILDABLE, refuse_impossible, refuse_uneven
from sedtrain.models.decoder_families import decoder_config, whole_type
from sedtrain.models.foreign import HUB_OPTIONS, refuse_code
from sedtrain.models.loading import joined_model, loading

LOADING_OPTIONS = {"dtype", "torch_dtype", "attn_implementation"}


def published_name(part: str, size: str, checkpoint: str | None, published: Mapping[str, str | None]) -> str | None:
    """The Hub id or folder to load: `checkpoint` if given, else the published member of this size; None for size=tiny."""
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
    """The configuration of checkpoint `name`, or of the family's tiny member if None; `options` overwrite values.

    Raises UserError for a checkpoint of another family, and for options that are unknown, out of range or do not fit together.
    """
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
    refuse_unknown(part, model_type, config, values, options)
    by_option = {"tiny": {key: value for key, value in values.items() if key not in options}, "options": options}
    refuse_impossible(part, by_option, type(config)())
    try:
        made = type(config).from_dict({**({} if name is None else config.to_dict()), **values})
    except (StrictDataclassError, *UNBUILDABLE) as error:
        write = f"write {part}.options.NAME=VALUE that fits"
        raise UserError(f"{part}.options", options, one_line(error, 200), write) from error
    refuse_uneven(part, by_option, made)
    return made


def refuse_unknown(
    part: str, model_type: str, config: PreTrainedConfig, values: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Raises UserError for the first of `values` that the family's configuration does not have, or computes itself.

    options: the values that the user gave; the others come from the family's tiny member
    """
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


def is_computed(config: PreTrainedConfig, name: str) -> bool:
    """True for a read-only property of the configuration class."""
    value = getattr(type(config), name, None)
    return isinstance(value, property) and value.fset is None


def default_config(part: str, model_type: str) -> PreTrainedConfig:
    """The default configuration of a family. Raises UserError for one that transformers does not know."""
    if model_type not in transformers.CONFIG_MAPPING:
        close = difflib.get_close_matches(model_type, list(transformers.CONFIG_MAPPING), n=1)
        wrong = "transformers knows no such family" + (f"; did you mean {close[0]!r}?" if close else "")
        raise UserError(
            f"{part}.model_type", model_type, wrong, f"write {part}=OPTION, or a model_type of transformers"
        )
    config: PreTrainedConfig = AutoConfig.for_model(model_type)
    return decoder_config(config) if part == "decoder" else config


def encoder_within(config: PreTrainedConfig) -> PreTrainedConfig:
    """The encoder's configuration within that of a published Parakeet model; any other configuration unchanged."""
    if not (config.model_type.startswith("parakeet_") and hasattr(config, "encoder_config")):
        return config
    encoder: PreTrainedConfig = config.encoder_config
    encoder._name_or_path = config._name_or_path
    return encoder


def configured(name: Any, options: Mapping[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Splits the `options` of loading checkpoint `name`: its configuration with the values it knows, and the other options."""
    for_loading = {key: value for key, value in options.items() if key in HUB_OPTIONS | LOADING_OPTIONS}
    rest = {key: value for key, value in options.items() if key not in LOADING_OPTIONS | {"trust_remote_code"}}
    refuse_code("checkpoint", str(name), **{key: value for key, value in options.items() if key in HUB_OPTIONS})
    config, unused = AutoConfig.from_pretrained(name, return_unused_kwargs=True, trust_remote_code=False, **rest)
    return config, {**unused, **for_loading}


def refuse_other_family(part: str, name: str, config: PreTrainedConfig, model_type: str) -> None:
    """Raises UserError for a checkpoint that holds a joined model, or a family other than `model_type`."""
    if config.model_type.endswith("speech-encoder-decoder"):
        raise joined_model(f"{part}.checkpoint", name)
    if not isinstance(config, type(default_config(part, model_type))):
        other = whole_type(config)
        wrong = f"this is a {other} model, not {model_type}"
        write = f"write {part}={other.replace('-', '_')}, or if no option has that name {part}.model_type={other}"
        raise UserError(f"{part}.checkpoint", name, wrong, write, f"write model_type={other!r}")


def feature_extractor_of(encoder: PreTrainedModel) -> SequenceFeatureExtractor:
    """The feature extractor saved with the encoder's weights, else the one of its family."""
    name = encoder.config._name_or_path
    if name:
        with loading("encoder.checkpoint", name):
            return AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False)
    return feature_extractor_of_family(encoder.config)


def feature_extractor_of_family(config: PreTrainedConfig) -> SequenceFeatureExtractor:
    return FEATURE_EXTRACTORS.get(config.model_type, waveform)(config)


def waveform(config: PreTrainedConfig, do_normalize: bool = True) -> SequenceFeatureExtractor:
    return transformers.Wav2Vec2FeatureExtractor(do_normalize=do_normalize, return_attention_mask=True)


def stacked_mels(config: PreTrainedConfig) -> SequenceFeatureExtractor:
    """Two frames of mel bins make one input."""
    return transformers.SeamlessM4TFeatureExtractor(feature_size=config.feature_projection_input_dim // 2)


def parakeet(config: PreTrainedConfig) -> SequenceFeatureExtractor:
    try:
        return transformers.ParakeetFeatureExtractor(feature_size=config.num_mel_bins)
    except ImportError as error:
        wrong = f"its features need a package that is missing: {error}"
        raise UserError("encoder", "parakeet", wrong, "pip install librosa") from error


# by the encoder's model type; any other takes a normalized waveform
FEATURE_EXTRACTORS: dict[str, Callable[[PreTrainedConfig], SequenceFeatureExtractor]] = {
    "moonshine-encoder": lambda config: waveform(config, do_normalize=False),
    "speecht5-encoder": lambda config: transformers.SpeechT5FeatureExtractor(do_normalize=False),
    "whisper-encoder": lambda config: transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins),
    "wav2vec2-bert": stacked_mels,
    "seamless_m4t-encoder": stacked_mels,
    "seamless_m4t_v2-encoder": stacked_mels,
    "speech_to_text-encoder": lambda config: transformers.Speech2TextFeatureExtractor(
        feature_size=config.input_feat_per_channel, num_mel_bins=config.input_feat_per_channel
    ),
    "parakeet_encoder": parakeet,
}
