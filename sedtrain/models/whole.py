"""Whole speech models of `transformers`, such as Whisper: both parts with their cross-attention, saved as what they were."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING, PreTrainedConfig, PreTrainedModel

from sedtrain.models.encoder import standalone
from sedtrain.models.encoder_families import OF_WHOLE
from sedtrain.models.loading import HUB_OPTIONS, configured
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

FACTS = ("training_normalizer", "max_training_seconds", "tokens_per_second", "tags", "ctc_vocab_size")
"""What a configuration says of training, beside what `transformers` reads."""
SPECIAL_TOKENS = ("decoder_start_token_id", "eos_token_id", "pad_token_id")


def is_whole(config: PreTrainedConfig) -> bool:
    """True for a configuration of an encoder of speech and a decoder that attends to it."""
    return config.model_type in OF_WHOLE and type(config) in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING


class WholeSpeechModel(SpeechEncoderDecoder):
    """The encoder and decoder of a sequence-to-sequence model.

    stock_class, stock_config: of the model in `transformers`, as which it is saved
    """

    def __init__(self, stock: PreTrainedModel) -> None:
        config = copy.deepcopy(stock.config)  # the parts change theirs
        super().__init__(encoder=standalone(stock), decoder=decoder_within(stock))
        self.stock_class, self.stock_config, self.generation_config = type(stock), config, stock.generation_config
        self.generation_config.eos_token_id = self.generation_config.eos_token_id or config.eos_token_id
        for name in SPECIAL_TOKENS:
            setattr(self.config, name, getattr(config, name))
        for name in FACTS:
            if (fact := getattr(config, name, None)) is not None:
                setattr(self.config, name, fact)
        self.config.max_text_tokens = self.max_tokens
        if vocab_size := getattr(config, "ctc_vocab_size", None):
            self.add_ctc_head(vocab_size)

    @property
    def is_whisper(self) -> bool:
        """True for a model that hears 30 s, whose decoder begins with Whisper's own prompt."""
        return bool(self.stock_config.model_type == "whisper")

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.stock_config.vocab_size = self.decoder.config.vocab_size
        return embeddings

    def empty_stock(self) -> tuple[PreTrainedModel, dict[str, str]]:
        """The model of `transformers` without its weights, and their names here by their names in it."""
        with torch.device("meta"):
            stock = self.stock_class(copy.deepcopy(self.stock_config))
            stock.tie_weights()
            parts = type(self)(stock)
        names = {id(weight): name for name, weight in parts.state_dict(keep_vars=True).items()}
        stock.config = self.stock_config
        return stock, {name: names[id(weight)] for name, weight in stock.state_dict(keep_vars=True).items()}

    def save_pretrained(
        self, save_directory: str | Path, *, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Writes what `from_pretrained` of the class in `transformers` reads; a CTC head lies in a file beside it."""
        weights = self.state_dict() if state_dict is None else state_dict
        for name in FACTS:
            if (fact := getattr(self.config, name, None)) is not None:
                setattr(self.stock_config, name, fact)
        stock, names = self.empty_stock()
        stock.generation_config = self.generation_config
        stock.load_state_dict({name: weights[own] for name, own in names.items()}, assign=True)
        stock.tie_weights()
        stock.save_pretrained(save_directory, **kwargs)
        self.save_ctc_head(Path(save_directory), weights)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """That of the class in `transformers`."""
        hub_options = {name: kwargs[name] for name in HUB_OPTIONS & kwargs.keys()}
        config, kwargs = configured(pretrained_model_name_or_path, kwargs)
        stock_class = MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING[type(config)]
        loaded = stock_class.from_pretrained(
            pretrained_model_name_or_path, *args, config=config, trust_remote_code=False, **kwargs
        )
        stock, report = loaded if isinstance(loaded, tuple) else (loaded, None)
        weights = stock.state_dict(keep_vars=True)
        model = cls(stock).eval()
        model.load_ctc_head(pretrained_model_name_or_path, **hub_options)
        return model if report is None else (model, under_own_names(report, weights, model))


def under_own_names(report: Mapping[str, Any], weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """What `transformers` says of a file, with the names that missing weights have in the model."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    missing = {names.get(id(weights.get(name)), name) for name in report["missing_keys"]}
    return {**report, "missing_keys": missing}


class WhisperText(transformers.WhisperForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, past_key_values=None, **kwargs):
        return super().forward(input_ids, attention_mask, (encoder_hidden_states,), past_key_values=past_key_values, **kwargs)


def decoder_within(stock):
    with torch.device("meta"):
        decoder = WhisperText(copy.deepcopy(stock.config))
    decoder.model.decoder, decoder.proj_out = stock.model.decoder, stock.proj_out
    return decoder
