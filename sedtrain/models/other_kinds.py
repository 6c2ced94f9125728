"""Refuses a checkpoint that is not a joined model of encoder and decoder, and says how to use it."""

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    PreTrainedConfig,
    SpeechEncoderDecoderConfig,
)

from sedtrain.errors import UserError
from sedtrain.models.decoder import BROKEN, can_attend
from sedtrain.models.decoder_families import decoder_config
from sedtrain.models.encoder_families import ENCODERS, ENCODERS_OF_WHOLE, encoder_config
from sedtrain.models.prefix import can_continue

AMONG_TOKENS = "its decoder is a language model that reads the audio among its tokens, and has no cross-attention"
NOT_WHOLE = {
    **dict.fromkeys(["fun_asr_nano", "granite_speech", "granite_speech_plus", "qwen3_asr"], AMONG_TOKENS),
    **dict.fromkeys(["vibevoice_asr", "voxtral"], AMONG_TOKENS),
    **dict.fromkeys(
        ["kyutai_speech_to_text", "voxtral_realtime"],
        "it is no encoder-decoder: it reads each token together with a piece of the audio",
    ),
    "dia": "it reads text and writes speech",
    "vibevoice": "it reads text and writes speech",
    "pop2piano": "it writes notes for a piano, not text",
}
"""Families of AutoModelForSpeechSeq2Seq that cannot be trained as whole models, with the reason."""


def refuse_other_kind(name: str, config: PreTrainedConfig) -> None:
    """Raises UserError unless the configuration is of a joined model.

    name: its folder or Hub id
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
        wrong = f"this is a {kind} model: {NOT_WHOLE[kind]}"
        model_types = {config.model_type for config in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING} - NOT_WHOLE.keys()
        usable = [name for name in sorted(model_types) if not name.endswith(SpeechEncoderDecoderConfig.model_type)]
        instead = (f"write checkpoint=FOLDER of a whole model of {', '.join(usable)}", "")
    raise UserError("checkpoint", name, wrong, *instead)


def training_with(part: str, kind: str, name: str, arguments: str) -> tuple[str, str]:
    """Remedies on the command line and in Python: train a joined model with this part."""
    write = f"write {part}.model_type={kind} {part}.checkpoint={name}, without task and checkpoint, to train a model with it"
    python = f"write SpeechEncoderDecoder.from_encoder_decoder_pretrained({arguments}), and train it"
    return write, python
