"""The model: `transformers.SpeechEncoderDecoderModel`, made whole.

B batch, S samples, T frames, E encoder width, D decoder width, U target tokens, V vocabulary.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
    SpeechEncoderDecoderConfig,
)
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES as KNOWN_TO_PIPELINES

from sedtrain.models.adapter import Adapter, saved_adapter
from sedtrain.models.config import (
    AdaptedSpeechEncoderDecoderConfig,
    FollowedRates,
    frame_width,
    joint_config,
    share_config,
    with_adapter,
)
from sedtrain.models.decoder import as_decoder, decoder_positions, settle_config
from sedtrain.models.encoder import encoder_from_config, frame_mask, freeze_front_end, refuse_without_hook, standalone
from sedtrain.models.generation import EncodedSpeech, LoadsAndSaves, given_input, seq2seq_output, split_options
from sedtrain.models.loading import refuse_unsupported
from sedtrain.models.losses import (
    DeferrableLinear,
    deferred_output_layer,
    labelled_cross_entropy,
    make_deferrable,
    shift_right,
    token_cross_entropy,
)
from sedtrain.models.masking import ZeroGradients


class SpeechEncoderDecoder(LoadsAndSaves):
    """A speech encoder joined to a text decoder; everything written against the base class works.

    adapter: stands between them; where it is None, a projection does if their widths differ
    ctc_head: (E -> V) scores of the encoder's frames, where `config.ctc_vocab_size` asks for it
    """

    _supports_flex_attn = True
    _keys_to_ignore_on_load_missing: ClassVar[list[str]] = [r"^ctc_head\."]  # they lie in a file of their own

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
        if config is None and encoder is not None and decoder is not None:
            config = joint_config(encoder, decoder)
        if config is not None and encoder is not None:
            settle_config(config.decoder)
            if config.encoder.model_type != encoder.config.model_type:
                config.encoder = encoder.config  # of a sequence-to-sequence model: that of its encoder alone
            if adapter is not None:
                config = with_adapter(config, adapter)
        super().__init__(config, encoder, decoder)
        self.decoder: PreTrainedModel = as_decoder(self.decoder)
        self.settle_widths(adapter)
        share_config(self.encoder, self.config.encoder)
        share_config(self.decoder, self.config.decoder)
        self.encoder_rates, self.decoder_rates = FollowedRates(self.encoder.config), FollowedRates(self.decoder.config)
        make_deferrable(self.decoder)
        self.ctc_head: nn.Linear | None = None
        if vocab_size := getattr(self.config, "ctc_vocab_size", None):
            self.add_ctc_head(vocab_size)

    def settle_widths(self, adapter: Adapter | None) -> None:
        """The base class decides on one width and builds with another: here both are that of the frames that come out."""
        self.encoder_output_dim = frame_width(self.config.encoder)
        if hasattr(self.config.encoder, "output_hidden_size"):
            self.config.encoder.output_hidden_size = self.encoder_output_dim  # by which stock transformers decides
        widths = self.encoder_output_dim, self.config.decoder.hidden_size
        saved = getattr(self.config, "adapter", None)
        self.adapter = (
            saved_adapter(saved["kind"], *widths, saved["settings"]) if adapter is None and saved else adapter
        )
        projection: nn.Linear | None = self._modules.pop("enc_to_dec_proj", None)
        if widths[0] != widths[1] and self.adapter is None:
            fits = projection is not None and projection.in_features == widths[0]
            self.enc_to_dec_proj = projection if fits else nn.Linear(*widths)

    def add_ctc_head(self, vocab_size: int) -> nn.Linear:
        """Gives the encoder's frames a linear layer to `vocab_size` scores, and saves it with the model from now on."""
        self.config.ctc_vocab_size = vocab_size
        self.ctc_head = nn.Linear(self.encoder_output_dim, vocab_size, device=self.device, dtype=self.dtype)
        return self.ctc_head

    def encode(self, inputs: Tensor, attention_mask: Tensor | None = None, **options: Any) -> EncodedSpeech:
        """(B, S) audio, or features, and the mask of what is real in them -> what the decoder attends to."""
        if attention_mask is not None:
            refuse_without_hook(self.encoder)
        self.encoder_rates.follow(self.encoder)
        encoded = self.encoder(inputs, attention_mask=attention_mask, return_dict=True, **options)
        return self.adapted(encoded, attention_mask)

    def adapted(self, encoded: Mapping[str, Any], attention_mask: Tensor | None) -> EncodedSpeech:
        """The encoder's output and the mask of its input -> what the decoder attends to."""
        frames: Tensor = encoded["last_hidden_state"]
        mask = None if attention_mask is None else frame_mask(self.encoder, frames.shape[1], attention_mask)
        hidden_states, hidden_mask = frames, mask
        if self.adapter is not None:
            hidden_states, hidden_mask = self.adapter(frames, mask)
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
        output_logits: whether (B, U, V) logits are returned; by default not where the model trains on labels
        num_items_in_batch: what the summed loss is divided by, instead of the number of target tokens
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        wanted = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        encoder_options, decoder_options = split_options(kwargs)
        if encoder_outputs is None:
            source = given_input(inputs, input_values, input_features)
            encoded = self.encode(source, attention_mask, **wanted, **encoder_options)
        else:
            encoded = self.accepted(encoder_outputs, attention_mask)
        if labels is not None:
            use_cache = bool(use_cache)
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        tokens = decoder_input_ids if decoder_inputs_embeds is None else decoder_inputs_embeds
        decoder_options = {**self.positions(tokens, past_key_values, decoder_attention_mask), **decoder_options}
        if output_logits is None:
            output_logits = labels is None or not self.training or not return_dict
        self.decoder_rates.follow(self.decoder)
        with deferred_output_layer(self.decoder, deferred=not output_logits) as output_layer:
            decoded = self.decoder(
                input_ids=decoder_input_ids,
                attention_mask=decoder_attention_mask,
                encoder_hidden_states=encoded.last_hidden_state,
                encoder_attention_mask=encoded.attention_mask,
                inputs_embeds=decoder_inputs_embeds,
                use_cache=use_cache,
                past_key_values=past_key_values,
                return_dict=True,
                **wanted,
                **decoder_options,
            )
        loss = None
        if labels is not None:
            loss = self.token_loss(decoded.logits, output_layer, labels, label_smoothing, num_items_in_batch)
        output = seq2seq_output(loss, decoded, encoded, with_logits=output_layer is None)
        if self.adapter is not None and encoded.encoder_frames is not None:  # what can be given back as encoder_outputs
            output.encoder_last_hidden_state = encoded.encoder_frames
        return output if return_dict else output.to_tuple()

    def positions(
        self, tokens: Tensor | None, past: transformers.Cache | None, attention_mask: Tensor | None
    ) -> dict[str, Tensor]:
        """The `position_ids` that the decoder has to be told, if any."""
        if tokens is None:
            return {}
        past_length = 0 if past is None else past.get_seq_length()
        positions = decoder_positions(self.decoder, tokens, past_length, attention_mask)
        return {} if positions is None else {"position_ids": positions}

    def token_loss(
        self,
        logits: Tensor,
        output_layer: DeferrableLinear | None,
        labels: Tensor,
        label_smoothing: float,
        num_items: Tensor | int | None,
    ) -> Tensor:
        """The loss of (B, U, V) logits, or of the (B, U, D) inputs of an output layer, over the tokens or `num_items`."""
        if left_out := self.left_out():
            logits = ZeroGradients.apply(logits, *left_out)  # type: ignore[no-untyped-call]
        loss_of = token_cross_entropy if output_layer is None else partial(labelled_cross_entropy, output_layer)
        loss_sum, num_tokens = loss_of(logits, labels, label_smoothing)
        divisor = num_tokens if num_items is None else torch.as_tensor(num_items)
        return loss_sum / divisor.to(loss_sum.device).clamp(min=1)

    def left_out(self) -> list[nn.Parameter]:
        """The parameters that a training step may leave without a gradient, which several ranks would not survive."""
        if not (self.training and torch.is_grad_enabled()):
            return []
        drops_layers = any(getattr(self.decoder.config, name, 0) for name in ("layerdrop", "decoder_layerdrop"))
        part: nn.Module | None = self if drops_layers else self.ctc_head
        return [] if part is None else [weight for weight in part.parameters() if weight.requires_grad]

    def accepted(
        self, encoder_outputs: BaseModelOutput | tuple[Tensor, ...], attention_mask: Tensor | None
    ) -> EncodedSpeech:
        """What a caller gives as `encoder_outputs`: EncodedSpeech as it is, else an encoder's output, projected or not."""
        if isinstance(encoder_outputs, EncodedSpeech):
            return encoder_outputs
        if isinstance(encoder_outputs, tuple):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        return self.adapted(encoder_outputs, attention_mask)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """(B, U) labels -> (B, U) decoder inputs."""
        start, pad = (getattr(self.config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
        if start is None or pad is None:
            raise ValueError(
                f"config.decoder_start_token_id is {start} and config.pad_token_id {pad}: "
                "call set_special_tokens(start, end, pad) with the ids of the tokenizer"
            )
        return shift_right(labels, start, pad)

    def set_special_tokens(self, start: int, end: int, pad: int) -> None:
        """The ids that training and generation both use: a difference between them would stay silent."""
        for config in (self.config, self.generation_config):
            config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = start, end, pad
        self.generation_config.bos_token_id = start

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any) -> None:
        """For both parts, or {"encoder": ..., "decoder": ...}. Raises UserError where a part's family lacks it."""
        refuse_unsupported(self.config, attn_implementation)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def freeze_feature_encoder(self) -> None:
        """Stops the gradient of what lies before the encoder's first layer, for every family."""
        freeze_front_end(self.encoder)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Grows or shrinks the decoder's vocabulary, input and output, and that of the CTC head where it is the same."""
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


class AdaptedSpeechEncoderDecoder(SpeechEncoderDecoder):
    """The name under which AutoModelForSpeechSeq2Seq finds models with an adapter."""

    config: AdaptedSpeechEncoderDecoderConfig


KNOWN_TO_PIPELINES |= {
    "speech-encoder-decoder of sedtrain": "SpeechEncoderDecoder",
    AdaptedSpeechEncoderDecoderConfig.model_type: "AdaptedSpeechEncoderDecoder",
}
AutoConfig.register(AdaptedSpeechEncoderDecoderConfig.model_type, AdaptedSpeechEncoderDecoderConfig)
AutoModelForSpeechSeq2Seq.register(AdaptedSpeechEncoderDecoderConfig, AdaptedSpeechEncoderDecoder)
