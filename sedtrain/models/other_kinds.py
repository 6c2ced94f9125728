"""Refuses a checkpoint that is no joined model of encoder and decoder, and says what it could be a part of."""

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    PreTrainedConfig,
    SpeechEncoderDecoderConfig,
)

from sedtrain.errors import UserError
from sedtrain.models.decoder import BROKEN, can_attend
from sedtrain.models.encoder_families import ENCODERS, ENCODERS_OF_WHOLE, encoder_config
from sedtrain.models.prefix import can_continue
from sedtrain.models.stacks import decoder_config

AMONG_TOKENS = "its decoder is a language model that finds the audio among its tokens, and has no cross-attention"
NOT_WHOLE = {
    **dict.fromkeys(["fun_asr_nano", "granite_speech", "granite_speech_plus", "qwen3_asr"], AMONG_TOKENS),
    **dict.fromkeys(["vibevoice_asr", "voxtral"], AMONG_TOKENS),
    **dict.fromkeys(
        ["kyutai_speech_to_text", "voxtral_realtime"],
        "it has no encoder-decoder: each token is read with its piece of audio",
    ),
    "dia": "it reads text and writes speech",
    "vibevoice": "it reads text and writes speech",
    "pop2piano": "it writes the notes of a piano, no text",
}
"""Members of AutoModelForSpeechSeq2Seq that cannot be trained as whole models, with the reason in their source."""


def refuse_other_kind(name: str, config: PreTrainedConfig) -> None:
    """Raises UserError for the configuration of an encoder, a decoder or anything else alone.

    name: of its folder, or its Hub id
    """
    if isinstance(config, SpeechEncoderDecoderConfig):
        return
    kind, encoder = config.model_type, encoder_config(config).model_type
    decoder = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(decoder_config(config)), None)
    instead = ("write checkpoint=FOLDER of a run, or of a joined model that save_pretrained wrote", "")
    if encoder in ENCODERS:
        instead = training_with("encoder", kind if kind in ENCODERS_OF_WHOLE else encoder, name, f"{name!r}, DECODER")
    elif decoder is not None and (can_attend(decoder) or can_continue(config)) and kind not in BROKEN:
        instead = training_with("decoder", kind, name, f"ENCODER, {name!r}")
    wrong = f"this is a {kind} model, not a speech encoder-decoder"
    if type(config) in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING:
        wrong = f"this is a whole {kind} model"
        instead = (
            f"write checkpoint={name} on the command line, which trains it as a whole",
            f"write sedtrain.load({name!r})",
        )
    if kind in NOT_WHOLE:
        taken = {each.model_type for each in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING} - NOT_WHOLE.keys()
        wrong = f"this is a {kind} model: {NOT_WHOLE[kind]}"
        of_kinds = ", ".join(each for each in sorted(taken) if not each.endswith(SpeechEncoderDecoderConfig.model_type))
        instead = (f"write checkpoint=FOLDER of a whole model of {of_kinds}", "")
    raise UserError("checkpoint", name, wrong, *instead)


def training_with(part: str, kind: str, name: str, arguments: str) -> tuple[str, str]:
    """Remedies on the command line and in Python."""
    write = f"write {part}.model_type={kind} {part}.checkpoint={name}, without task and checkpoint, to train a model with it"
    python = f"write SpeechEncoderDecoder.from_encoder_decoder_pretrained({arguments}), and train it"
    return write, python
