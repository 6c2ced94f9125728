"""Speech2Text2 (arXiv 2104.06678), the decoder of facebook/s2t-wav2vec2-large-en-de, which transformers 5 has dropped.

Its layers are Marian's: attention, cross-attention and feed-forward, each followed by a residual sum and a layer norm.
Embeddings are scaled. Positions are sinusoids that start after the padding index.

B batch, U target tokens, D width.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    MarianForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Wav2Vec2Processor,
)
from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES
from transformers.models.marian.modeling_marian import (
    MarianDecoder,
    MarianDecoderLayer,
    MarianDecoderWrapper,
)

from sedtrain.text.fast_bpe import Speech2Text2Tokenizer

MODEL_TYPE = "speech_to_text_2"
TIMESCALE = 10_000.0


class Speech2Text2Config(PreTrainedConfig):
    """The values of `decoder` in published config.json files that are used; the files hold more."""

    model_type: ClassVar[str] = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_attention_heads": "decoder_attention_heads",
        "hidden_size": "d_model",
        "max_position_embeddings": "max_target_positions",
    }

    vocab_size: int = 10_000
    d_model: int = 256
    decoder_layers: int = 6
    decoder_attention_heads: int = 4
    decoder_ffn_dim: int = 2048
    decoder_layerdrop: float = 0.0
    activation_function: str = "relu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    init_std: float = 0.02
    scale_embedding: bool = True
    max_target_positions: int = 1024
    use_cache: bool = True
    is_decoder: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    decoder_start_token_id: int | None = 2
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("num_hidden_layers", None)  # published files hold that of an unrelated encoder
        super().__post_init__(**kwargs)

    @property
    def num_hidden_layers(self) -> int:
        return self.decoder_layers


class Sinusoids(nn.Module):
    """Positions from 0 on -> (B, U, D): sines of `offset` + position in the first half, cosines in the second.

    Computes any position; `weights` is a table of the first ones, for code that reads a table.

    mask:  (B, L) of the L tokens so far; masked tokens are not counted. None counts all, also pad tokens within a text
    dtype: of the result
    """

    mask: Tensor | None = None
    dtype = torch.float32

    def __init__(self, width: int, num_positions: int, offset: int) -> None:
        super().__init__()
        self.width, self.num_positions, self.offset = width, num_positions, offset

    @property
    def weights(self) -> Tensor:
        """(offset + num_positions, D)"""
        return self.sines(torch.arange(self.offset + self.num_positions))

    def forward(self, shape: tuple[int, int], past_length: int, position_ids: Tensor) -> Tensor:
        if self.mask is not None and self.mask.ndim == 2:
            position_ids = (self.mask.long().cumsum(1)[:, -shape[1] :] - 1).clamp(min=0)
        return self.sines(position_ids + self.offset).to(self.dtype)

    def sines(self, places: Tensor) -> Tensor:
        half = self.width // 2
        steps = torch.arange(half, device=places.device) / max(half - 1, 1)
        angles = places[..., None] * torch.exp(-math.log(TIMESCALE) * steps)
        return F.pad(torch.cat([angles.sin(), angles.cos()], -1), (0, self.width % 2))


class Speech2Text2Decoder(MarianDecoder):
    config: Speech2Text2Config
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"embed_positions\.weights$"]  # computed here

    def __init__(self, config: Speech2Text2Config) -> None:
        super(MarianDecoder, self).__init__(config)
        self.dropout, self.layerdrop = config.dropout, config.decoder_layerdrop
        self.embed_scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)
        self.embed_positions = Sinusoids(config.d_model, config.max_target_positions, (config.pad_token_id or 0) + 1)
        self.layers = nn.ModuleList(MarianDecoderLayer(config, layer_idx=i) for i in range(config.decoder_layers))
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        self.embed_positions.mask, self.embed_positions.dtype = attention_mask, embeds.dtype
        try:
            return super().forward(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)
        finally:
            self.embed_positions.mask = None


class Speech2Text2DecoderWrapper(MarianDecoderWrapper):
    def __init__(self, config: Speech2Text2Config) -> None:
        super(MarianDecoderWrapper, self).__init__(config)
        self.decoder = Speech2Text2Decoder(config)
        self.post_init()


class Speech2Text2ForCausalLM(MarianForCausalLM):
    """The decoder with its output layer; weights have their published names."""

    config: Speech2Text2Config
    _keys_to_ignore_on_load_unexpected = Speech2Text2Decoder._keys_to_ignore_on_load_unexpected

    def __init__(self, config: Speech2Text2Config) -> None:
        config.is_decoder, config.is_encoder_decoder = True, False
        super(MarianForCausalLM, self).__init__(config)
        self.model = Speech2Text2DecoderWrapper(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()


class Speech2Text2Processor(Wav2Vec2Processor):
    """Joins a feature extractor and the tokenizer, under the name in published folders."""


def settle_published(model: PreTrainedModel) -> None:
    """Completes a joined model from published files, in place: copies the decoder's special tokens, unties its embeddings."""
    decoder: Any = model.decoder
    if not isinstance(decoder, Speech2Text2ForCausalLM):
        return
    for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
        if getattr(model.config, name, None) is None:
            setattr(model.config, name, getattr(decoder.config, name))
    if decoder.lm_head.weight is not decoder.model.decoder.embed_tokens.weight:
        decoder.config.tie_word_embeddings = False


def register() -> None:
    """Registers the family with the Auto classes of transformers, once."""
    if MODEL_TYPE in CONFIG_MAPPING:
        return
    AutoConfig.register(MODEL_TYPE, Speech2Text2Config)
    AutoModelForCausalLM.register(Speech2Text2Config, Speech2Text2ForCausalLM)
    AutoTokenizer.register(Speech2Text2Config, tokenizer_class=Speech2Text2Tokenizer)
    AutoProcessor.register(Speech2Text2Config, Speech2Text2Processor)
    REGISTERED_TOKENIZER_CLASSES[MODEL_TYPE] = Speech2Text2Tokenizer  # the name in published config.json files
