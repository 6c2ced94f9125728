"""Encoder, adapter and decoder as one module: how it is built, and its forward pass.

B batch, S samples, T frames, E encoder width, D decoder width, U target tokens, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, SpeechEncoderDecoderConfig
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from sedtrain.batch import IGNORE_INDEX
from sedtrain.models.adapter import Adapter, adapted_config, saved_adapter
from sedtrain.models.decoder import as_decoder, new_decoder, settle_config
from sedtrain.models.encoder import EncodedSpeech, encoder_from_config, frame_mask, frame_width, standalone
from sedtrain.models.loading import joint_config, share_config
from sedtrain.models.losses import decoder_inputs
from sedtrain.models.masking import Masked
from sedtrain.models.mixins import on_device, with_zero_gradients
from sedtrain.models.no_sync_masks import one_text_a_row
from sedtrain.models.output_layer import deferred_output_layer, make_deferrable, mean_loss
from sedtrain.models.positions import decoder_positions, max_tokens, refuse_longer
from sedtrain.models.prefix import is_prefixed, num_frames, num_in_front, refuse_long_row


class JoinedModel(transformers.SpeechEncoderDecoderModel):
    """A speech encoder joined to a text decoder; `SpeechEncoderDecoder` adds generation and files.

    adapter: between encoder and decoder; if None, a linear projection wherever their widths differ
    max_tokens: number of positions in the decoder, including a prefix; None for no limit
    ctc_head: (E -> V) scores of the encoder's frames, if `config.ctc_vocab_size` is set. It is saved in its own file, which
        `transformers` ignores
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
                settle_config(decoder.config)  # joint_config has added cross-attention, which a prefix does not use
            if config.encoder.model_type != encoder.config.model_type:
                config.encoder = encoder.config  # replaces that of a whole sequence-to-sequence model
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
        """Sets the adapter, or a projection of the right width; the base class may build one that does not fit the frames."""
        self.encoder_output_dim = frame_width(self.config.encoder)
        if hasattr(self.config.encoder, "output_hidden_size"):
            self.config.encoder.output_hidden_size = self.encoder_output_dim  # stock transformers compares this width
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
        """Adds a linear layer from the encoder's frames to `vocab_size` scores, which is saved with the model."""
        self.config.ctc_vocab_size = vocab_size
        self.ctc_head = nn.Linear(self.encoder_output_dim, vocab_size, device=self.device, dtype=self.dtype)
        return self.ctc_head

    # --- forward

    def encode(self, inputs: Tensor, attention_mask: Tensor | None = None, **options: Any) -> EncodedSpeech:
        """(B, S) audio, or features, and their mask (1 where an input is real) -> frames for the decoder."""
        mask = attention_mask if isinstance(self.encoder, Masked) else on_device(attention_mask, inputs.device)
        return self.adapt(self.encoder(inputs, attention_mask=mask, return_dict=True, **options), mask)

    def adapt(self, encoded: Mapping[str, Any], attention_mask: Tensor | None) -> EncodedSpeech:
        """The encoder's output, perhaps projected already, and the mask of its input -> frames for the decoder."""
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
        """Converts the `encoder_outputs` that a caller passed."""
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
        """The base class's forward, with three more arguments.

        label_smoothing: of the loss; the output then also has `cross_entropy`, the loss without it
        output_logits: True returns (B, U, V) logits; None does so unless the model trains on labels
        num_items_in_batch: divides the summed loss; None divides by the number of target tokens
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        wanted = ("output_attentions", output_attentions), ("output_hidden_states", output_hidden_states)
        states = {name: value for name, value in wanted if value is not None}
        for_decoder = [name for name in kwargs if name.startswith("decoder_")]
        decoder_options = {name.removeprefix("decoder_"): kwargs.pop(name) for name in for_decoder}
        if encoder_outputs is None:
            encoded = self.encode(given_input(inputs, input_values, input_features), attention_mask, **states, **kwargs)
        else:
            encoded = self.as_encoded(encoder_outputs, attention_mask)
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            from_labels = self.inputs_from_labels(labels, decoder_attention_mask, encoded.last_hidden_state.device)
            decoder_input_ids, decoder_attention_mask = from_labels
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
                **{**states, **decoder_options},
            )
        loss = plain = None
        if labels is not None:
            logits = with_zero_gradients(decoded.logits, self.possibly_unused())
            loss, plain = mean_loss(logits, output_layer, labels, label_smoothing, num_items_in_batch)
        results = {"loss": loss, "cross_entropy": plain if label_smoothing else None}
        output = self.output_of(encoded, decoded, logits=decoded["logits"] if output_layer is None else None, **results)
        return output if return_dict else output.to_tuple()

    def output_of(
        self, encoded: EncodedSpeech, decoded: Mapping[str, Any], **results: Tensor | None
    ) -> "SmoothedOutput":
        """The results with the states of encoder and decoder.

        `encoder_last_hidden_state` may be passed back as `encoder_outputs`. It is therefore not adapted: the adapter would
        run again on its own output; a projection would not.
        """
        unadapted = None if self.adapter is None else encoded.encoder_frames
        return SmoothedOutput(
            **results,
            past_key_values=decoded.get("past_key_values"),
            decoder_hidden_states=decoded.get("hidden_states"),
            decoder_attentions=decoded.get("attentions"),
            cross_attentions=decoded.get("cross_attentions"),
            encoder_last_hidden_state=encoded.last_hidden_state if unadapted is None else unadapted,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
        )

    def inputs_from_labels(
        self, labels: Tensor | None, mask: Tensor | None, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        """Decoder inputs and their mask. After a prefix, the mask leaves padding out, which has no position there."""
        inputs = on_device(self.prepare_decoder_input_ids_from_labels(labels), device)
        if mask is None and labels is not None and is_prefixed(self.config.decoder):
            mask = on_device((labels != IGNORE_INDEX).long(), device)
        return inputs, mask

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor | None) -> Tensor:
        """(B, U) labels -> (B, U) decoder inputs; raises ValueError without labels or special tokens."""
        if labels is None:
            raise ValueError(
                "give labels, decoder_input_ids or decoder_inputs_embeds; a trainer with label_smoothing_factor withholds "
                "labels: let the collator add decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels)"
            )
        return decoder_inputs(labels, self.config)

    def rooms(self, encoded: EncodedSpeech) -> list[int] | None:
        """Positions that the decoder has left for each of the B texts; None for no limit. Padding takes none."""
        if self.max_tokens is None:
            return None
        config = self.config.decoder
        frame_counts = num_frames(encoded) if is_prefixed(config) else [0] * len(encoded.last_hidden_state)
        return [self.max_tokens - num_in_front(config, number) for number in frame_counts]

    @one_text_a_row
    def decode(self, encoded: EncodedSpeech, **inputs: Any) -> Any:
        """Runs the decoder on encoded speech; `inputs` are arguments of the decoder's forward."""
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
        """Parameters that a training step may leave without a gradient, which DDP does not allow."""
        if not (self.training and torch.is_grad_enabled()):
            return []
        module: nn.Module | None = self if self.drops_layers else self.ctc_head
        return [] if module is None else [weight for weight in module.parameters() if weight.requires_grad]


@dataclass
class SmoothedOutput(Seq2SeqLMOutput):
    """The base class's output. cross_entropy: the loss without label smoothing and without gradient; None unless smoothed."""

    cross_entropy: Tensor | None = None


def given_input(inputs: Tensor | None, input_values: Tensor | None, input_features: Tensor | None) -> Tensor:
    """The input that is not None; raises ValueError for none or several."""
    given = [tensor for tensor in (inputs, input_values, input_features) if tensor is not None]
    if inputs is None and len(given) != 1:
        raise ValueError(f"give one of inputs, input_values and input_features, not {len(given)} of them")
    return given[0]
