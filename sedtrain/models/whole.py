"""Whole speech models of `transformers`, such as Whisper, trained as a joined model and saved in their own format."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING, PreTrainedConfig, PreTrainedModel

from sedtrain.batch import IGNORE_INDEX
from sedtrain.errors import UserError
from sedtrain.models.adapter import Adapter
from sedtrain.models.decoder_families import DECODERS_OF_WHOLE, stack_name
from sedtrain.models.encoder import EncodedSpeech, frame_width, standalone
from sedtrain.models.encoder_families import ENCODERS, UPSTREAM, encoder_config
from sedtrain.models.family_settings import configured
from sedtrain.models.foreign import HUB_OPTIONS
from sedtrain.models.loading import pretrained
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder, load_ctc_head, save_ctc_head

FACTS = ("training_normalizer", "max_training_seconds", "tokens_per_second", "tags", "ctc_vocab_size")
"""Entries that training adds to a configuration; `transformers` ignores them."""
SPECIAL_TOKENS = ("decoder_start_token_id", "eos_token_id", "pad_token_id")


def is_whole(config: PreTrainedConfig) -> bool:
    """True for the configuration of a sequence-to-sequence model with a known speech encoder and decoder."""
    is_speech = config.model_type in DECODERS_OF_WHOLE and type(config) in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING
    return is_speech and encoder_config(config).model_type in ENCODERS


class DecoderInput(Adapter, kind="decoder_input"):
    """Position embedding and projection that a whole model's decoder applies to the frames before it attends to them.

    pos_emb, proj: modules taken out of the decoder; None if it has none
    """

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__(input_dim, output_dim)
        self.pos_emb: nn.Embedding | None = None
        self.proj: nn.Module | None = None

    def forward(self, frames: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.pos_emb is not None:
            most = self.pos_emb.num_embeddings
            if frames.shape[1] > most:
                wrong = f"an utterance of {frames.shape[1]} frames exceeds the {most} positions for frames"
                raise UserError("checkpoint", "a whole model", wrong, "write a smaller data.max_seconds")
            frames = frames + self.pos_emb.weight[: frames.shape[1]]
        return frames if self.proj is None else self.proj(frames), mask


def decoder_input(stock: PreTrainedModel) -> DecoderInput | None:
    """The adapter with the modules that the decoder applies to frames; None if it has none."""
    if not (names := DECODERS_OF_WHOLE[stock.config.model_type].frame_modules):
        return None
    decoder = stock.get_decoder()
    adapter = DecoderInput(frame_width(encoder_config(stock.config)), decoder.config.hidden_size)
    for name in names:
        setattr(adapter, name, decoder.get_submodule(name))
    return adapter


class WholeSpeechModel(SpeechEncoderDecoder):
    """The encoder and decoder of a sequence-to-sequence model, joined.

    stock_class, stock_config: of the model in `transformers`, for saving
    """

    def __init__(self, stock: PreTrainedModel) -> None:
        config = copy.deepcopy(stock.config)  # joining changes the configurations of the parts
        super().__init__(encoder=standalone(stock), decoder=stock, adapter=decoder_input(stock))
        self.stock_class, self.stock_config, self.generation_config = type(stock), config, stock.generation_config
        self.generation_config.eos_token_id = self.generation_config.eos_token_id or config.eos_token_id
        for name in SPECIAL_TOKENS:
            token = getattr(config, name, None)
            setattr(self.config, name, getattr(stock.generation_config, name, None) if token is None else token)
        for name in FACTS:
            if (fact := getattr(config, name, None)) is not None:
                setattr(self.config, name, fact)
        self.config.max_text_tokens = self.max_tokens
        if vocab_size := getattr(config, "ctc_vocab_size", None):
            self.add_ctc_head(vocab_size)

    @property
    def is_whisper(self) -> bool:
        """True for Whisper, which reads 30 s of audio and starts a text with its own prompt."""
        return bool(self.stock_config.model_type == "whisper")

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        within = DECODERS_OF_WHOLE[self.stock_config.model_type].within
        for config in (self.stock_config, getattr(self.stock_config, within or "", self.stock_config)):
            config.vocab_size = self.decoder.config.vocab_size
        return embeddings

    def save_pretrained(
        self, save_directory: str | Path, *, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Saves in the format of the class in `transformers`; a CTC head goes into a file of its own."""
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
        """Loads as the class in `transformers` does, or Flax weights."""
        hub_options = {name: kwargs[name] for name in HUB_OPTIONS & kwargs.keys()}
        config, kwargs = configured(pretrained_model_name_or_path, kwargs)
        stock_class = MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING[type(config)]
        loaded = pretrained(stock_class, pretrained_model_name_or_path, *args, config=config, **kwargs)
        stock, report = loaded if isinstance(loaded, tuple) else (loaded, None)
        names = own_names(stock)
        model = cls(stock).eval()
        load_ctc_head(model, pretrained_model_name_or_path, **hub_options)
        if report is None:
            return model
        return model, {**report, "missing_keys": {names.get(name, name) for name in report["missing_keys"]}}


def heard_languages(model: SpeechEncoderDecoder, encoded: EncodedSpeech) -> Tensor:
    """(B,) tokens of the languages that Whisper detects, as `detect_language` of `transformers` does."""
    ids = torch.tensor([*model.generation_config.lang_to_id.values()], device=model.device)
    start = torch.full((len(encoded.last_hidden_state), 1), model.config.decoder_start_token_id, device=model.device)
    scores = model(encoder_outputs=encoded, decoder_input_ids=start, use_cache=False).logits[:, -1]
    return ids[scores[:, ids].argmax(-1)]


def with_heard_languages(model: SpeechEncoderDecoder, encoded: EncodedSpeech, tokens: Tensor) -> Tensor:
    """(B, P) prompts or labels; where IGNORE_INDEX stands for the language, Whisper's detected language replaces it."""
    unnamed = tokens[:, :2] == IGNORE_INDEX
    if not unnamed.any() or not getattr(model, "is_whisper", False):
        return tokens
    tokens = tokens.clone()
    tokens[:, :2] = torch.where(unnamed, heard_languages(model, encoded)[:, None], tokens[:, :2])
    return tokens


def own_names(stock: PreTrainedModel) -> dict[str, str]:
    """Names of weights in a whole model of `transformers` -> names in the joined model."""
    kind = UPSTREAM[ENCODERS[encoder_config(stock.config).model_type]]
    encoder = next(f"{name}." for name, module in stock.named_modules() if type(module) is kind)
    frame_modules = DECODERS_OF_WHOLE[stock.config.model_type].frame_modules

    def own(name: str) -> str:
        if name.startswith(encoder):
            return f"encoder.{name.removeprefix(encoder)}"
        name = stack_name(name)
        _, module, rest = f"{name}..".split(".", 2)
        return f"adapter.{module}.{rest.strip('.')}" if module in frame_modules else f"decoder.{name}"

    return {name: own(name) for name in stock.state_dict()}
