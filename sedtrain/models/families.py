"""The encoder families of transformers whose saved folders it loads itself, with masks that reach everything.

Each class computes what upstream's does; only padding is another matter.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Data2VecAudioModel,
    HubertModel,
    ParakeetEncoder,
    SEWDModel,
    SEWModel,
    UniSpeechModel,
    UniSpeechSatModel,
    Wav2Vec2BertModel,
    Wav2Vec2ConformerModel,
    Wav2Vec2Model,
    WavLMModel,
)
from transformers.models.sew.modeling_sew import SEWEncoder, SEWPositionalConvEmbedding
from transformers.models.sew_d.modeling_sew_d import SEWDEncoder
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertAdapter
from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerEncoderLayer

from sedtrain.models.feature_encoder import mask_front_end
from sedtrain.models.masks import (
    GuardedSpecAugment,
    Masked,
    MaskedConv1d,
    Recomputed,
    Steps,
    length_mask,
    output_lengths,
    step,
)


class MaskedWav2Vec2(GuardedSpecAugment, Masked, Wav2Vec2Model):
    def mask_modules(self) -> Steps:
        return mask_front_end(self, self.feature_extractor)


class MaskedHubert(GuardedSpecAugment, Masked, HubertModel):
    """Where a batch norm stands before its position embedding, padding is no longer zero."""

    def mask_modules(self) -> Steps:
        steps = mask_front_end(self, self.feature_extractor)
        if self.config.conv_pos_batch_norm:
            self.mask(self.encoder.pos_conv_embed.conv, MaskedConv1d, steps)
        return steps


class MaskedWavLM(GuardedSpecAugment, Masked, WavLMModel):
    mask_modules = MaskedWav2Vec2.mask_modules

    def masked_inputs(self, inputs: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Attention over nothing is NaN: a row without a frame attends to all, and is masked behind the encoder."""
        empty = output_lengths(attention_mask.sum(-1), self.frame_steps) == 0
        return inputs, attention_mask.masked_fill(empty[:, None], 1)


class MaskedUniSpeech(GuardedSpecAugment, Masked, UniSpeechModel):
    mask_modules = MaskedWav2Vec2.mask_modules


class MaskedUniSpeechSat(GuardedSpecAugment, Masked, UniSpeechSatModel):
    mask_modules = MaskedWav2Vec2.mask_modules


class MaskedData2VecAudio(GuardedSpecAugment, Masked, Data2VecAudioModel):
    """Its position embedding is a stack of convolutions: behind the first, padding is no longer zero."""

    def mask_modules(self) -> Steps:
        steps = mask_front_end(self, self.feature_extractor)
        for layer in self.encoder.pos_conv_embed.layers:
            self.mask(layer.conv, MaskedConv1d, steps)
        return steps


class MaskedConformerLayer(Recomputed, Wav2Vec2ConformerEncoderLayer):
    masked = "conv_module.depthwise_conv"


class MaskedWav2Vec2Conformer(GuardedSpecAugment, Masked, Wav2Vec2ConformerModel):
    def mask_modules(self) -> Steps:
        steps = mask_front_end(self, self.feature_extractor)
        for layer in self.encoder.layers:
            layer.__class__ = MaskedConformerLayer
            self.mask(layer.conv_module.depthwise_conv, MaskedConv1d, steps)
        self.encoder.pos_conv_embed.requires_grad_(False)  # made, saved and never used
        return steps


class FittingBertAdapter(Wav2Vec2BertAdapter):
    """Upstream counts frames with another padding than its convolutions have."""

    def _compute_sub_sample_lengths_from_attention_mask(self, seq_lens: Tensor | None) -> Tensor | None:
        return None if seq_lens is None else output_lengths(seq_lens, step(self.layers[0].residual_conv))


class MaskedWav2Vec2Bert(GuardedSpecAugment, Masked, Wav2Vec2BertModel):
    front_end = ("feature_projection",)

    def mask_modules(self) -> Steps:
        return ()

    def mask_adapter(self, steps: Steps) -> Steps:
        self.adapter.__class__ = FittingBertAdapter
        self.adapter.layerdrop = 0.0
        for layer in self.adapter.layers:
            self.mask(layer.residual_conv, MaskedConv1d, steps)
            self.mask(layer.self_attn_conv, MaskedConv1d, steps)
            steps += step(layer.residual_conv)
        return steps


class PositionsOfAllFrames(SEWPositionalConvEmbedding):
    """Positions of `frames` where they are given: a last frame without a partner gives its position, not its content."""

    frames: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Any:
        return super().forward(hidden_states if self.frames is None else self.frames)


class PairedFrames:
    """Mixin for an encoder that squeezes frames in pairs: one left over at an utterance's end comes out as zeros.

    Upstream does so at the end of the batch only, and elsewhere pairs the last frame with padding.
    """

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is None:
            return super().forward(hidden_states, **kwargs)  # type: ignore[misc]
        factor: int = self.config.squeeze_factor  # type: ignore[attr-defined]
        paired = length_mask(attention_mask.sum(-1) // factor * factor, hidden_states.shape[1])
        self.pos_conv_embed.frames = hidden_states.masked_fill(~attention_mask[..., None], 0.0).transpose(1, 2)  # type: ignore[attr-defined]
        output = super().forward(hidden_states, paired, **kwargs)  # type: ignore[misc]
        self.pos_conv_embed.frames = None  # type: ignore[attr-defined]
        output.last_hidden_state = output.last_hidden_state.masked_fill(~paired[..., None], 0.0)
        return output


class PairedSEWEncoder(PairedFrames, SEWEncoder):
    pass


class PairedSEWDEncoder(PairedFrames, SEWDEncoder):
    pass


class MaskedSEW(GuardedSpecAugment, Masked, SEWModel):
    paired = PairedSEWEncoder

    def mask_modules(self) -> Steps:
        self.encoder.__class__ = self.paired
        self.encoder.pos_conv_embed.__class__ = PositionsOfAllFrames
        return mask_front_end(self, self.feature_extractor)


class MaskedSEWD(GuardedSpecAugment, Masked, SEWDModel):
    paired = PairedSEWDEncoder
    mask_modules = MaskedSEW.mask_modules


class MaskedParakeet(Masked, ParakeetEncoder):
    """Upstream masks all that comes after its first convolution."""

    _supports_flex_attn = False  # transformers takes the first head's position bias for all heads
    front_end = ("subsampling",)

    def mask_modules(self) -> Steps:
        convolutions = [layer for layer in self.subsampling.layers if isinstance(layer, torch.nn.Conv2d)]
        return sum((step(convolution) for convolution in convolutions), ())

    def masked_inputs(self, inputs: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        return inputs.masked_fill(attention_mask[..., None] == 0, 0.0), attention_mask


MASKED: dict[type, type[Masked]] = {
    Wav2Vec2Model: MaskedWav2Vec2,
    HubertModel: MaskedHubert,
    WavLMModel: MaskedWavLM,
    UniSpeechModel: MaskedUniSpeech,
    UniSpeechSatModel: MaskedUniSpeechSat,
    Data2VecAudioModel: MaskedData2VecAudio,
    Wav2Vec2ConformerModel: MaskedWav2Vec2Conformer,
    Wav2Vec2BertModel: MaskedWav2Vec2Bert,
    SEWModel: MaskedSEW,
    SEWDModel: MaskedSEWD,
    ParakeetEncoder: MaskedParakeet,
}
"""Upstream's class of a family's encoder -> ours."""
