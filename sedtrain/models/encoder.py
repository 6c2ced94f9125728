"""Speech encoders: any `transformers` encoder by its model type, alone and with masks that reach everything.

B batch, S inputs (samples or feature frames), T frames.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    ParakeetFeatureExtractor,
    PreTrainedConfig,
    PreTrainedModel,
    SeamlessM4TFeatureExtractor,
    SequenceFeatureExtractor,
    Speech2TextFeatureExtractor,
    SpeechT5FeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from sedtrain.errors import UserError
from sedtrain.models.encoder_families import MASKED, OF_WHOLE, STANDALONE, encoder_config
from sedtrain.models.loading import (
    attention_of,
    attention_wanted,
    configured,
    load_config,
    load_weights,
    loading,
    published_name,
)

KINDS = {**MASKED, **STANDALONE}
OF_TYPE = {kind.config_class.model_type: kind for kind in KINDS.values()}
UPSTREAM = {kind: upstream for upstream, kind in KINDS.items()}


def encoder_from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """An encoder with random weights; of a sequence-to-sequence family, its encoder alone with a configuration of its own."""
    config = encoder_config(config)
    with attention_of("encoder", config):
        if kind := OF_TYPE.get(config.model_type):
            return kind._from_config(config)
        return standalone(AutoModel.from_config(config))


def encoder_from_pretrained(name: str, **options: Any) -> PreTrainedModel:
    """`AutoModel.from_pretrained` for the encoder alone of the checkpoint `name`, whatever model that is of."""
    if (config := options.pop("config", None)) is None:
        config, options = configured(name, options)
    factory, config = loader_of(config)
    with attention_wanted("encoder", config, options):
        return standalone(factory.from_pretrained(name, config=config, **options))


def loader_of(config: PreTrainedConfig) -> tuple[Any, PreTrainedConfig]:
    """What loads the weights of an encoder that lie in a checkpoint with this configuration, and with which one."""
    if config.model_type in OF_WHOLE:
        return OF_WHOLE[config.model_type].whole, config
    config = encoder_config(config)
    return OF_TYPE.get(config.model_type, AutoModel), config


def standalone(model: PreTrainedModel) -> PreTrainedModel:
    """The encoder of `model`, or `model` itself, with its weights and with masks that reach everything, in place.

    A class that is not of transformers stays as it is. Raises UserError for a model whose encoder does not hear speech.
    """
    config = encoder_config(model.config)
    kind = OF_TYPE.get(config.model_type)
    if kind is None:
        return model.get_encoder() if config.is_encoder_decoder else model
    if isinstance(model, UPSTREAM[kind]) and type(model) is not UPSTREAM[kind]:
        return model
    encoder: Any = next((module for module in model.modules() if type(module) is UPSTREAM[kind]), None)
    if encoder is None:
        raise UserError(
            f"{type(model).__name__} has no encoder of speech", f"a model of {config.model_type} that takes speech"
        )
    shared = type(encoder.config)
    for module in encoder.modules():
        if type(getattr(module, "config", None)) is shared:
            module.config = config
    encoder.__class__ = kind
    _CAN_RECORD_REGISTRY[encoder] = encoder._can_record_outputs  # which a constructor would do
    encoder.set_up()
    return encoder


def loads_in_stock_transformers(config: PreTrainedConfig) -> bool:
    """Whether a joined model with this encoder loads where sedtrain is not installed."""
    return config.model_type in CONFIG_MAPPING_NAMES and not config.is_encoder_decoder


def frame_mask(encoder: PreTrainedModel, num_frames: int, attention_mask: Tensor) -> Tensor:
    """(B, S) mask of the encoder's inputs -> (B, num_frames) mask of its frames, as the encoder's own method says."""
    refuse_without_hook(encoder)
    mask: Tensor = encoder._get_feature_vector_attention_mask(num_frames, attention_mask)
    return mask


def refuse_without_hook(encoder: PreTrainedModel) -> None:
    """Raises UserError for an encoder that does not say which of its frames are padding."""
    if not hasattr(encoder, "_get_feature_vector_attention_mask"):
        raise UserError(
            f"{type(encoder).__name__} does not say which of its frames are real where utterances are padded",
            "a method _get_feature_vector_attention_mask(self, num_frames, attention_mask) in it that returns"
            " the (batch, num_frames) mask of frames for the (batch, inputs) mask of inputs",
        )


def freeze_front_end(encoder: PreTrainedModel) -> None:
    """Stops the gradient of what turns inputs into what the encoder's first layer takes."""
    if not hasattr(encoder, "freeze_feature_encoder"):
        raise UserError(
            f"{type(encoder).__name__} does not say what its front end is",
            "a method freeze_feature_encoder(self) in it that stops the gradient of its front end",
        )
    encoder.freeze_feature_encoder()


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
    """An encoder of a family that `transformers` knows, with random or published or saved weights.

    tiny: the family's configuration for size=tiny; base, large: the Hub ids of the published members
    checkpoint: a Hub id or folder that takes the place of the size's own
    options: values of the family's configuration class, for any size
    """
    name = published_name("encoder", size, checkpoint, {"base": base, "large": large})
    options = dict(options or {})
    if "mask_time_prob" in options:
        options = with_spec_augment(model_type, options)
    config = load_config("encoder", name, model_type, tiny, **options)
    config._attn_implementation = attention
    if name is None or not pretrained:
        return encoder_from_config(config)
    factory, config = loader_of(config)
    return standalone(load_weights("encoder", name, factory, config, attention))


def with_spec_augment(model_type: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with SpecAugment switched on, which it is not in every checkpoint: w2v-BERT's has it off.

    Raises UserError for a family without it; Whisper's is outside of its encoder.
    """
    config = AutoConfig.for_model(model_type)
    if model_type == "whisper" or not hasattr(config, "mask_time_prob"):
        raise UserError(
            f"augment: {model_type} has no SpecAugment in its encoder",
            "augment=[speed,gain,noise,time_mask], or an encoder such as wav2vec2, hubert, wavlm or w2v_bert",
        )
    switch = {"apply_spec_augment": True} if hasattr(config, "apply_spec_augment") else {}
    return {**switch, **options}


def feature_extractor_of(encoder: PreTrainedModel) -> SequenceFeatureExtractor:
    """The feature extractor saved beside the encoder's weights, else the one that its family was defined with."""
    name = encoder.config._name_or_path
    if name:
        with loading("encoder.checkpoint", name):
            return AutoFeatureExtractor.from_pretrained(name)
    return FEATURE_EXTRACTORS.get(encoder.config.model_type, normalized_audio)(encoder.config)


def normalized_audio(config: PreTrainedConfig) -> SequenceFeatureExtractor:
    return Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)


def audio(config: PreTrainedConfig) -> SequenceFeatureExtractor:
    return Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)


def speecht5(config: PreTrainedConfig) -> SequenceFeatureExtractor:
    return SpeechT5FeatureExtractor(do_normalize=False)


def whisper(config: PreTrainedConfig) -> SequenceFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=config.num_mel_bins)


def pairs_of_mels(config: PreTrainedConfig) -> SequenceFeatureExtractor:
    return SeamlessM4TFeatureExtractor(feature_size=config.feature_projection_input_dim // 2)


def speech_to_text(config: PreTrainedConfig) -> SequenceFeatureExtractor:
    mels = config.input_feat_per_channel
    return Speech2TextFeatureExtractor(feature_size=mels, num_mel_bins=mels)


def parakeet(config: PreTrainedConfig) -> SequenceFeatureExtractor:
    try:
        return ParakeetFeatureExtractor(feature_size=config.num_mel_bins)
    except ImportError as error:
        raise UserError(
            f"encoder=parakeet: its features need a package that is missing: {error}", "pip install librosa"
        ) from error


FEATURE_EXTRACTORS: dict[str, Callable[[PreTrainedConfig], SequenceFeatureExtractor]] = {
    "moonshine-encoder": audio,
    "speecht5-encoder": speecht5,
    "whisper-encoder": whisper,
    "wav2vec2-bert": pairs_of_mels,
    "seamless_m4t-encoder": pairs_of_mels,
    "seamless_m4t_v2-encoder": pairs_of_mels,
    "speech_to_text-encoder": speech_to_text,
    "parakeet_encoder": parakeet,
}
"""By the encoder's model type; of any other, normalized audio."""
