"""A model with its processor: joined, loaded and saved as a Hugging Face folder."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf, isfinite
from pathlib import Path
from typing import Any, TypeGuard

import torch
from transformers import (
    AutoFeatureExtractor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SequenceFeatureExtractor,
    Wav2Vec2Processor,
)

from sedtrain.errors import UserError
from sedtrain.models.adapter import Adapter
from sedtrain.models.decoder import most_new_tokens
from sedtrain.models.encoder import feature_extractor_of, frame_width
from sedtrain.models.loading import check_loaded, load_tokenizer, loading
from sedtrain.models.lora import FOLDER, base_weights, load_adapter, lora_layers, save_adapter
from sedtrain.models.prefix import is_prefixed, is_prompt, prompt_of
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.run_dir import model_of
from sedtrain.text.tags import NUM_TAGS, Tags, add_tags
from sedtrain.text.tokenizers import start_end_pad

MOST_TOKENS = 200  # of a text where nothing is known of its audio
MORE_THAN_MEAN, SPARE_TOKENS = 4, 16
MOST_RATE, MOST_SECONDS = 1e4, 1e6  # tokens a second, and seconds, that a model's files may name


def is_within(value: object, most: float) -> TypeGuard[float]:
    """True for a number from 0 to `most`; a stranger's file may hold anything."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most


def most_tokens(config: PreTrainedConfig, seconds: float) -> int:
    """Tokens that a text of so many seconds may have: a multiple of those that training texts have in that time."""
    rate = getattr(config, "tokens_per_second", None)
    if not is_within(rate, MOST_RATE) or not isfinite(seconds):
        return MOST_TOKENS
    return SPARE_TOKENS + ceil(MORE_THAN_MEAN * rate * seconds)


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
    def max_training_seconds(self) -> float:
        """Length of the longest utterance that it was trained on; infinite where its folder does not say."""
        seconds = getattr(self.model.config, "max_training_seconds", None)
        return float(seconds) if is_within(seconds, MOST_SECONDS) else inf

    @property
    def tags(self) -> Tags | None:
        """The tokens that ask for a language and a task; None where it did not learn several."""
        ids: Mapping[str, Mapping[str, Sequence[int]]] | None = getattr(self.model.config, "tags", None)
        return Tags(ids) if ids else None

    @property
    def max_seconds(self) -> float:
        """Longest audio that the encoder takes; only Whisper's has a limit: its positions, each of two features."""
        if self.model.config.encoder.model_type != "whisper-encoder":
            return inf
        extractor: Any = self.feature_extractor
        return float(
            2 * self.model.config.encoder.max_source_positions * extractor.hop_length / extractor.sampling_rate
        )

    def learn_tags(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Gives tokenizer and model a token for each language and each task of `pairs`."""
        tags = add_tags(self.tokenizer, pairs)
        if len(self.tokenizer) > self.model.decoder.config.vocab_size:
            self.model.resize_token_embeddings(len(self.tokenizer))
        self.model.config.tags = tags.ids

    def save(self, folder: Path, generation: Mapping[str, Any]) -> None:
        """Writes a folder that `transformers` loads without sedtrain; `generation` becomes its generation config."""
        wanted = generation.get("max_new_tokens") or most_tokens(self.model.config, self.max_training_seconds)
        num_given = 1 + (NUM_TAGS if self.tags else 0)
        most = most_new_tokens(
            wanted, self.model.max_tokens, num_given
        )  # transformers does not stop at the last position
        for name, value in {**generation, "max_new_tokens": most}.items():
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
    check_loaded("checkpoint", name, model, loaded, used=model, is_trained=True)
    with loading("checkpoint", name):
        load_adapter(model, name)
    refuse_misdescribed(name, model)
    return SavedModel(model.eval(), load_tokenizer("checkpoint", name), feature_extractor)


def refuse_misdescribed(name: str, model: SpeechEncoderDecoder) -> None:
    """Raises UserError where a model's files do not say how texts begin, or describe what it learnt in other types."""
    write = "write checkpoint=FOLDER of a run, or of a model after model.set_special_tokens(start, end, pad)"
    start, generation = getattr(model.config, "decoder_start_token_id", None), model.generation_config
    if {start, generation.decoder_start_token_id, generation.bos_token_id} == {None}:
        raise UserError("checkpoint", name, "its config.json names no decoder_start_token_id", write)
    for each in ("tags", "training_normalizer"):
        if not isinstance(value := getattr(model.config, each, None), dict | None):
            raise UserError("checkpoint", name, f"its config.json has {each}={value!r}, which is no object", write)
    if not is_prompt(prompt := prompt_of(model.config.decoder), model.decoder.config.vocab_size):
        wrong = f"its config.json has audio_prompt={str(prompt)[:80]}, which is no two lists of its token ids"
        raise UserError("checkpoint", name, wrong, write)


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
    own_start = config._name_or_path or is_prefixed(config)
    if own_start and getattr(config, "decoder_start_token_id", None) is not None:
        start = config.decoder_start_token_id
    between = adapter(frame_width(encoder.config), config.hidden_size)
    model = SpeechEncoderDecoder(encoder=encoder, decoder=decoder, adapter=between)
    model.set_special_tokens(start, end, pad)
    model.train()  # from_pretrained gives evaluation mode, which Lightning keeps: dropout would never act
    return SavedModel(model, tokenizer, feature_extractor_of(encoder))
