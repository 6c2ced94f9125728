"""The model: `transformers.SpeechEncoderDecoderModel` without its faults (docs/faults.md).

B batch, S samples, U target tokens.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES as KNOWN_TO_PIPELINES
from transformers.utils import cached_file

from sedtrain.models.adapter import AdaptedSpeechEncoderDecoderConfig
from sedtrain.models.attention import refuse_unsupported
from sedtrain.models.decoder import decoder_from_pretrained
from sedtrain.models.encoder import encoder_from_pretrained, freeze_front_end
from sedtrain.models.family_settings import configured
from sedtrain.models.foreign import HUB_OPTIONS
from sedtrain.models.joined import JoinedModel, given_input
from sedtrain.models.loading import pretrained
from sedtrain.models.masking import Masked
from sedtrain.models.other_kinds import refuse_other_kind
from sedtrain.models.output_layer import make_deferrable
from sedtrain.models.prefix import arguments_of
from sedtrain.models.speech_to_text_2 import settle_published

CTC_FILE = "ctc_head.safetensors"


class SpeechEncoderDecoder(JoinedModel):
    """A speech encoder joined to a text decoder, as a drop-in replacement for the base class of `transformers`."""

    # --- generation

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The base class's `generate`, with encoder, adapter and frame mask computed once per utterance, not per token.

        All texts of a batch end at the last position that the text of its longest audio has.
        """
        source, encoder_outputs = None, kwargs.get("encoder_outputs")
        if encoder_outputs is None:
            source = given_input(inputs, kwargs.pop("input_values", None), kwargs.pop("input_features", None))
            given = args[0] if args else kwargs.get("generation_config")
            states = states_to_return(kwargs, vars(given or GenerationConfig()), vars(self.generation_config))
            encoded = self.encode(source, kwargs.get("attention_mask"), **states)
        else:
            encoded = self.as_encoded(encoder_outputs, kwargs.get("attention_mask"))
        self.room_for_text = min(self.rooms(encoded) or [], default=None)
        # beams would copy the encoder's own frames too
        kwargs["encoder_outputs"] = replace(encoded, encoder_frames=None, encoder_mask=None)
        self.settle_generation_config()
        return super().generate(source, *args, **kwargs)  # an assistant model encodes the source itself

    def settle_generation_config(self) -> None:
        """Moves generation settings out of `config`, and copies its special tokens, so that training and generation agree."""
        generation = self.generation_config
        for name, value in self.config._get_generation_parameters().items():  # such as max_length
            setattr(generation, name, value)
            delattr(self.config, name)
        for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
            token, known = getattr(self.config, name, None), getattr(generation, name)
            if token is not None and not (
                isinstance(known, list) and token in known
            ):  # a text may have several end tokens
                setattr(generation, name, token)
        if "past_key_values" not in arguments_of(type(self.decoder).forward):
            generation.use_cache = False

    def _prepare_generated_length(self, *args: Any, **kwargs: Any) -> GenerationConfig:
        """Also limits a text to the decoder's positions, which the base class does not."""
        generation: GenerationConfig = super()._prepare_generated_length(*args, **kwargs)
        if self.room_for_text is not None:  # the last token is never read, so it needs no position
            generation.max_length = min(generation.max_length, self.room_for_text + 1)
        return generation

    def set_special_tokens(self, start: int, end: int, pad: int) -> None:
        """Sets the ids for training and for generation; nothing would report a difference between them."""
        for config in (self.config, self.generation_config):
            config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = start, end, pad
        self.generation_config.bos_token_id = start

    # --- changes

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any) -> None:
        """Sets one for both parts, or {"encoder": ..., "decoder": ...}. Raises UserError for one that a family lacks."""
        refuse_unsupported(self.config, attn_implementation)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def freeze_feature_encoder(self) -> None:
        """Freezes everything before the encoder's first layer, in every family."""
        freeze_front_end(self.encoder)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resizes the decoder's input and output vocabulary, and that of a CTC head of the same size."""
        old_num_tokens = self.decoder.config.vocab_size
        embeddings: nn.Embedding = self.decoder.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if hasattr(self.decoder.config, "decoder_vocab_size"):
            self.decoder.config.decoder_vocab_size = self.decoder.config.vocab_size
        make_deferrable(self.decoder)
        if (old := self.ctc_head) is not None and old.out_features == old_num_tokens:
            new = self.add_ctc_head(self.decoder.config.vocab_size)
            kept = min(old.out_features, new.out_features)
            new.weight.data[:kept], new.bias.data[:kept] = old.weight.data[:kept], old.bias.data[:kept]
        return embeddings

    # --- files

    def save_pretrained(
        self, save_directory: str | Path, *, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Saves as the base class does, with the CTC head in a file of its own."""
        self.settle_generation_config()
        weights = self.state_dict() if state_dict is None else state_dict
        without_head = {name: weight for name, weight in weights.items() if not name.startswith("ctc_head.")}
        repo_id = kwargs.pop("repo_id", Path(save_directory).name) if kwargs.pop("push_to_hub", False) else None
        super().save_pretrained(save_directory, state_dict=without_head, **kwargs)
        if kwargs.get("is_main_process", True):
            save_ctc_head(self, Path(save_directory), weights)
        if repo_id is not None:  # only now is the CTC head written
            self.push_to_hub(repo_id, token=kwargs.get("token"))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads as the base class does, including adapter and CTC head; `from_flax=True` prefers Flax weights."""
        hub_options = {name: kwargs[name] for name in HUB_OPTIONS & kwargs.keys()}
        if not isinstance(kwargs.get("config"), PreTrainedConfig):
            config, kwargs = configured(kwargs.pop("config", None) or pretrained_model_name_or_path, kwargs)
            kwargs["config"] = config
        refuse_other_kind(str(pretrained_model_name_or_path), kwargs["config"])
        refuse_unsupported(kwargs["config"], kwargs.get("attn_implementation"))
        loaded = pretrained(super(), pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        settle_published(model)
        if isinstance(model.encoder, Masked):
            model.encoder.set_up()  # loading has unfrozen parameters that no forward uses
        load_ctc_head(model, pretrained_model_name_or_path, **hub_options)
        return loaded

    @classmethod
    def from_encoder_decoder_pretrained(
        cls,
        encoder_pretrained_model_name_or_path: str | None = None,
        decoder_pretrained_model_name_or_path: str | None = None,
        *model_args: Any,
        **kwargs: Any,
    ) -> Self:
        """Joins two checkpoints, each of a part or of a whole model; `dtype` and `attn_implementation` apply to both."""
        for name in {"dtype", "attn_implementation"} & kwargs.keys():
            kwargs = {f"encoder_{name}": kwargs[name], f"decoder_{name}": kwargs[name], **kwargs}
        kwargs.pop("dtype", None)  # the joined configuration takes it from the parts
        sources = {"encoder": encoder_pretrained_model_name_or_path, "decoder": decoder_pretrained_model_name_or_path}
        for part, load in (("encoder", encoder_from_pretrained), ("decoder", decoder_from_pretrained)):
            if f"{part}_model" not in kwargs and (source := sources[part]) is not None:
                names = [name.removeprefix(f"{part}_") for name in kwargs if name.startswith(f"{part}_")]
                kwargs[f"{part}_model"] = load(source, **{name: kwargs.pop(f"{part}_{name}") for name in names})
        model: Self = super().from_encoder_decoder_pretrained(*sources.values(), *model_args, **kwargs).eval()
        return model


class AdaptedSpeechEncoderDecoder(SpeechEncoderDecoder):
    """The class that AutoModelForSpeechSeq2Seq loads a model with an adapter or a prefix as."""

    config: AdaptedSpeechEncoderDecoderConfig


def states_to_return(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """Encoder states that `generate` returns, by the first source with a value."""
    names = ("output_attentions", "output_hidden_states")
    return {name: next((source[name] for source in sources if source.get(name) is not None), None) for name in names}


def save_ctc_head(model: Any, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes the CTC head in `weights`, if the model has one."""
    if model.ctc_head is not None:
        head = {name: weights[f"ctc_head.{name}"].contiguous() for name in model.ctc_head.state_dict()}
        save_file(head, folder / CTC_FILE)


def load_ctc_head(model: Any, name: Any, **hub_options: Any) -> None:
    """Reads the CTC head from the folder or Hub id `name`, if the model has one."""
    if model.ctc_head is not None:
        model.ctc_head.load_state_dict(load_file(cached_file(name, CTC_FILE, **hub_options)))


KNOWN_TO_PIPELINES |= {
    "speech-encoder-decoder of sedtrain": "SpeechEncoderDecoder",
    AdaptedSpeechEncoderDecoderConfig.model_type: "AdaptedSpeechEncoderDecoder",
}
AutoConfig.register(AdaptedSpeechEncoderDecoderConfig.model_type, AdaptedSpeechEncoderDecoderConfig)
AutoModelForSpeechSeq2Seq.register(AdaptedSpeechEncoderDecoderConfig, AdaptedSpeechEncoderDecoder)
