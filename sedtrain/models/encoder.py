"""Speech encoders: any encoder of `transformers` by its model type, alone and with masks that reach everything.

To add a family:
1. `conf/encoder/NAME.yaml`: its `model_type`, its published members, the shape of its tiny one (like conf/encoder/sew.yaml).
2. A class in `KINDS` of encoder_families.py, which says what padding would reach; a family without one is refused.
3. `FEATURE_EXTRACTORS` below, unless it takes normalized audio.
4. Tests and docs: see decoder.py.

B batch, S inputs (samples or feature frames), T frames, T' adapted frames, E encoder width, D decoder width.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    SequenceFeatureExtractor,
)
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from sedtrain.annotations import checked
from sedtrain.errors import UserError
from sedtrain.models.encoder_families import OF_TYPE, OF_WHOLE, UPSTREAM, encoder_config
from sedtrain.models.flax_weights import pretrained
from sedtrain.models.loading import (
    attention_of,
    attention_wanted,
    configured,
    default_config,
    family_of,
    load_config,
    load_weights,
    loading,
    published_name,
    share_config,
)
from sedtrain.models.options import tried


@dataclass
class EncodedSpeech(BaseModelOutput):
    """Audio as the decoder attends to it: computed once per utterance, and accepted back as `encoder_outputs`.

    last_hidden_state: (B, T', D) adapted to the decoder
    attention_mask: (B, T'), 1 where a frame is real, or None if all are
    encoder_frames, encoder_mask: (B, T, E) and (B, T), the encoder's own output
    """

    attention_mask: Tensor | None = None
    encoder_frames: Tensor | None = None
    encoder_mask: Tensor | None = None

    def rows(self, order: list[int]) -> "EncodedSpeech":
        """The utterances `order`, without the encoder's own output."""
        audio, mask = self.last_hidden_state, self.attention_mask
        assert audio is not None
        return EncodedSpeech(last_hidden_state=audio[order], attention_mask=None if mask is None else mask[order])


@dataclass
class SmoothedOutput(Seq2SeqLMOutput):
    """The output of the base class; cross_entropy: the loss without label smoothing and gradient, where it has smoothing."""

    cross_entropy: Tensor | None = None


def seq2seq_output(
    losses: tuple[Tensor | None, Tensor | None],
    decoded: Mapping[str, Any],
    encoded: EncodedSpeech,
    with_logits: bool,
    adapted: bool,
) -> SmoothedOutput:
    """The output of the model; its `encoder_last_hidden_state` can be given back as `encoder_outputs`.

    losses:  with and without smoothing
    adapted: by an adapter, which would adapt such frames a second time; a projection would not
    """
    own_frames = encoded.encoder_frames if adapted else None
    return SmoothedOutput(
        loss=losses[0],
        cross_entropy=losses[1],
        logits=decoded["logits"] if with_logits else None,
        past_key_values=decoded.get("past_key_values"),
        decoder_hidden_states=decoded.get("hidden_states"),
        decoder_attentions=decoded.get("attentions"),
        cross_attentions=decoded.get("cross_attentions"),
        encoder_last_hidden_state=encoded.last_hidden_state if own_frames is None else own_frames,
        encoder_hidden_states=encoded.hidden_states,
        encoder_attentions=encoded.attentions,
    )


@checked("encoder.")
def load_encoder(
    model_type: str,
    tiny: Mapping[str, Any],
    base: str | None = None,
    large: str | None = None,
    size: str = "tiny",
    pretrained: bool = True,
    checkpoint: str | None = None,
    attention: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """An encoder of a family that `transformers` knows, with random or published or saved weights.

    tiny: the family's configuration for size=tiny; base, large: the Hub ids of the published members
    checkpoint: a Hub id or folder that takes the place of the size's own
    attention: None is sdpa if the family has it, else eager
    options: values of the family's configuration class, for any size
    """
    name = published_name("encoder", size, checkpoint, {"base": base, "large": large})
    options = dict(options or {})
    if "mask_time_prob" in options:
        options = with_spec_augment(model_type, options)
    if name is None:
        kind_of(encoder_config(default_config("encoder", model_type)))  # refuses what cannot be an encoder
    config = load_config("encoder", name, model_type, tiny, **options)
    config._attn_implementation = attention
    if name is None or not pretrained:
        config.dtype = None  # of the published weights, which may be 16 bits
        chosen = ("encoder.tiny", tiny) if name is None and not options else ("encoder.options", options)
        return tried(*chosen, config, encoder_from_config, encode_silence)
    factory, config = loader_of(config)
    return standalone(load_weights("encoder", name, factory, config, attention))


def with_spec_augment(model_type: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with SpecAugment switched on: some checkpoints, such as w2v-BERT's, have it off.

    Raises UserError for a family without it; Whisper's is outside of its encoder.
    """
    config = default_config("encoder", model_type)
    if model_type == "whisper" or not hasattr(config, "mask_time_prob"):
        wrong = f"{model_type} has no SpecAugment in its encoder"
        write = "write augment=[speed,gain,noise,time_mask], or an encoder such as wav2vec2, hubert, wavlm or w2v_bert"
        raise UserError("augment", "spec_augment", wrong, write, "leave mask_time_prob out, or write another encoder")
    switch = {"apply_spec_augment": True} if hasattr(config, "apply_spec_augment") else {}
    return {**switch, **options}


def encoder_from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """An encoder with random weights; for a sequence-to-sequence family, its encoder alone."""
    config = encoder_config(config)
    kind = kind_of(config)
    with attention_of("encoder", config):
        if kind is not AutoModel:
            return kind._from_config(config)
        return standalone(AutoModel.from_config(config, trust_remote_code=False))


def encoder_from_pretrained(name: str, **options: Any) -> PreTrainedModel:
    """`AutoModel.from_pretrained` for the encoder alone, whatever model the checkpoint `name` is of."""
    if (config := options.pop("config", None)) is None:
        config, options = configured(name, options)
    factory, config = loader_of(config)
    with attention_wanted("encoder", config, options):
        return standalone(pretrained(factory, name, config=config, **options))


def loader_of(config: PreTrainedConfig) -> tuple[Any, PreTrainedConfig]:
    """The class that loads an encoder's weights from a checkpoint with this configuration, and the configuration to use."""
    if config.model_type in OF_WHOLE:
        return OF_WHOLE[config.model_type].whole, config
    inner = encoder_config(config)
    return (AutoModel, config) if config.is_encoder_decoder and inner is not config else (kind_of(inner), inner)


def kind_of(config: PreTrainedConfig) -> Any:
    """The class of an encoder with this configuration; AutoModel for a registered one that says its masks itself."""
    if kind := OF_TYPE.get(config.model_type):
        return kind
    if family := family_of(config):
        refuse_without_frame_mask(family)
    return AutoModel


def standalone(model: PreTrainedModel) -> PreTrainedModel:
    """The encoder of `model`, or `model` itself, with its weights and with masks that reach everything, in place.

    A class of the user's own stays as it is. Raises UserError for a model without an encoder of speech, or of masks.
    """
    config = encoder_config(model.config)
    kind = OF_TYPE.get(config.model_type)
    if kind is None:
        inner: PreTrainedModel = model.get_encoder() if config.is_encoder_decoder else model
        refuse_without_frame_mask(type(inner))
        return inner
    if isinstance(model, UPSTREAM[kind]) and type(model) is not UPSTREAM[kind]:
        return model
    encoder: Any = next((module for module in model.modules() if type(module) is UPSTREAM[kind]), None)
    if encoder is None:
        write = f"write a model of {config.model_type} that takes speech"
        raise UserError("encoder", type(model).__name__, "it has no encoder of speech", write)
    share_config(encoder, config)
    encoder.__class__ = kind
    _CAN_RECORD_REGISTRY[encoder] = encoder._can_record_outputs  # as a constructor would do
    encoder.set_up()
    return encoder


def loads_in_stock_transformers(config: PreTrainedConfig) -> bool:
    """True if a joined model with this encoder or decoder loads without sedtrain."""
    return config.model_type in CONFIG_MAPPING_NAMES and not config.is_encoder_decoder


def given_input(inputs: Tensor | None, input_values: Tensor | None, input_features: Tensor | None) -> Tensor:
    """The one of the three that is given; raises ValueError for none or several."""
    given = [tensor for tensor in (inputs, input_values, input_features) if tensor is not None]
    if inputs is None and len(given) != 1:
        raise ValueError(f"give one of inputs, input_values and input_features, not {len(given)} of them")
    return given[0]


def states_to_return(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """Encoder states that `generate` returns, by the first source that says so."""
    names = ("output_attentions", "output_hidden_states")
    return {name: next((of[name] for of in sources if of.get(name) is not None), None) for name in names}


def frame_width(config: PreTrainedConfig) -> int:
    """The width of the encoder's output frames, which the family's own adapter may change."""
    adapted = getattr(config, "add_adapter", False)
    width: int = getattr(config, "output_hidden_size", config.hidden_size) if adapted else config.hidden_size
    return width


def frame_mask(encoder: PreTrainedModel, num_frames: int, attention_mask: Tensor) -> Tensor:
    """(B, S) mask of the encoder's inputs -> (B, num_frames) mask of its frames, by the encoder's own method."""
    mask: Tensor = encoder._get_feature_vector_attention_mask(num_frames, attention_mask)
    return mask


def frame_spacing(encoder: PreTrainedModel) -> tuple[int, float]:
    """Inputs from one frame of the encoder to the next, and those before the centre of the first frame."""

    def frames_of(num_inputs: int) -> int:
        return int(frame_mask(encoder, 3, torch.ones(1, num_inputs)).sum())

    two, three = (bisect_left(range(MOST_INPUTS), number, key=frames_of) for number in (2, 3))
    hop = three - two
    return hop, (two - hop) / 2


def refuse_without_frame_mask(kind: type[PreTrainedModel]) -> None:
    """Raises UserError for a class of encoders that does not say which of its frames are padding."""
    if not hasattr(kind, "_get_feature_vector_attention_mask"):
        wrong = "it is no encoder of speech that says which of its frames are real in a padded batch"
        own = (
            "a class of your own needs a method _get_feature_vector_attention_mask(self, num_frames, attention_mask)"
            " that returns the (batch, num_frames) mask of frames for the (batch, inputs) mask of inputs"
        )
        write = f"write encoder=wav2vec2, hubert, whisper or another option; {own}"
        raise UserError("encoder", kind.__name__, wrong, write, f"write wav2vec2, hubert or whisper; {own}")


def freeze_front_end(encoder: PreTrainedModel) -> None:
    """Stops the gradient of everything before the encoder's first layer. Raises UserError if it does not say what that is."""
    if not hasattr(encoder, "freeze_feature_encoder"):
        write = "write a method freeze_feature_encoder(self) in it that stops the gradient of its front end"
        raise UserError("encoder", type(encoder).__name__, "it does not say what its front end is", write)
    encoder.freeze_feature_encoder()


def feature_extractor_of(encoder: PreTrainedModel) -> SequenceFeatureExtractor:
    """The feature extractor saved beside the encoder's weights, else the one that its family was defined with."""
    name = encoder.config._name_or_path
    if name:
        with loading("encoder.checkpoint", name):
            return AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False)
    return FEATURE_EXTRACTORS.get(encoder.config.model_type, audio)(encoder.config)


def encode_silence(encoder: PreTrainedModel) -> None:
    """A forward on half a second, as it is done in training."""
    extractor: Any = FEATURE_EXTRACTORS.get(encoder.config.model_type, audio)(encoder.config)
    silence = np.zeros(extractor.sampling_rate // 2, dtype=np.float32)
    with np.errstate(all="ignore"):
        made = extractor(silence, sampling_rate=extractor.sampling_rate, return_tensors="pt", padding="longest")
    inputs = made[extractor.model_input_names[0]]
    time = 2 if isinstance(extractor, transformers.WhisperFeatureExtractor) else 1
    mask = torch.ones(1, inputs.shape[time], dtype=torch.long)
    frames = encoder(inputs, attention_mask=mask, return_dict=True).last_hidden_state
    frame_mask(encoder, frames.shape[1], mask)


def audio(config: PreTrainedConfig, do_normalize: bool = True) -> SequenceFeatureExtractor:
    return transformers.Wav2Vec2FeatureExtractor(do_normalize=do_normalize, return_attention_mask=True)


def pairs_of_mels(config: PreTrainedConfig) -> SequenceFeatureExtractor:
    return transformers.SeamlessM4TFeatureExtractor(feature_size=config.feature_projection_input_dim // 2)


def parakeet(config: PreTrainedConfig) -> SequenceFeatureExtractor:
    try:
        return transformers.ParakeetFeatureExtractor(feature_size=config.num_mel_bins)
    except ImportError as error:
        wrong = f"its features need a package that is missing: {error}"
        raise UserError("encoder", "parakeet", wrong, "pip install librosa") from error


MOST_INPUTS = 1 << 17  # that three frames are made of

# by the encoder's model type; any other takes normalized audio
FEATURE_EXTRACTORS: dict[str, Callable[[PreTrainedConfig], SequenceFeatureExtractor]] = {
    "moonshine-encoder": lambda config: audio(config, do_normalize=False),
    "speecht5-encoder": lambda config: transformers.SpeechT5FeatureExtractor(do_normalize=False),
    "whisper-encoder": lambda config: transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins),
    "wav2vec2-bert": pairs_of_mels,
    "seamless_m4t-encoder": pairs_of_mels,
    "seamless_m4t_v2-encoder": pairs_of_mels,
    "speech_to_text-encoder": lambda config: transformers.Speech2TextFeatureExtractor(
        feature_size=config.input_feat_per_channel, num_mel_bins=config.input_feat_per_channel
    ),
    "parakeet_encoder": parakeet,
}
