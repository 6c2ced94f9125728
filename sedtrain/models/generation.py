"""How the joined model generates: what does not change from token to token is computed once per utterance."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils import cached_file

from sedtrain.models.decoder import decoder_from_pretrained
from sedtrain.models.encoder import encoder_from_pretrained
from sedtrain.models.loading import HUB_OPTIONS, configured, refuse_unsupported
from sedtrain.models.masking import Masked


@dataclass
class EncodedSpeech(BaseModelOutput):
    """Audio as the decoder attends to it: computed once per utterance, and accepted back as `encoder_outputs`.

    last_hidden_state: (B, T', D) adapted to the decoder
    attention_mask: (B, T'), 1 where a frame is real, or None where all are
    encoder_frames, encoder_mask: (B, T, E) and (B, T), the encoder's own output
    """

    attention_mask: Tensor | None = None
    encoder_frames: Tensor | None = None
    encoder_mask: Tensor | None = None


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of the encoder, and those with the prefix `decoder_` without it."""
    for_decoder = {name for name in options if name.startswith("decoder_")}
    return (
        {name: value for name, value in options.items() if name not in for_decoder},
        {name.removeprefix("decoder_"): options[name] for name in for_decoder},
    )


def given_input(inputs: Tensor | None, input_values: Tensor | None, input_features: Tensor | None) -> Tensor:
    """`inputs`, else the one of `input_values` and `input_features` that is given."""
    given = [inputs] if inputs is not None else [each for each in (input_values, input_features) if each is not None]
    if len(given) != 1:
        raise ValueError(f"give one of inputs, input_values and input_features, not {len(given)} of them")
    return given[0]


def seq2seq_output(
    loss: Tensor | None, decoded: Mapping[str, Any], encoded: EncodedSpeech, with_logits: bool
) -> Seq2SeqLMOutput:
    return Seq2SeqLMOutput(
        loss=loss,
        logits=decoded["logits"] if with_logits else None,
        past_key_values=decoded.get("past_key_values"),
        decoder_hidden_states=decoded.get("hidden_states"),
        decoder_attentions=decoded.get("attentions"),
        cross_attentions=decoded.get("cross_attentions"),
        encoder_last_hidden_state=encoded.last_hidden_state,
        encoder_hidden_states=encoded.hidden_states,
        encoder_attentions=encoded.attentions,
    )


class GeneratesFromSpeech(transformers.SpeechEncoderDecoderModel):
    """The base class, whose `generate` encodes once and whose special tokens are those of training."""

    def encode(self, inputs: Tensor, attention_mask: Tensor | None = None, **options: Any) -> EncodedSpeech:
        raise NotImplementedError

    def accepted(
        self, encoder_outputs: BaseModelOutput | tuple[Tensor, ...], attention_mask: Tensor | None
    ) -> EncodedSpeech:
        raise NotImplementedError

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The base class's `generate`; encoder, adapter and frame mask run once per utterance, not once per token."""
        source = None
        if kwargs.get("encoder_outputs") is None:
            source = given_input(inputs, kwargs.pop("input_values", None), kwargs.pop("input_features", None))
            generation_config = args[0] if args else kwargs.get("generation_config")
            encoded = self.encode(source, kwargs.get("attention_mask"), **self.wanted_states(generation_config, kwargs))
        else:
            encoded = self.accepted(kwargs["encoder_outputs"], kwargs.get("attention_mask"))
        kwargs["encoder_outputs"] = EncodedSpeech(  # without the encoder's own frames, which beams would copy
            last_hidden_state=encoded.last_hidden_state,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            attention_mask=encoded.attention_mask,
        )
        self.settle_generation_config()
        return super().generate(source, *args, **kwargs)  # by which an assistant hears it too

    def wanted_states(self, generation_config: GenerationConfig | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """Which of the encoder's states `generate` is to return: said by keyword, else by the nearest configuration."""
        said = [options, vars(generation_config or GenerationConfig()), vars(self.generation_config)]
        names = ("output_attentions", "output_hidden_states")
        return {name: next((of[name] for of in said if of.get(name) is not None), None) for name in names}

    def settle_generation_config(self) -> None:
        """Generation starts with the token that training starts with, and is told what only `config` was told."""
        generation = self.generation_config
        for name, value in self.config._get_generation_parameters().items():  # such as max_length
            setattr(generation, name, value)
            delattr(self.config, name)
        for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
            token, known = getattr(self.config, name, None), getattr(generation, name)
            if token is not None and not (isinstance(known, list) and token in known):  # several may end a text
                setattr(generation, name, token)
        if "past_key_values" not in inspect.signature(self.decoder.forward).parameters:
            generation.use_cache = False


CTC_FILE = "ctc_head.safetensors"


class LoadsAndSaves(GeneratesFromSpeech):
    """The base class, which also keeps `ctc_head`, in a file of its own that `transformers` does not look at."""

    ctc_head: nn.Linear | None

    def save_pretrained(
        self, save_directory: str | Path, *, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """The base class's; the CTC head goes into a file that `transformers` does not look at."""
        self.settle_generation_config()
        weights = self.state_dict() if state_dict is None else state_dict
        rest = {name: weight for name, weight in weights.items() if not name.startswith("ctc_head.")}
        repo_id = kwargs.pop("repo_id", Path(save_directory).name) if kwargs.pop("push_to_hub", False) else None
        super().save_pretrained(save_directory, state_dict=rest, **kwargs)
        if self.ctc_head is not None and kwargs.get("is_main_process", True):
            head = {name: weights[f"ctc_head.{name}"].contiguous() for name in self.ctc_head.state_dict()}
            save_file(head, Path(save_directory) / CTC_FILE)
        if repo_id is not None:
            self.push_to_hub(repo_id, token=kwargs.get("token"))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """The base class's, for models with an adapter and a CTC head too."""
        places = {name: kwargs[name] for name in HUB_OPTIONS & kwargs.keys()}
        if isinstance(kwargs.get("config"), (str, Path)):
            kwargs["config"] = AutoConfig.from_pretrained(kwargs["config"])
        if kwargs.get("config") is None:
            config, rest = configured(pretrained_model_name_or_path, kwargs)
            kwargs = {**rest, "config": config}
        refuse_unsupported(kwargs["config"], kwargs.get("attn_implementation"))
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(model.encoder, Masked):
            model.encoder.set_up()  # freezes again what no forward uses
        if model.ctc_head is not None:
            model.ctc_head.load_state_dict(load_file(cached_file(pretrained_model_name_or_path, CTC_FILE, **places)))
        return loaded

    @classmethod
    def from_encoder_decoder_pretrained(
        cls,
        encoder_pretrained_model_name_or_path: str | None = None,
        decoder_pretrained_model_name_or_path: str | None = None,
        *model_args: Any,
        **kwargs: Any,
    ) -> Self:
        """The base class's; of a sequence-to-sequence checkpoint the encoder is taken, and `dtype` and
        `attn_implementation` without a prefix reach both parts."""
        for name in {"dtype", "attn_implementation"} & kwargs.keys():
            kwargs = {f"encoder_{name}": kwargs[name], f"decoder_{name}": kwargs[name], **kwargs}
        kwargs.pop("dtype", None)  # the joined configuration reads its parts'
        names = {"encoder": encoder_pretrained_model_name_or_path, "decoder": decoder_pretrained_model_name_or_path}
        for part, load in {"encoder": encoder_from_pretrained, "decoder": decoder_from_pretrained}.items():
            if f"{part}_model" not in kwargs and (source := names[part]) is not None:
                options = {key: kwargs.pop(key) for key in list(kwargs) if key.startswith(f"{part}_")}
                kwargs[f"{part}_model"] = load(
                    source, **{key.removeprefix(f"{part}_"): options[key] for key in options}
                )
        model: Self = super().from_encoder_decoder_pretrained(*names.values(), *model_args, **kwargs)
        model.eval()
        return model
