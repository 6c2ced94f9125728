"""Speech encoders: any encoder of `transformers`, by its model type or as a module, with padding masked.

To add a family:
1. `conf/encoder/NAME.yaml`: its `model_type`, its published members, the shape of its tiny member (see conf/encoder/sew.yaml).
2. A class in `ENCODER_CLASSES` of encoder_families.py, which masks every module that padding reaches; else it is refused.
3. A row in `FEATURE_EXTRACTORS` of family_settings.py, unless the family takes a normalized waveform.
4. Tests and docs: see decoder.py.

B batch, S inputs (samples or feature frames), T frames, T' adapted frames, E encoder width, D decoder width.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, WhisperFeatureExtractor
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from sedtrain.annotations import checked
from sedtrain.errors import UserError
from sedtrain.models.attention import building, building_with, family_of
from sedtrain.models.config_ranges import tried
from sedtrain.models.encoder_families import ENCODERS, ENCODERS_OF_WHOLE, UPSTREAM, encoder_config
from sedtrain.models.family_settings import (
    configured,
    default_config,
    feature_extractor_of_family,
    load_config,
    published_name,
)
from sedtrain.models.loading import load_weights, pretrained, share_config

MOST_INPUTS = 2**17
"""No family needs more inputs for three frames."""


@dataclass
class EncodedSpeech(BaseModelOutput):
    """Encoded audio for the decoder: computed once per utterance, and accepted by the model as `encoder_outputs`.

    last_hidden_state: (B, T', D) adapted to the decoder
    attention_mask: (B, T'), 1 where a frame is real; None if all are
    encoder_frames, encoder_mask: (B, T, E) and (B, T), the encoder's output before adapter or projection
    """

    attention_mask: Tensor | None = None
    encoder_frames: Tensor | None = None
    encoder_mask: Tensor | None = None

    def rows(self, order: list[int]) -> "EncodedSpeech":
        """The utterances at the indices `order`, without `encoder_frames` and `encoder_mask`."""
        frames, mask = self.last_hidden_state, self.attention_mask
        assert frames is not None
        return EncodedSpeech(last_hidden_state=frames[order], attention_mask=None if mask is None else mask[order])


@checked("encoder.")
def load_encoder(
    model_type: str,
    tiny: Mapping[str, Any],
    base: str | None = None,
    large: str | None = None,
    size: str = "tiny",
    pretrained: bool = True,
    checkpoint: str | None = None,
    attention: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """An encoder of a family in `transformers`, with random, published or saved weights.

    tiny: the family's configuration for size=tiny; base, large: the Hub ids of the published members
    checkpoint: a Hub id or folder, used instead of the published member of that size
    attention: None stands for sdpa if the family has it, else eager
    options: values of the family's configuration class, for any size
    """
    name = published_name("encoder", size, checkpoint, {"base": base, "large": large})
    options = dict(options or {})
    if "mask_time_prob" in options:
        options = with_spec_augment(model_type, options)
    if name is None:
        # Refuses a family without a speech encoder.
        encoder_class(encoder_config(default_config("encoder", model_type)))
    config = load_config("encoder", name, model_type, tiny, **options)
    config._attn_implementation = attention
    if name is None or not pretrained:
        config.dtype = None  # else random weights would take the dtype of the published ones, perhaps 16 bits
        chosen = ("encoder.tiny", tiny) if name is None and not options else ("encoder.options", options)
        return tried(*chosen, config, encoder_from_config, encode_silence)
    factory, config = loading_class(config)
    return standalone(load_weights("encoder", name, factory, config, attention))


def with_spec_augment(model_type: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with SpecAugment switched on, which some checkpoints, such as w2v-BERT's, switch off.

    Raises UserError for a family without SpecAugment in its encoder; Whisper applies it outside.
    """
    config = default_config("encoder", model_type)
    if model_type == "whisper" or not hasattr(config, "mask_time_prob"):
        wrong = f"{model_type} has no SpecAugment in its encoder"
        write = "write augment=[speed,gain,noise,time_mask], or an encoder such as wav2vec2, hubert, wavlm or w2v_bert"
        raise UserError("augment", "spec_augment", wrong, write, "leave mask_time_prob out, or write another encoder")
    switch = {"apply_spec_augment": True} if hasattr(config, "apply_spec_augment") else {}
    return {**switch, **options}


def encoder_from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """An encoder with random weights; of a sequence-to-sequence family, the encoder alone."""
    config = encoder_config(config)
    kind = encoder_class(config)
    with building("encoder", config):
        if kind is not AutoModel:
            return kind._from_config(config)
        return standalone(AutoModel.from_config(config, trust_remote_code=False))


def encoder_from_pretrained(name: str, **options: Any) -> PreTrainedModel:
    """`AutoModel.from_pretrained` for the encoder alone; the checkpoint `name` may hold a whole model."""
    if (config := options.pop("config", None)) is None:
        config, options = configured(name, options)
    factory, config = loading_class(config)
    with building_with("encoder", config, options):
        return standalone(pretrained(factory, name, config=config, **options))


def loading_class(config: PreTrainedConfig) -> tuple[Any, PreTrainedConfig]:
    """The class that loads a checkpoint with this configuration, perhaps as a whole model, and the configuration for it."""
    if config.model_type in ENCODERS_OF_WHOLE:
        return ENCODERS_OF_WHOLE[config.model_type].whole, config
    inner = encoder_config(config)
    return (AutoModel, config) if config.is_encoder_decoder and inner is not config else (encoder_class(inner), inner)


def encoder_class(config: PreTrainedConfig) -> Any:
    """The class of an encoder with this configuration; AutoModel for a user's registered class, which has its own masks."""
    if kind := ENCODERS.get(config.model_type):
        return kind
    if family := family_of(config):
        refuse_without_frame_mask(family)
    return AutoModel


def standalone(model: PreTrainedModel) -> PreTrainedModel:
    """The speech encoder of `model`, or `model` itself if it is one, changed in place so that padding is masked.

    A user's own class stays as it is. Raises UserError for a model without a speech encoder, or without a mask of its frames.
    """
    config = encoder_config(model.config)
    kind = ENCODERS.get(config.model_type)
    if kind is None:
        inner: PreTrainedModel = model.get_encoder() if config.is_encoder_decoder else model
        refuse_without_frame_mask(type(inner))
        return inner
    if isinstance(model, UPSTREAM[kind]) and type(model) is not UPSTREAM[kind]:
        return model
    encoder: Any = next((module for module in model.modules() if type(module) is UPSTREAM[kind]), None)
    if encoder is None:
        write = f"write a model of {config.model_type} that takes speech"
        raise UserError("encoder", type(model).__name__, "it has no speech encoder", write)
    share_config(encoder, config)
    encoder.__class__ = kind
    _CAN_RECORD_REGISTRY[encoder] = encoder._can_record_outputs  # a constructor would do this
    encoder.set_up()
    return encoder


def loads_in_stock_transformers(config: PreTrainedConfig) -> bool:
    """True if a joined model with this encoder or decoder loads in `transformers` without sedtrain."""
    return config.model_type in CONFIG_MAPPING_NAMES and not config.is_encoder_decoder


def frame_width(config: PreTrainedConfig) -> int:
    """Width of the encoder's output frames, after the family's own adapter if it has one."""
    adapted = getattr(config, "add_adapter", False)
    width: int = getattr(config, "output_hidden_size", config.hidden_size) if adapted else config.hidden_size
    return width


def frame_mask(encoder: PreTrainedModel, num_frames: int, attention_mask: Tensor) -> Tensor:
    """(B, S) mask of inputs -> (B, num_frames) mask of frames, by the encoder's own method."""
    mask: Tensor = encoder._get_feature_vector_attention_mask(num_frames, attention_mask)
    return mask


def frame_spacing(encoder: PreTrainedModel) -> tuple[int, float]:
    """Inputs between two frames of the encoder, and inputs before the centre of its first frame."""

    def num_frames(num_inputs: int) -> int:
        return int(frame_mask(encoder, 3, torch.ones(1, num_inputs)).sum())

    two, three = (bisect_left(range(MOST_INPUTS), number, key=num_frames) for number in (2, 3))
    hop = three - two
    return hop, (two - hop) / 2


def refuse_without_frame_mask(kind: type[PreTrainedModel]) -> None:
    """Raises UserError for an encoder class that cannot tell which of its frames are padding."""
    if not hasattr(kind, "_get_feature_vector_attention_mask"):
        wrong = "it is not a speech encoder that tells which of its frames are real in a padded batch"
        own = (
            "a class of your own needs a method _get_feature_vector_attention_mask(self, num_frames, attention_mask)"
            " that returns the (batch, num_frames) mask of frames for the (batch, inputs) mask of inputs"
        )
        write = f"write encoder=wav2vec2, hubert, whisper or another option; {own}"
        raise UserError("encoder", kind.__name__, wrong, write, f"write wav2vec2, hubert or whisper; {own}")


def freeze_front_end(encoder: PreTrainedModel) -> None:
    """Freezes everything before the encoder's first layer. Raises UserError for a class without `freeze_feature_encoder`."""
    if not hasattr(encoder, "freeze_feature_encoder"):
        write = "write a method freeze_feature_encoder(self) in it that stops the gradient of its front end"
        raise UserError("encoder", type(encoder).__name__, "it does not say what its front end is", write)
    encoder.freeze_feature_encoder()


def encode_silence(encoder: PreTrainedModel) -> None:
    """Runs the encoder on half a second of silence, as training would."""
    extractor: Any = feature_extractor_of_family(encoder.config)
    silence = np.zeros(extractor.sampling_rate // 2, dtype=np.float32)
    with np.errstate(all="ignore"):
        made = extractor(silence, sampling_rate=extractor.sampling_rate, return_tensors="pt", padding="longest")
    inputs = made[extractor.model_input_names[0]]
    time = 2 if isinstance(extractor, WhisperFeatureExtractor) else 1
    mask = torch.ones(1, inputs.shape[time], dtype=torch.long)
    frames = encoder(inputs, attention_mask=mask, return_dict=True).last_hidden_state
    frame_mask(encoder, frames.shape[1], mask)
