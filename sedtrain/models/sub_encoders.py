"""Speech encoders that `transformers` has only inside sequence-to-sequence models, each with its own model type.

B batch, S inputs (samples or feature frames), T frames, D width.
"""

from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.moonshine.modeling_moonshine import MoonshineEncoder
from transformers.models.moonshine_streaming.configuration_moonshine_streaming import MoonshineStreamingEncoderConfig
from transformers.models.moonshine_streaming.modeling_moonshine_streaming import (
    MoonshineStreamingCausalConv1d,
    MoonshineStreamingEncoder,
)
from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4TSpeechEncoder
from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import (
    SeamlessM4Tv2ConformerEncoder,
    SeamlessM4Tv2SpeechEncoder,
)
from transformers.models.speech_to_text.modeling_speech_to_text import Speech2TextEncoder
from transformers.models.speecht5.modeling_speecht5 import SpeechT5EncoderWithSpeechPrenet
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from sedtrain.errors import UserError
from sedtrain.models.masking import Masked, mask_front_end
from sedtrain.models.mixins import (
    GuardedSpecAugment,
    MaskedConv1d,
    MaskedGroupNorm,
    Strides,
    length_mask,
    mix_into,
    output_lengths,
    step,
)
from sedtrain.models.packing import Packable, Packing


def encoder_config_class(whole: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """A configuration class for the encoder of a sequence-to-sequence model; whole: the model's configuration class."""
    name, model_type = whole.__name__.replace("Config", "EncoderConfig"), f"{whole.model_type}-encoder"
    fields = {"__annotations__": {"is_encoder_decoder": bool}, "is_encoder_decoder": False, "model_type": model_type}
    globals()[name] = made = type(name, (whole,), {**fields, "__module__": __name__})  # pickle looks here for it
    return made


class VariableLengthWhisperEncoder(Packable, WhisperEncoder):
    """Whisper's encoder for clips of any length up to 30 s: positions are cropped, padding is masked.

    Upstream computes 30 seconds for every clip. Parameters and their names are unchanged.
    """

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(self, input_features: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """(B, mel bins, S) features -> (B, ceil(S / 2), D). Raises UserError for more frames than positions."""
        packed, mask = self.packed, None
        hidden_states = self.stem(input_features) if packed is None else packed.one_by_one(self.stem, input_features)
        hidden_states = F.dropout(hidden_states, p=self.config.dropout, training=self.training)
        if packed is not None:
            kwargs.update(packed.for_attention(self.config, hidden_states.device))
        elif attention_mask is not None:
            frame_mask = self._get_feature_vector_attention_mask(hidden_states.shape[1], attention_mask)
            mask = create_bidirectional_mask(self.config, hidden_states, frame_mask)
        layerdrop = self.config.encoder_layerdrop if self.training else 0.0
        for layer in self.layers:
            if layerdrop == 0.0 or torch.rand([]) >= layerdrop:
                hidden_states = layer(hidden_states, mask, **kwargs)
        hidden_states = self.layer_norm(hidden_states)
        return BaseModelOutput(hidden_states if packed is None else packed.unpack(hidden_states))

    def stem(self, input_features: Tensor) -> Tensor:
        """(B, mel bins, S) -> (B, ceil(S / 2), D), position embeddings added."""
        hidden_states = F.gelu(self.conv2(F.gelu(self.conv1(input_features)))).transpose(1, 2)
        num_frames = hidden_states.shape[1]
        if num_frames > self.max_source_positions:
            wrong = f"an utterance of {num_frames} frames does not fit its {self.max_source_positions} positions"
            write = "write data.max_seconds=30, the limit of Whisper's encoder"
            raise UserError("encoder", "whisper", wrong, write, "cut the audio into pieces of 30 s")
        positioned: Tensor = hidden_states + self.embed_positions.weight[:num_frames]
        return positioned


class StandaloneWhisper(Packing, Masked, VariableLengthWhisperEncoder):
    config_class = encoder_config_class(transformers.WhisperConfig)
    front_end = ("conv1", "conv2")
    whole = transformers.WhisperModel

    def mask_modules(self) -> Strides:
        self.mask(self.conv1, MaskedConv1d, ())
        self.mask(self.conv2, MaskedConv1d, step(self.conv1))
        self.embed_positions.requires_grad_(False)  # sinusoids
        return step(self.conv1) + step(self.conv2)

    def mix_in(self) -> None:
        for layer in self.layers:
            mix_into(layer.self_attn, self.attention)


class StandaloneSpeech2Text(Masked, Speech2TextEncoder):
    config_class = encoder_config_class(transformers.Speech2TextConfig)
    front_end = ("conv",)
    whole = transformers.Speech2TextModel

    def mask_modules(self) -> Strides:
        steps: Strides = ()
        for convolution in self.conv.conv_layers:
            self.mask(convolution, MaskedConv1d, steps)
            steps += step(convolution)
        return steps


class StandaloneMoonshine(Masked, MoonshineEncoder):
    config_class = encoder_config_class(transformers.MoonshineConfig)
    front_end = ("conv1", "conv2", "conv3", "groupnorm")
    whole = transformers.MoonshineModel

    def mask_modules(self) -> Strides:
        self.mask(self.groupnorm, MaskedGroupNorm, step(self.conv1))
        return step(self.conv1) + step(self.conv2) + step(self.conv3)

    def masked_inputs(self, inputs: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Spreads the mask of frames over samples: upstream reads it at every 384th sample."""
        stride = self.conv1.stride[0] * self.conv2.stride[0] * self.conv3.stride[0]
        num_frames = (inputs.shape[1] + stride - 1) // stride
        mask = self._get_feature_vector_attention_mask(num_frames, attention_mask)
        return inputs, mask.repeat_interleave(stride, dim=1)[:, : inputs.shape[1]]

    def _get_feat_extract_output_lengths(self, input_lengths: int) -> int:
        """Counts frames in whole numbers; upstream divides floats, which turns a traced length into a constant."""
        for kernel, stride, _ in self.steps:
            input_lengths = (input_lengths - kernel) // stride + 1
        return input_lengths


class ExactCausalConv1d(MoonshineStreamingCausalConv1d):
    """Counts the frames that an utterance has without padding; upstream also counts frames that lie partly in padding.

    lengths: (B,) of its input
    """

    lengths: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        frames, _ = super().forward(x)
        mask = length_mask(output_lengths(self.lengths, causal_step(self)), frames.shape[-1])
        return frames * mask[:, None], mask


def causal_step(convolution: Any) -> Strides:
    """The step of a causal convolution, whose padding all lies before the audio."""
    kernel, stride = convolution.kernel_size[0], convolution.stride[0]
    return ((kernel, stride, (kernel - 1) // 2),)


class StandaloneMoonshineStreaming(Masked, MoonshineStreamingEncoder):
    """Layers attend to a window, also without a mask; upstream then attends to everything."""

    config_class = MoonshineStreamingEncoderConfig
    front_end = ("embedder",)

    def mask_modules(self) -> Strides:
        steps: Strides = ((1, self.embedder.frame_len, 0),)  # zeros fill the last frame
        for convolution in (self.embedder.conv1, self.embedder.conv2):
            self.mask(convolution, ExactCausalConv1d, steps)
            steps += causal_step(convolution)
        return steps

    def forward(self, inputs: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        inputs = kwargs.pop(self.main_input_name) if inputs is None else inputs
        mask = torch.ones_like(inputs, dtype=torch.long) if attention_mask is None else attention_mask
        return super().forward(inputs, mask, **kwargs)

    def masked_inputs(self, inputs: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        missing = -inputs.shape[1] % self.embedder.frame_len
        inputs = inputs.masked_fill(attention_mask == 0, 0.0)
        return F.pad(inputs, (0, missing)), F.pad(attention_mask, (0, missing))


class FittingAdapterLayer:
    """Counts the frames of this layer's input; upstream counts every layer's like the first's."""

    residual_conv: Any

    def _compute_sub_sample_lengths_from_attention_mask(self, attention_mask: Tensor) -> Tensor:
        return output_lengths(self.residual_conv.lengths, step(self.residual_conv))


class MaskedSeamlessM4T(Masked):
    front_end = ("feature_projection",)

    def mask_adapter(self, steps: Strides) -> Strides:
        for layer in self.adapter.layers:
            mix_into(layer, FittingAdapterLayer)
        return super().mask_adapter(steps)


class StandaloneSeamlessM4T(MaskedSeamlessM4T, SeamlessM4TSpeechEncoder):
    config_class = encoder_config_class(transformers.SeamlessM4TConfig)
    whole = transformers.SeamlessM4TForSpeechToText


class ChunkMaskedEncoder(SeamlessM4Tv2ConformerEncoder):
    """Makes the chunk mask one of scores, except for sdpa: other backends add upstream's boolean mask, which masks nothing."""

    def _apply_chunk_attention(self, attention_mask: Tensor | None, hidden_states: Tensor) -> Tensor:
        attended: Tensor = super()._apply_chunk_attention(attention_mask, hidden_states)
        if self.config._attn_implementation == "sdpa":
            return attended
        scores = torch.zeros_like(attended, dtype=hidden_states.dtype)
        return scores.masked_fill(~attended, torch.finfo(scores.dtype).min)


class StandaloneSeamlessM4Tv2(MaskedSeamlessM4T, SeamlessM4Tv2SpeechEncoder):
    config_class = encoder_config_class(transformers.SeamlessM4Tv2Config)
    whole = transformers.SeamlessM4Tv2ForSpeechToText

    def mask_modules(self) -> Strides:
        mix_into(self.encoder, ChunkMaskedEncoder)
        return ()


class MaskedPrenet(GuardedSpecAugment):
    """Mixin for a prenet whose convolutional position embedding reads zeros after the end of each utterance."""

    def _mask_hidden_states(
        self, hidden_states: Tensor, mask_time_indices: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Any:
        frames = super()._mask_hidden_states(hidden_states, mask_time_indices, attention_mask)
        return frames if attention_mask is None else frames.masked_fill(~attention_mask[..., None], 0.0)

    def _get_feature_vector_attention_mask(self, feature_vector_length: int, attention_mask: Tensor) -> Tensor:
        assert self.lengths is not None
        return length_mask(self.lengths, feature_vector_length)


class StandaloneSpeechT5(Masked, SpeechT5EncoderWithSpeechPrenet):
    config_class = encoder_config_class(transformers.SpeechT5Config)
    front_end = ("prenet.feature_encoder",)
    whole = transformers.SpeechT5ForSpeechToText

    def mask_modules(self) -> Strides:
        steps = mask_front_end(self, self.prenet.feature_encoder)
        self.mask(self.prenet, MaskedPrenet, steps)
        return steps
