"""Whole speech models of `transformers`, such as Whisper: both parts with their cross-attention, saved as what they were."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING, PreTrainedConfig, PreTrainedModel

from sedtrain.models.ctc_head import load_ctc_head, save_ctc_head
from sedtrain.models.encoder import standalone
from sedtrain.models.encoder_families import OF_WHOLE, UPSTREAM
from sedtrain.models.foreign import HUB_OPTIONS
from sedtrain.models.loading import configured
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.models.stacks import OF_WHOLE as DECODERS
from sedtrain.models.stacks import here_named

FACTS = ("training_normalizer", "max_training_seconds", "tokens_per_second", "tags", "ctc_vocab_size")
"""What a configuration says of training, beside what `transformers` reads."""
SPECIAL_TOKENS = ("decoder_start_token_id", "eos_token_id", "pad_token_id")


def is_whole(config: PreTrainedConfig) -> bool:
    """True for a configuration of an encoder of speech and a decoder that attends to it."""
    return config.model_type in OF_WHOLE.keys() & DECODERS.keys() and type(config) in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING


class WholeSpeechModel(SpeechEncoderDecoder):
    """The encoder and decoder of a sequence-to-sequence model.

    stock_class, stock_config: of the model in `transformers`, as which it is saved
    """

    def __init__(self, stock: PreTrainedModel) -> None:
        config = copy.deepcopy(stock.config)  # the parts change theirs
        super().__init__(encoder=standalone(stock), decoder=stock)
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

    def save_pretrained(
        self, save_directory: str | Path, *, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Writes what `from_pretrained` of the class in `transformers` reads; a CTC head lies in a file beside it."""
        weights = self.state_dict() if state_dict is None else state_dict
        for name in FACTS:
            if (fact := getattr(self.config, name, None)) is not None:
                setattr(self.stock_config, name, fact)
        with torch.device("meta"):
            stock = self.stock_class(self.stock_config)
        stock.generation_config = self.generation_config
        stock.load_state_dict({name: weights[own] for name, own in own_names(stock).items()}, assign=True)
        stock.tie_weights()
        stock.save_pretrained(save_directory, **kwargs)
        save_ctc_head(self, Path(save_directory), weights)

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
        names = own_names(stock)
        model = cls(stock).eval()
        load_ctc_head(model, pretrained_model_name_or_path, **hub_options)
        if report is None:
            return model
        return model, {**report, "missing_keys": {names.get(name, name) for name in report["missing_keys"]}}


def own_names(stock: PreTrainedModel) -> dict[str, str]:
    """The weights of a model of `transformers`, and their names in a joined one."""
    kind = UPSTREAM[OF_WHOLE[stock.config.model_type]]
    encoder = next(f"{name}." for name, module in stock.named_modules() if type(module) is kind)
    return {
        name: f"encoder.{name.removeprefix(encoder)}" if name.startswith(encoder) else f"decoder.{here_named(name)}"
        for name in stock.state_dict()
    }
