"""The encoder families with masks for padding; without padding, a class computes what upstream's does.

Encoders that `transformers` has only inside sequence-to-sequence models are in sub_encoders.py, with their own model types.
docs/families.md describes how each upstream family treats padding.

B batch, S inputs (samples or feature frames), T frames, D width.
"""

import copy
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertAdapter

from sedtrain.models.family_settings import encoder_within
from sedtrain.models.masking import Masked
from sedtrain.models.mixins import (
    GuardedSpecAugment,
    MaskedConv1d,
    Recomputed,
    Strides,
    length_mask,
    mix_into,
    output_lengths,
    step,
)
from sedtrain.models.packing import OneByOneFromDistances, Packing
from sedtrain.models.sub_encoders import (
    StandaloneMoonshine,
    StandaloneMoonshineStreaming,
    StandaloneSeamlessM4T,
    StandaloneSeamlessM4Tv2,
    StandaloneSpeech2Text,
    StandaloneSpeechT5,
    StandaloneWhisper,
)


class MaskedWav2Vec2(Packing, GuardedSpecAugment, Masked, transformers.Wav2Vec2Model):
    pass


class MaskedHubert(Packing, GuardedSpecAugment, Masked, transformers.HubertModel):
    """In checkpoints with a batch norm before the position embedding, that norm makes padding nonzero."""

    def mask_modules(self) -> Strides:
        steps = super().mask_modules()
        if self.config.conv_pos_batch_norm:
            self.mask(self.encoder.pos_conv_embed.conv, MaskedConv1d, steps)
        return steps


class MaskedWavLM(Packing, GuardedSpecAugment, Masked, transformers.WavLMModel):
    attention = OneByOneFromDistances

    def masked_inputs(self, inputs: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Unmasks rows that are too short for a frame: attention over nothing is NaN. Their frames stay masked afterwards."""
        empty = output_lengths(attention_mask.sum(-1), self.frame_steps) == 0
        return inputs, attention_mask.masked_fill(empty[:, None], 1)


class MaskedUniSpeech(Packing, GuardedSpecAugment, Masked, transformers.UniSpeechModel):
    pass


class MaskedUniSpeechSat(Packing, GuardedSpecAugment, Masked, transformers.UniSpeechSatModel):
    pass


class MaskedData2VecAudio(Packing, GuardedSpecAugment, Masked, transformers.Data2VecAudioModel):
    """The position embedding is a stack of convolutions, and the first one makes padding nonzero."""

    def mask_modules(self) -> Strides:
        steps = super().mask_modules()
        for layer in self.encoder.pos_conv_embed.layers:
            self.mask(layer.conv, MaskedConv1d, steps)
        return steps


class MaskedWav2Vec2Conformer(GuardedSpecAugment, Masked, transformers.Wav2Vec2ConformerModel):
    def mask_modules(self) -> Strides:
        steps = super().mask_modules()
        for layer in self.encoder.layers:
            mix_into(layer, Recomputed)
            layer.masked = "conv_module.depthwise_conv"
            self.mask(layer.conv_module.depthwise_conv, MaskedConv1d, steps)
        self.encoder.pos_conv_embed.requires_grad_(False)  # upstream never uses it
        return steps


class FittingBertAdapter(Wav2Vec2BertAdapter):
    """Counts frames with the padding of its convolutions; upstream counts with a different padding."""

    def _compute_sub_sample_lengths_from_attention_mask(self, seq_lens: Tensor | None) -> Tensor | None:
        return None if seq_lens is None else output_lengths(seq_lens, step(self.layers[0].residual_conv))


class MaskedWav2Vec2Bert(GuardedSpecAugment, Masked, transformers.Wav2Vec2BertModel):
    front_end = ("feature_projection",)

    def mask_adapter(self, steps: Strides) -> Strides:
        mix_into(self.adapter, FittingBertAdapter)
        return super().mask_adapter(steps)


class PositionsOfAllFrames(torch.nn.Module):
    """Embeds the positions of `frames`, if set, instead of the input: they still include an unpaired last frame."""

    frames: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Any:
        return super().forward(hidden_states if self.frames is None else self.frames)


class PairedFrames(torch.nn.Module):
    """Mixin for an encoder that squeezes pairs of frames: an unpaired last frame of an utterance becomes zeros.

    Upstream does so only at the end of the batch; elsewhere it pairs the last frame with padding.
    """

    config: Any
    pos_conv_embed: Any

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is None:
            return super().forward(hidden_states, **kwargs)
        factor: int = self.config.squeeze_factor
        paired = length_mask(attention_mask.sum(-1) // factor * factor, hidden_states.shape[1])
        self.pos_conv_embed.frames = hidden_states.masked_fill(~attention_mask[..., None], 0.0).transpose(1, 2)
        output = super().forward(hidden_states, paired, **kwargs)
        self.pos_conv_embed.frames = None
        output.last_hidden_state = output.last_hidden_state.masked_fill(~paired[..., None], 0.0)
        return output


class MaskedSEW(GuardedSpecAugment, Masked, transformers.SEWModel):
    def mask_modules(self) -> Strides:
        mix_into(self.encoder, PairedFrames)
        mix_into(self.encoder.pos_conv_embed, PositionsOfAllFrames)
        return Masked.mask_modules(self)


class MaskedSEWD(GuardedSpecAugment, Masked, transformers.SEWDModel):
    mask_modules = MaskedSEW.mask_modules


class MaskedParakeet(Masked, transformers.ParakeetEncoder):
    """Upstream masks everything after its first convolution."""

    _supports_flex_attn = False  # transformers would use the first head's position bias for all heads
    front_end = ("subsampling",)

    def mask_modules(self) -> Strides:
        convolutions = [layer for layer in self.subsampling.layers if isinstance(layer, torch.nn.Conv2d)]
        return sum((step(convolution) for convolution in convolutions), ())

    def masked_inputs(self, inputs: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        return inputs.masked_fill(attention_mask[..., None] == 0, 0.0), attention_mask


ENCODER_CLASSES: tuple[type[Masked], ...] = (
    MaskedWav2Vec2, MaskedHubert, MaskedWavLM, MaskedUniSpeech, MaskedUniSpeechSat, MaskedData2VecAudio,
    MaskedWav2Vec2Conformer, MaskedWav2Vec2Bert, MaskedSEW, MaskedSEWD, MaskedParakeet,
    StandaloneWhisper, StandaloneSpeech2Text, StandaloneMoonshine, StandaloneSeamlessM4T, StandaloneSeamlessM4Tv2,
    StandaloneSpeechT5, StandaloneMoonshineStreaming,
)  # fmt: skip
# class -> the class of `transformers` that it replaces
UPSTREAM = {
    kind: next(base for base in kind.__mro__ if base.__module__.startswith("transformers.models."))
    for kind in ENCODER_CLASSES
}
# model type of an encoder -> class
ENCODERS = {kind.config_class.model_type: kind for kind in ENCODER_CLASSES}
# model type of a whole sequence-to-sequence model -> class of its encoder
ENCODERS_OF_WHOLE = {kind.whole.config_class.model_type: kind for kind in ENCODER_CLASSES if kind.whole is not None}

for kind in ENCODERS_OF_WHOLE.values():
    AutoConfig.register(kind.config_class.model_type, kind.config_class)
    AutoModel.register(kind.config_class, kind)


def encoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a whole model's encoder; any other configuration unchanged."""
    inner = getattr(config, "encoder_config", None)
    if config.is_encoder_decoder and isinstance(inner, PreTrainedConfig):
        return inner
    if config.model_type in ENCODERS_OF_WHOLE:
        kind = ENCODERS_OF_WHOLE[config.model_type].config_class
        config = copy.deepcopy(config)
        config.__class__ = kind
        config.model_type, config.is_encoder_decoder = kind.model_type, False
        return config
    return encoder_within(config)
