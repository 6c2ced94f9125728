"""A model with its processor: joined, loaded and saved as a Hugging Face folder."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoFeatureExtractor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SequenceFeatureExtractor,
    Wav2Vec2Processor,
)

from sedtrain.errors import UserError
from sedtrain.models.adapter import Adapter
from sedtrain.models.encoder import feature_extractor_of, frame_width
from sedtrain.models.loading import check_loaded, load_tokenizer, loading
from sedtrain.models.lora import FOLDER, base_weights, load_adapter, lora_layers, save_adapter
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.run_dir import model_of
from sedtrain.text.tags import Tags, add_tags
from sedtrain.text.tokenizers import start_end_pad


@dataclass(frozen=True)
class SavedModel:
    """A model with what turns audio into its input and its output into text."""

    model: SpeechEncoderDecoder
    tokenizer: PreTrainedTokenizerBase
    feature_extractor: SequenceFeatureExtractor

    @property
    def training_normalizer(self) -> Mapping[str, str] | None:
        """Name and version of the normalizer of the texts that it learnt; None where its folder does not say."""
        label: Mapping[str, str] | None = getattr(self.model.config, "training_normalizer", None)
        return label

    @property
    def tags(self) -> Tags | None:
        """The tokens that ask for a language and a task; None where it did not learn several."""
        ids: Mapping[str, Mapping[str, Sequence[int]]] | None = getattr(self.model.config, "tags", None)
        return Tags(ids) if ids else None

    def learn_tags(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Gives tokenizer and model a token for each language and each task of `pairs`."""
        tags = add_tags(self.tokenizer, pairs)
        if len(self.tokenizer) > self.model.decoder.config.vocab_size:
            self.model.resize_token_embeddings(len(self.tokenizer))
        self.model.config.tags = tags.ids

    def save(self, folder: Path, generation: Mapping[str, Any]) -> None:
        """Writes a folder that `transformers` loads without sedtrain; `generation` becomes its generation config."""
        for name, value in generation.items():
            setattr(self.model.generation_config, name, value)
        if lora_layers(self.model):
            self.model.save_pretrained(folder, state_dict=base_weights(self.model))
            save_adapter(self.model, folder / FOLDER)
        else:
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.feature_extractor.save_pretrained(folder)
        # the name of one family, but it joins any feature extractor with any tokenizer; AutoProcessor loads it
        Wav2Vec2Processor(self.feature_extractor, self.tokenizer).save_pretrained(folder)


def load(checkpoint: str | Path) -> SavedModel:
    """A trained model with its tokenizer and feature extractor, on the CPU, in float32 and evaluation mode.

    checkpoint: the folder of a run (its `model` is taken), a Hugging Face folder, or a Hub id
    Raises UserError where it is none of these.
    """
    name = model_of(str(checkpoint))
    with loading("checkpoint", name):
        model, loaded = SpeechEncoderDecoder.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        feature_extractor = AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False)
    check_loaded("checkpoint", name, model, loaded, used=model)
    with loading("checkpoint", name):
        load_adapter(model, name)
    return SavedModel(model.eval(), load_tokenizer("checkpoint", name), feature_extractor)


def join(
    encoder: PreTrainedModel,
    decoder: PreTrainedModel,
    adapter: Callable[[int, int], Adapter | None],
    tokenizer: PreTrainedTokenizerBase,
) -> SavedModel:
    """A new model in training mode, with the start token of the decoder's pretraining, else the tokenizer's.

    adapter: makes one from the widths of encoder and decoder
    Raises UserError where the tokenizer writes more tokens than the decoder embeds, or the adapter refuses the widths.
    """
    config = decoder.config
    if config.vocab_size < len(tokenizer):
        raise UserError(
            "decoder.checkpoint",
            config._name_or_path,
            f"its tokenizer writes {len(tokenizer)} tokens, its embeddings hold {config.vocab_size}",
            "write decoder.checkpoint=FOLDER whose tokenizer and weights belong together",
        )
    start, end, pad = start_end_pad(tokenizer)
    if config._name_or_path and getattr(config, "decoder_start_token_id", None) is not None:
        start = config.decoder_start_token_id
    between = adapter(frame_width(encoder.config), config.hidden_size)
    model = SpeechEncoderDecoder(encoder=encoder, decoder=decoder, adapter=between)
    model.set_special_tokens(start, end, pad)
    model.train()  # from_pretrained gives evaluation mode, which Lightning keeps: dropout would never act
    return SavedModel(model, tokenizer, feature_extractor_of(encoder))
