"""The feature extractor of an encoder: saved with its weights, or the one of its family."""

from collections.abc import Callable

import transformers
from transformers import AutoFeatureExtractor, PreTrainedConfig, PreTrainedModel, SequenceFeatureExtractor

from sedtrain.errors import UserError
from sedtrain.models.loading import loading


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
