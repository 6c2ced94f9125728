"""A model with its tokenizer and feature extractor: joined, loaded and saved as a Hugging Face folder."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf, isfinite
from pathlib import Path
from typing import Any, TypeGuard

import torch
from transformers import (
    PROCESSOR_MAPPING,
    AutoFeatureExtractor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SequenceFeatureExtractor,
    Wav2Vec2Processor,
)

from sedtrain.errors import UserError
from sedtrain.models.adapter import AdaptedSpeechEncoderDecoderConfig, Adapter
from sedtrain.models.attention import building_with
from sedtrain.models.encoder import frame_width, loads_in_stock_transformers, with_spec_augment
from sedtrain.models.family_settings import configured, feature_extractor_of, load_config
from sedtrain.models.loading import check_loaded, load_tokenizer, loading
from sedtrain.models.lora import FOLDER, base_weights, load_adapter, lora_layers, save_adapter
from sedtrain.models.other_kinds import refuse_other_kind
from sedtrain.models.positions import most_new_tokens
from sedtrain.models.prefix import is_prefixed, is_prompt, prompt_of
from sedtrain.models.prompts import fault_of_prompt, whole_prompt
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.models.whole import WholeSpeechModel, is_whole
from sedtrain.run_dir import model_of
from sedtrain.text.tags import Tags, WholePrompt, add_tags
from sedtrain.text.tokenizers import start_end_pad

MOST_TOKENS = 200
"""Limit on the tokens of a text if nothing is known of its audio."""
MORE_THAN_MEAN, SPARE_TOKENS = 4, 16
MOST_RATE, MOST_SECONDS = 1e4, 1e6
"""Largest values that are believed in a model's files: tokens a second, and seconds."""


def is_within(value: object, most: float) -> TypeGuard[float]:
    """True for a number from 0 to `most`; a stranger's file may hold anything."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most


def most_tokens(config: PreTrainedConfig, seconds: float) -> int:
    """Limit on the tokens of a text for audio of this length: a multiple of the mean rate of training texts."""
    rate = getattr(config, "tokens_per_second", None)
    if not is_within(rate, MOST_RATE) or not isfinite(seconds):
        most = getattr(config, "max_text_tokens", None)  # whole speech models have it
        return int(most) if most and is_within(most, MOST_RATE) else MOST_TOKENS
    return SPARE_TOKENS + ceil(MORE_THAN_MEAN * rate * seconds)


@dataclass(frozen=True)
class SavedModel:
    """A model with its tokenizer and feature extractor."""

    model: SpeechEncoderDecoder
    tokenizer: PreTrainedTokenizerBase
    feature_extractor: SequenceFeatureExtractor

    @property
    def training_normalizer(self) -> Mapping[str, str] | None:
        """Name and version of the normalizer of its training texts; None if its folder does not say."""
        label: Mapping[str, str] | None = getattr(self.model.config, "training_normalizer", None)
        return label

    @property
    def max_training_seconds(self) -> float:
        """Length of its longest training utterance; infinite if its folder does not say."""
        seconds = getattr(self.model.config, "max_training_seconds", None)
        return float(seconds) if is_within(seconds, MOST_SECONDS) else inf

    @property
    def is_whisper(self) -> bool:
        """True for a whole Whisper model, which reads 30 s whatever the length of the audio."""
        return isinstance(self.model, WholeSpeechModel) and self.model.is_whisper

    @property
    def tags(self) -> Tags | WholePrompt | None:
        """The tokens that select a language and a task; None for a model of one language and task."""
        if isinstance(self.model, WholeSpeechModel):
            kind = self.model.stock_config.model_type
            if prompt := whole_prompt(kind, self.tokenizer, self.model.generation_config):
                return prompt
        ids: Mapping[str, Mapping[str, Sequence[int]]] | None = getattr(self.model.config, "tags", None)
        return Tags(ids) if ids else None

    @property
    def num_tags(self) -> int:
        return 0 if self.tags is None else self.tags.number

    @property
    def max_seconds(self) -> float:
        """Longest audio that fits: two feature frames for each of Whisper's positions, or the extractor's limit for a clip."""
        extractor: Any = self.feature_extractor
        if self.model.config.encoder.model_type != "whisper-encoder":
            return float(getattr(extractor, "max_audio_clip_s", inf))
        return float(
            2 * self.model.config.encoder.max_source_positions * extractor.hop_length / extractor.sampling_rate
        )

    @property
    def is_stock(self) -> bool:
        """True for a model that the stock joined class of `transformers` loads."""
        config = self.model.config
        adapted = isinstance(config, AdaptedSpeechEncoderDecoderConfig) or isinstance(self.model, WholeSpeechModel)
        return not adapted and all(map(loads_in_stock_transformers, (config.encoder, config.decoder)))

    def learn_tags(self, pairs: Collection[tuple[str | None, str]]) -> None:
        """Adds a token for each language and each task in `pairs` to tokenizer and model.

        A whole model keeps its own tokens. A single pair becomes its default; Whisper's default also holds in `transformers`.
        """
        if isinstance(prompt := self.tags, WholePrompt):
            for language, task in pairs:
                prompt.of(language, task)
            if prompt.ids and len(pairs) == 1:
                generation = self.model.generation_config
                generation.language, generation.task = language or prompt.language, task
            return
        tags = add_tags(self.tokenizer, pairs)
        if len(self.tokenizer) > self.model.decoder.config.vocab_size:
            self.model.resize_token_embeddings(len(self.tokenizer))
        self.model.config.tags = tags.ids

    def save(self, folder: Path, generation: Mapping[str, Any]) -> None:
        """Writes a Hugging Face folder; `generation` overwrites values of its generation config."""
        values, wanted = dict(generation), generation.get("max_new_tokens")
        if wanted is None and isinstance(self.model, WholeSpeechModel):
            values.pop("max_new_tokens", None)  # the checkpoint has its own limit
        else:  # transformers itself does not stop at the last position
            wanted = wanted or most_tokens(self.model.config, self.max_training_seconds)
            values["max_new_tokens"] = most_new_tokens(wanted, self.model.max_tokens, 1 + self.num_tags)
        for name, value in values.items():
            setattr(self.model.generation_config, name, value)
        if lora_layers(self.model):
            self.model.save_pretrained(folder, state_dict=base_weights(self.model))
            save_adapter(self.model, folder / FOLDER)
        else:
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.feature_extractor.save_pretrained(folder)
        processor_class(self.model)(self.feature_extractor, self.tokenizer).save_pretrained(folder)


def processor_class(model: SpeechEncoderDecoder) -> Any:
    """The class that AutoProcessor loads feature extractor and tokenizer with; wav2vec 2.0's takes any two."""
    if isinstance(model, WholeSpeechModel):
        return PROCESSOR_MAPPING.get(type(model.stock_config), None) or Wav2Vec2Processor
    return Wav2Vec2Processor


def load(checkpoint: str | Path) -> SavedModel:
    """A trained model with its tokenizer and feature extractor, on the CPU, in float32 and evaluation mode.

    checkpoint: the folder of a run (loads its `model`), a Hugging Face folder, or a Hub id
    Raises UserError for anything else.
    """
    name = model_of(str(checkpoint))
    with loading("checkpoint", name):
        config, _ = configured(name, {})
    return loaded_as(WholeSpeechModel if is_whole(config) else SpeechEncoderDecoder, name)


def to_finetune(checkpoint: str, options: Mapping[str, Any], attention: str | None) -> SavedModel:
    """A whole speech model in training mode; options: values of its configuration. Raises UserError for any other model."""
    name = model_of(checkpoint)
    with loading("checkpoint", name):
        config, _ = configured(name, {})
    if not is_whole(config):
        refuse_other_kind(name, config)
        write = "write resume=RUN with the options of that run to train its model further"
        raise UserError("checkpoint", checkpoint, "this is a joined model of encoder and decoder", write)
    if "mask_time_prob" in options:
        with_spec_augment(config.model_type, options)  # refuses an encoder without SpecAugment
    config = load_config("encoder", name, config.model_type, {}, **options)
    chosen = {} if attention is None else {"attn_implementation": attention}
    with building_with("encoder", config, chosen):
        saved = loaded_as(WholeSpeechModel, name, **options, **chosen)
    saved.model.train()
    return saved


def loaded_as(kind: type[SpeechEncoderDecoder], name: str, **options: Any) -> SavedModel:
    """The model in folder or Hub id `name` as this class, with tokenizer and feature extractor."""
    options |= {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with loading("checkpoint", name):
        model, report = kind.from_pretrained(name, trust_remote_code=False, **options)
        feature_extractor = AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False)
    check_loaded("checkpoint", name, model, report, used=model, is_trained=True)
    with loading("checkpoint", name):
        load_adapter(model, name)
    refuse_misdescribed(name, model)
    return SavedModel(model.eval(), load_tokenizer("checkpoint", name), feature_extractor)


def refuse_misdescribed(name: str, model: SpeechEncoderDecoder) -> None:
    """Raises UserError if a model's files name no start token, or hold values of wrong types."""
    write = "write checkpoint=FOLDER of a run, or of a model after model.set_special_tokens(start, end, pad)"
    start, generation = getattr(model.config, "decoder_start_token_id", None), model.generation_config
    starts = [start, generation.decoder_start_token_id, generation.bos_token_id]
    starts = [token for token in starts if token is not None]
    if not starts:
        raise UserError("checkpoint", name, "its config.json names no decoder_start_token_id", write)
    if wrong_types := [token for token in starts if type(token) is not int]:
        wrong = f"its files name {str(wrong_types[0])[:80]!r} as the token that starts a text"
        raise UserError("checkpoint", name, wrong, write)
    for key in ("tags", "training_normalizer"):
        if not isinstance(value := getattr(model.config, key, None), dict | None):
            raise UserError("checkpoint", name, f"its config.json has {key}={value!r}, which is no object", write)
    if isinstance(model, WholeSpeechModel) and (fault := fault_of_prompt(generation, model.decoder.config.vocab_size)):
        write = "write checkpoint=FOLDER with the generation_config.json of the published model"
        raise UserError("checkpoint", name, f"its generation_config.json has {fault}", write)
    if not is_prompt(prompt := prompt_of(model.config.decoder), model.decoder.config.vocab_size):
        wrong = f"its config.json has audio_prompt={str(prompt)[:80]}, where two lists of its token ids belong"
        raise UserError("checkpoint", name, wrong, write)


def join(
    encoder: PreTrainedModel,
    decoder: PreTrainedModel,
    adapter: Callable[[int, int], Adapter | None],
    tokenizer: PreTrainedTokenizerBase,
) -> SavedModel:
    """A new model in training mode. A text starts with the token of the decoder's pretraining, else with the tokenizer's.

    adapter: makes an adapter from the widths of encoder and decoder, or None
    Raises UserError if the tokenizer has more tokens than the decoder embeds, or the adapter refuses the widths.
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
    model.train()  # from_pretrained sets evaluation mode and Lightning keeps it: dropout would never act
    return SavedModel(model, tokenizer, feature_extractor_of(encoder))
