"""The model: `transformers.SpeechEncoderDecoderModel` without its faults (docs/faults.md).

B batch, S samples, T frames, E encoder width, D decoder width, U target tokens, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSpeechSeq2Seq,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SpeechEncoderDecoderConfig,
)
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES as KNOWN_TO_PIPELINES

from sedtrain.batch import IGNORE_INDEX
from sedtrain.models.adapter import AdaptedSpeechEncoderDecoderConfig, Adapter, adapted_config, saved_adapter
from sedtrain.models.ctc_head import load_ctc_head, save_ctc_head
from sedtrain.models.decoder import (
    as_decoder,
    decoder_from_pretrained,
    decoder_positions,
    max_tokens,
    new_decoder,
    refuse_longer,
    settle_config,
)
from sedtrain.models.encoder import (
    EncodedSpeech,
    encoder_from_config,
    encoder_from_pretrained,
    frame_mask,
    frame_width,
    freeze_front_end,
    given_input,
    seq2seq_output,
    standalone,
    states_to_return,
)
from sedtrain.models.flax_weights import pretrained
from sedtrain.models.foreign import HUB_OPTIONS
from sedtrain.models.loading import configured, joint_config, refuse_unsupported, share_config
from sedtrain.models.losses import decoder_inputs
from sedtrain.models.masking import Masked, on_device, with_zero_gradients
from sedtrain.models.other_kinds import refuse_other_kind
from sedtrain.models.output_layer import deferred_output_layer, make_deferrable, mean_loss
from sedtrain.models.prefix import arguments_of, is_prefixed, num_in_front, refuse_long_row
from sedtrain.models.speech_to_text_2 import settle_published
from sedtrain.models.unread_masks import one_text_a_row


class SpeechEncoderDecoder(transformers.SpeechEncoderDecoderModel):
    """A speech encoder joined to a text decoder; everything written against the base class works.

    adapter: stands between them; if it is None, a linear projection does where their widths differ
    max_tokens: as many tokens have a position in the decoder, those of a prefix included; None: any number
    ctc_head: (E -> V) scores of the encoder's frames, if `config.ctc_vocab_size` is set; saved in a file of its own,
        which `transformers` does not look at
    """

    _supports_flex_attn = True
    _keys_to_ignore_on_load_missing: ClassVar[list[str]] = [r"^ctc_head\."]

    def __init__(
        self,
        config: SpeechEncoderDecoderConfig | None = None,
        encoder: PreTrainedModel | None = None,
        decoder: PreTrainedModel | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        if encoder is not None:
            encoder = standalone(encoder)
        elif config is not None:
            encoder = encoder_from_config(config.encoder)
        if decoder is not None:
            decoder = as_decoder(decoder)
        elif config is not None:
            decoder = new_decoder(config.decoder)
        if config is None and encoder is not None and decoder is not None:
            config = joint_config(encoder, decoder)
        if config is not None and encoder is not None:
            settle_config(config.decoder)
            if decoder is not None:
                settle_config(decoder.config)  # joint_config gave it cross-attention, which a prefix does without
            if config.encoder.model_type != encoder.config.model_type:
                config.encoder = encoder.config  # it was that of a whole sequence-to-sequence model
            if adapter is not None or is_prefixed(config.decoder):
                config = adapted_config(config, adapter)
        super().__init__(config, encoder, decoder)
        self.settle_widths(adapter)
        share_config(self.encoder, self.config.encoder)
        share_config(self.decoder, self.config.decoder)
        make_deferrable(self.decoder)
        self.max_tokens = self.room_for_text = max_tokens(self.decoder)
        self.drops_layers = any(getattr(module, "layerdrop", 0) for module in self.decoder.modules())
        self.ctc_head: nn.Linear | None = None
        if vocab_size := getattr(self.config, "ctc_vocab_size", None):
            self.add_ctc_head(vocab_size)

    def settle_widths(self, adapter: Adapter | None) -> None:
        """Sets the adapter, or a projection of the right width: the base class decides on one and builds another."""
        self.encoder_output_dim = frame_width(self.config.encoder)
        if hasattr(self.config.encoder, "output_hidden_size"):
            self.config.encoder.output_hidden_size = self.encoder_output_dim  # by which stock transformers decides
        widths = self.encoder_output_dim, self.config.decoder.hidden_size
        saved = getattr(self.config, "adapter", None)
        if adapter is None and saved:
            adapter = saved_adapter(saved["kind"], *widths, saved["settings"])
        self.adapter = adapter
        projection: Any = self._modules.pop("enc_to_dec_proj", None)
        if widths[0] != widths[1] and adapter is None:
            fits = projection is not None and projection.in_features == widths[0]
            linear = projection if fits else nn.Linear(*widths)
            self.enc_to_dec_proj = linear.to(self.decoder.dtype) if self.encoder.dtype == self.decoder.dtype else linear

    def add_ctc_head(self, vocab_size: int) -> nn.Linear:
        """Gives the encoder's frames a linear layer to `vocab_size` scores, which is saved with the model."""
        self.config.ctc_vocab_size = vocab_size
        self.ctc_head = nn.Linear(self.encoder_output_dim, vocab_size, device=self.device, dtype=self.dtype)
        return self.ctc_head

    # --- forward

    def encode(self, inputs: Tensor, attention_mask: Tensor | None = None, **options: Any) -> EncodedSpeech:
        """(B, S) audio, or features, and their mask, 1 where an input is real -> what the decoder attends to."""
        mask = attention_mask if isinstance(self.encoder, Masked) else on_device(attention_mask, inputs.device)
        return self.adapt(self.encoder(inputs, attention_mask=mask, return_dict=True, **options), mask)

    def adapt(self, encoded: Mapping[str, Any], attention_mask: Tensor | None) -> EncodedSpeech:
        """The encoder's output, projected or not, and the mask of its input -> what the decoder attends to."""
        frames: Tensor = encoded["last_hidden_state"]
        mask = None if attention_mask is None else frame_mask(self.encoder, frames.shape[1], attention_mask)
        hidden_states, hidden_mask = frames, on_device(mask, frames.device)
        if self.adapter is not None:
            hidden_states, hidden_mask = self.adapter(frames, hidden_mask)
        elif (projection := self._modules.get("enc_to_dec_proj")) and frames.shape[-1] == projection.in_features:
            hidden_states = projection(frames)
        return EncodedSpeech(
            last_hidden_state=hidden_states,
            hidden_states=encoded.get("hidden_states"),
            attentions=encoded.get("attentions"),
            attention_mask=hidden_mask,
            encoder_frames=frames,
            encoder_mask=mask,
        )

    def as_encoded(
        self, encoder_outputs: BaseModelOutput | tuple[Tensor, ...], attention_mask: Tensor | None
    ) -> EncodedSpeech:
        """The `encoder_outputs` of a caller as EncodedSpeech."""
        if isinstance(encoder_outputs, EncodedSpeech):
            return encoder_outputs
        if isinstance(encoder_outputs, tuple):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        return self.adapt(encoder_outputs, attention_mask)

    def forward(
        self,
        inputs: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: transformers.Cache | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        return_dict: bool | None = None,
        *,
        label_smoothing: float = 0.0,
        output_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput | tuple[Any, ...]:
        """The base class's arguments and outputs, and three more arguments.

        label_smoothing: of the loss
        output_logits: whether (B, U, V) logits are returned; None: unless the model trains on labels
        num_items_in_batch: divides the summed loss, instead of the number of target tokens
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        states = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        states = {name: value for name, value in states.items() if value is not None}
        for_decoder = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("decoder_")}
        if encoder_outputs is None:
            encoded = self.encode(given_input(inputs, input_values, input_features), attention_mask, **states, **kwargs)
        else:
            encoded = self.as_encoded(encoder_outputs, attention_mask)
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            device = encoded.last_hidden_state.device
            decoder_input_ids = on_device(self.prepare_decoder_input_ids_from_labels(labels), device)
            if is_prefixed(self.config.decoder) and decoder_attention_mask is None and labels is not None:
                decoder_attention_mask = on_device((labels != IGNORE_INDEX).long(), device)  # padding takes no position
        if output_logits is None:
            output_logits = labels is None or not self.training or not return_dict
        with deferred_output_layer(self.decoder, deferred=not output_logits) as output_layer:
            decoded = self.decode(
                encoded,
                input_ids=decoder_input_ids,
                inputs_embeds=decoder_inputs_embeds,
                attention_mask=decoder_attention_mask,
                past_key_values=past_key_values,
                use_cache=use_cache if labels is None else bool(use_cache),
                **{**states, **{name.removeprefix("decoder_"): value for name, value in for_decoder.items()}},
            )
        loss = plain = None
        if labels is not None:
            logits = with_zero_gradients(decoded.logits, self.possibly_unused())
            loss, plain = mean_loss(logits, output_layer, labels, label_smoothing, num_items_in_batch)
        losses = loss, plain if label_smoothing else None
        output = seq2seq_output(losses, decoded, encoded, output_layer is None, self.adapter is not None)
        return output if return_dict else output.to_tuple()

    def room(self, encoded: EncodedSpeech) -> int | None:
        """Positions that the decoder has for a text; None: any number."""
        frames = encoded.last_hidden_state.shape[1]
        return None if self.max_tokens is None else self.max_tokens - num_in_front(self.config.decoder, frames)

    @one_text_a_row
    def decode(self, encoded: EncodedSpeech, **inputs: Any) -> Any:
        """The decoder's output for encoded speech; `inputs` are arguments of the decoder."""
        tokens = inputs["input_ids"] if inputs["inputs_embeds"] is None else inputs["inputs_embeds"]
        if is_prefixed(self.config.decoder):
            refuse_long_row(self.config.decoder, self.max_tokens, encoded, tokens, inputs["attention_mask"])
        else:
            refuse_longer(tokens, self.max_tokens)
        past_length = 0 if (cache := inputs["past_key_values"]) is None else cache.get_seq_length()
        positions = decoder_positions(self.decoder, tokens, past_length, inputs["attention_mask"])
        return self.decoder(
            encoder_hidden_states=encoded.last_hidden_state.contiguous(),  # some decoders view it
            encoder_attention_mask=encoded.attention_mask,
            return_dict=True,
            **{**positions, **inputs},
        )

    def possibly_unused(self) -> list[nn.Parameter]:
        """The parameters that a training step may leave without a gradient, which DDP does not allow."""
        if not (self.training and torch.is_grad_enabled()):
            return []
        module: nn.Module | None = self if self.drops_layers else self.ctc_head
        return [] if module is None else [weight for weight in module.parameters() if weight.requires_grad]

    # --- generation

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The base class's `generate`; encoder, adapter and frame mask run once per utterance, not once per token."""
        source, encoder_outputs = None, kwargs.get("encoder_outputs")
        if encoder_outputs is None:
            source = given_input(inputs, kwargs.pop("input_values", None), kwargs.pop("input_features", None))
            given = args[0] if args else kwargs.get("generation_config")
            states = states_to_return(kwargs, vars(given or GenerationConfig()), vars(self.generation_config))
            encoded = self.encode(source, kwargs.get("attention_mask"), **states)
        else:
            encoded = self.as_encoded(encoder_outputs, kwargs.get("attention_mask"))
        self.room_for_text = self.room(encoded)
        # without the encoder's own frames, which beams would copy
        kwargs["encoder_outputs"] = replace(encoded, encoder_frames=None, encoder_mask=None)
        self.settle_generation_config()
        return super().generate(source, *args, **kwargs)  # an assistant model needs the source

    def settle_generation_config(self) -> None:
        """Moves what `config` says of generation, and copies its special tokens: training and generation start with one."""
        generation = self.generation_config
        for name, value in self.config._get_generation_parameters().items():  # such as max_length
            setattr(generation, name, value)
            delattr(self.config, name)
        for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
            token, known = getattr(self.config, name, None), getattr(generation, name)
            if token is not None and not (isinstance(known, list) and token in known):  # several may end a text
                setattr(generation, name, token)
        if "past_key_values" not in arguments_of(type(self.decoder).forward):
            generation.use_cache = False

    def _prepare_generated_length(self, *args: Any, **kwargs: Any) -> GenerationConfig:
        """The base class's, which ends no text at the last position of the decoder."""
        generation: GenerationConfig = super()._prepare_generated_length(*args, **kwargs)
        if self.room_for_text is not None:  # the last token is written, not read
            generation.max_length = min(generation.max_length, self.room_for_text + 1)
        return generation

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor | None) -> Tensor:
        """(B, U) labels -> (B, U) decoder inputs; raises ValueError without labels or special tokens."""
        if labels is None:
            raise ValueError(
                "give labels, decoder_input_ids or decoder_inputs_embeds; a trainer with label_smoothing_factor withholds "
                "labels: let the collator add decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels)"
            )
        return decoder_inputs(labels, self.config)

    def set_special_tokens(self, start: int, end: int, pad: int) -> None:
        """Sets the ids for training and for generation: a difference between them would stay silent."""
        for config in (self.config, self.generation_config):
            config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = start, end, pad
        self.generation_config.bos_token_id = start

    # --- changes

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any) -> None:
        """For encoder and decoder, or {"encoder": ..., "decoder": ...}. Raises UserError for what a family lacks."""
        refuse_unsupported(self.config, attn_implementation)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def freeze_feature_encoder(self) -> None:
        """Stops the gradient of everything before the encoder's first layer, for every family."""
        freeze_front_end(self.encoder)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resizes the decoder's vocabulary, input and output, and that of the CTC head if it is the same."""
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
        """The base class's; the CTC head goes into a file of its own."""
        self.settle_generation_config()
        weights = self.state_dict() if state_dict is None else state_dict
        others = {name: weight for name, weight in weights.items() if not name.startswith("ctc_head.")}
        repo_id = kwargs.pop("repo_id", Path(save_directory).name) if kwargs.pop("push_to_hub", False) else None
        super().save_pretrained(save_directory, state_dict=others, **kwargs)
        if kwargs.get("is_main_process", True):
            save_ctc_head(self, Path(save_directory), weights)
        if repo_id is not None:  # not before the CTC head is written
            self.push_to_hub(repo_id, token=kwargs.get("token"))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """The base class's, also for models with an adapter or a CTC head; `from_flax=True` takes weights of Flax first."""
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
            model.encoder.set_up()  # loading unfreezes what no forward uses
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
        """The base class's. It takes the encoder of a whole checkpoint; `dtype` and `attn_implementation` reach both parts."""
        for name in {"dtype", "attn_implementation"} & kwargs.keys():
            kwargs = {f"encoder_{name}": kwargs[name], f"decoder_{name}": kwargs[name], **kwargs}
        kwargs.pop("dtype", None)  # the joined configuration reads that of its parts
        sources = {"encoder": encoder_pretrained_model_name_or_path, "decoder": decoder_pretrained_model_name_or_path}
        for part, load in (("encoder", encoder_from_pretrained), ("decoder", decoder_from_pretrained)):
            if f"{part}_model" not in kwargs and (source := sources[part]) is not None:
                names = [name.removeprefix(f"{part}_") for name in kwargs if name.startswith(f"{part}_")]
                kwargs[f"{part}_model"] = load(source, **{name: kwargs.pop(f"{part}_{name}") for name in names})
        model: Self = super().from_encoder_decoder_pretrained(*sources.values(), *model_args, **kwargs).eval()
        return model


class AdaptedSpeechEncoderDecoder(SpeechEncoderDecoder):
    """The name under which AutoModelForSpeechSeq2Seq finds models with an adapter."""

    config: AdaptedSpeechEncoderDecoderConfig


KNOWN_TO_PIPELINES |= {
    "speech-encoder-decoder of sedtrain": "SpeechEncoderDecoder",
    AdaptedSpeechEncoderDecoderConfig.model_type: "AdaptedSpeechEncoderDecoder",
}
AutoConfig.register(AdaptedSpeechEncoderDecoderConfig.model_type, AdaptedSpeechEncoderDecoderConfig)
AutoModelForSpeechSeq2Seq.register(AdaptedSpeechEncoderDecoderConfig, AdaptedSpeechEncoderDecoder)
