"""Decoder stacks of `transformers`, repaired: they take masked frames of their own width, and every token has a position.

B batch, U target tokens, T frames, D width.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.cohere_asr.modeling_cohere_asr import CohereAsrDecoder
from transformers.models.moonshine_streaming.modeling_moonshine_streaming import MoonshineStreamingDecoder
from transformers.models.speecht5.modeling_speecht5 import SpeechT5DecoderWithTextPrenet
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaDecoder
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from sedtrain.models.mixins import mix_into

# --- Whisper: upstream's decoder takes no mask of frames


class MaskedWhisperLayer(nn.Module):
    """Takes the mask of frames as `frame_mask`: upstream's decoder passes None as `encoder_attention_mask`."""

    def forward(self, *args: Any, frame_mask: Tensor | None = None, **kwargs: Any) -> Any:
        return super().forward(*args, **{**kwargs, "encoder_attention_mask": frame_mask})


class MaskedWhisperDecoder(WhisperDecoder):
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        for layer in self.layers:
            mix_into(layer, MaskedWhisperLayer)

    def forward(
        self,
        input_ids: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        frame_mask = None
        if encoder_hidden_states is not None and encoder_attention_mask is not None:
            inputs_embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            frame_mask = create_bidirectional_mask(
                self.config, inputs_embeds, encoder_attention_mask, encoder_hidden_states=encoder_hidden_states
            )
        return super().forward(
            input_ids=input_ids if inputs_embeds is None else None,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            frame_mask=frame_mask,
            **kwargs,
        )


# --- M2M100 and its relatives: they skip pad tokens when they count positions, except in cached steps


class GivenPositions(nn.Module):
    """A table of sinusoids that uses `position_ids` if they are set, and grows to `most` rows."""

    weights: Tensor
    position_ids: Tensor | None = None
    most = 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        table: Any = super()
        if self.position_ids is None:
            positions: Tensor = table.forward(*args, **kwargs)
            return positions
        if self.most > len(self.weights):
            table.make_weights(self.most, self.embedding_dim, self.padding_idx)
        return self.weights[self.position_ids]


class Counting(PreTrainedModel):
    """Mixin for a decoder: takes `position_ids`, which count every token."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        mix_into(self.embed_positions, GivenPositions)

    def forward(self, *args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        tokens = kwargs["input_ids"] if kwargs["inputs_embeds"] is None else kwargs["inputs_embeds"]
        cache = kwargs["past_key_values"]
        past_length = 0 if cache is None else cache.get_seq_length()
        table = self.embed_positions
        table.position_ids, table.most = position_ids, table.padding_idx + 1 + past_length + tokens.shape[1]
        try:
            return super().forward(*args, **kwargs)
        finally:
            table.position_ids = None


class TokenSpeechT5Decoder(SpeechT5DecoderWithTextPrenet):
    """Takes `input_ids` or `inputs_embeds` like the other families; upstream calls the ids `input_values`."""

    @property
    def embed_tokens(self) -> nn.Embedding:
        tokens: nn.Embedding = self.prenet.embed_tokens
        return tokens

    @property
    def embed_positions(self) -> nn.Module:
        positions: nn.Module = self.prenet.embed_positions
        return positions

    def forward(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, past_key_values: Any, **kwargs: Any
    ) -> Any:
        tokens = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        num_read = 0 if past_key_values is None else past_key_values.get_seq_length()
        positions = self.embed_positions(tokens[..., 0] if input_ids is None else input_ids, num_read)
        states = self.prenet.dropout(tokens * self.prenet.embed_scale + positions)
        return self.wrapped_decoder(hidden_states=states, past_key_values=past_key_values, **kwargs)


# --- Cohere, streaming Moonshine, T5Gemma: upstream's stacks change the width of frames themselves


class UnprojectedCohereDecoder(CohereAsrDecoder):
    """Takes frames of its own width; the joined model projects them, as for every decoder."""

    def __init__(self, config: Any) -> None:
        config.encoder_config = transformers.ParakeetEncoderConfig()
        super().__init__(config)
        config.encoder_config, self.proj = None, nn.Identity()


class UnprojectedMoonshineStreamingDecoder(MoonshineStreamingDecoder):
    """Takes frames of its own width that include position embeddings; the joined model adds them once per utterance."""

    def __init__(self, config: Any) -> None:
        config.encoder_config = transformers.MoonshineStreamingEncoderConfig(hidden_size=config.hidden_size)
        super().__init__(config)
        config.encoder_config, self.pos_emb = None, NoPositions()

    def forward(self, *args: Any, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        frames = encoder_hidden_states.clone()  # upstream changes them in place
        return super().forward(*args, encoder_hidden_states=frames, **kwargs)


class NoPositions(nn.Module):
    def forward(self, positions: Tensor) -> Tensor:
        return positions.new_zeros(())


class WholeT5GemmaDecoder(T5GemmaDecoder):
    """Takes frames of its own width, attends to pad tokens with or without a cache, and caches all frames, however many."""

    def __init__(self, config: Any) -> None:
        config.cross_attention_hidden_size = config.hidden_size
        super().__init__(config)
        config.cross_attention_hidden_size = None  # the joined model of transformers gives it another meaning

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cache, tokens = kwargs["past_key_values"], kwargs["input_ids"]
        if cache is not None and not cache.is_updated:
            cache.cross_attention_cache = DynamicCache()
        if cache is None and kwargs["attention_mask"] is None and tokens is not None:
            kwargs["attention_mask"] = torch.ones_like(tokens)
        return super().forward(*args, **kwargs)
