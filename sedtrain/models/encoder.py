"""Speech encoders: any `transformers` encoder by its model type, with what a sub-encoder needs to stand alone.

B batch, F mel bins, T frames, D width.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    SeamlessM4TFeatureExtractor,
    SequenceFeatureExtractor,
    Speech2TextFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from sedtrain.batch import UserError
from sedtrain.models.checkpoint import attention_of, load_config, load_weights, loading, published_name
from sedtrain.models.feature_encoder import forward_as_matrix_products


class VariableLengthWhisperEncoder(WhisperEncoder):
    """Whisper's encoder for clips of any length up to its limit: positions are cropped, padding is masked.

    The upstream class computes 30 seconds for every clip. Parameters and their names are unchanged.
    """

    def _get_feature_vector_attention_mask(self, num_frames: int, attention_mask: Tensor) -> Tensor:
        """(B, T) mask of mel frames -> (B, num_frames) mask of encoder frames."""
        frame_mask = attention_mask[:, :: self.conv2.stride[0]]
        assert frame_mask.shape[1] == num_frames
        return frame_mask

    def forward(self, input_features: Tensor, attention_mask: Tensor | None = None, **options: Any) -> BaseModelOutput:
        """(B, F, T) log-mel features -> (B, ceil(T / 2), D). Raises UserError for more frames than it has positions."""
        hidden_states = F.gelu(self.conv1(input_features))
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask[:, None]  # what the second convolution pads with, alone
        hidden_states = F.gelu(self.conv2(hidden_states)).transpose(1, 2)
        num_frames = hidden_states.shape[1]
        if num_frames > self.max_source_positions:
            raise UserError(
                f"an utterance of {num_frames} frames does not fit an encoder with {self.max_source_positions} positions",
                "data.max_seconds=30, the limit of Whisper's encoder",
            )
        hidden_states = hidden_states + self.embed_positions.weight[:num_frames]
        hidden_states = F.dropout(hidden_states, p=self.dropout, training=self.training)
        mask = None
        if attention_mask is not None:
            frame_mask = self._get_feature_vector_attention_mask(num_frames, attention_mask)
            mask = create_bidirectional_mask(self.config, hidden_states, frame_mask)
        for layer in self.layers:
            if not (self.training and torch.rand([]) < self.layerdrop):
                hidden_states = layer(hidden_states, mask, **options)
        return BaseModelOutput(last_hidden_state=self.layer_norm(hidden_states))


def encoder_from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """An encoder with random weights; of a sequence-to-sequence family, its encoder alone."""
    if config.model_type == "whisper":
        return VariableLengthWhisperEncoder(config)
    with attention_of("encoder", config):
        model = AutoModel.from_config(config)
    return prepared(model.get_encoder() if config.is_encoder_decoder else model)


def prepared(encoder: PreTrainedModel) -> PreTrainedModel:
    """The encoder, with the faster form of its front end on CPUs wherever that gives equal results."""
    front_end = getattr(encoder, "feature_extractor", None)
    if isinstance(front_end, nn.Module) and getattr(encoder.config, "feat_extract_norm", None) == "layer":
        convolve = front_end.forward

        def forward(input_values: Tensor) -> Tensor:
            if input_values.device.type == "cpu":
                return forward_as_matrix_products(front_end, input_values)
            convolved: Tensor = convolve(input_values)
            return convolved

        front_end.forward = forward
    return encoder


def load_encoder(
    model_type: str,
    tiny: Mapping[str, Any],
    base: str | None = None,
    large: str | None = None,
    size: str = "tiny",
    pretrained: bool = True,
    checkpoint: str | None = None,
    attention: str = "sdpa",
    options: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """An encoder of a family that `transformers` knows, with random or published or saved weights.

    tiny: the family's configuration for size=tiny; base, large: the Hub ids of the published members
    checkpoint: a Hub id or folder that takes the place of the size's own
    options: values of the family's configuration class, for any size
    """
    name = published_name("encoder", size, checkpoint, {"base": base, "large": large})
    config = load_config("encoder", name, model_type, tiny, **(options or {}))
    config._attn_implementation = attention
    if name is None or not pretrained:
        return encoder_from_config(config)
    if config.model_type == "whisper":
        whisper = load_weights("encoder", name, AutoModel, config, attention)
        encoder = encoder_from_config(config)
        encoder.load_state_dict(whisper.get_encoder().state_dict())
        return encoder
    model = load_weights("encoder", name, AutoModel, config, attention)
    return prepared(model.get_encoder() if config.is_encoder_decoder else model)


def feature_extractor_of(encoder: PreTrainedModel) -> SequenceFeatureExtractor:
    """The feature extractor saved beside the encoder's weights, else the one that its family was defined with."""
    name = encoder.config._name_or_path
    if name:
        with loading("encoder.checkpoint", name):
            return AutoFeatureExtractor.from_pretrained(name)
    if encoder.config.model_type == "whisper":
        return WhisperFeatureExtractor(feature_size=encoder.config.num_mel_bins)
    if encoder.config.model_type == "wav2vec2-bert":
        return SeamlessM4TFeatureExtractor(feature_size=encoder.config.feature_projection_input_dim // 2)
    if encoder.config.model_type == "speech_to_text":
        mels = encoder.config.input_feat_per_channel
        return Speech2TextFeatureExtractor(feature_size=mels, num_mel_bins=mels)
    return Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
