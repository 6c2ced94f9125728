"""The encoders of sequence-to-sequence families, alone: saved, loaded, refused by stock transformers."""

import subprocess
import sys

import pytest
import torch
from pairs import part
from test_masking import SAMPLES, VARIANTS, built, noise, padded
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertLMHeadModel,
    MoonshineForConditionalGeneration,
    ParakeetForCTC,
    SeamlessM4TForSpeechToText,
    SpeechEncoderDecoderConfig,
    SpeechEncoderDecoderModel,
    SpeechT5ForSpeechToText,
    SpeechT5Model,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from sedtrain.errors import UserError
from sedtrain.models.encoder import (
    encoder_from_config,
    encoder_from_pretrained,
    loads_in_stock_transformers,
    standalone,
)
from sedtrain.models.encoder_families import ENCODERS_OF_WHOLE
from sedtrain.models.masking import Masked
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

NAMES = ["whisper", "speech_to_text", "moonshine", "seamless", "seamless v2", "speecht5 layer"]


def whole_config(name):
    """The configuration of the whole model that a variant is the encoder of."""
    model_type, values = VARIANTS[name]
    return AutoConfig.for_model(model_type, **values)


def whole(name, kind=None):
    torch.manual_seed(0)
    encoder = type(built(name))
    return (kind or encoder.whole)(whole_config(name)).eval()


@torch.inference_mode()
def frames(encoder):
    rows = [noise(encoder, length, length) for length in SAMPLES[encoder.main_input_name]]
    batch, mask = padded(encoder, rows)
    return encoder(batch, attention_mask=mask).last_hidden_state


def test_the_names_are_all_of_them():
    assert {type(built(name)) for name in NAMES} == set(ENCODERS_OF_WHOLE.values())


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_alone_is_saved_and_loaded(name, tmp_path):
    encoder = built(name)
    encoder.save_pretrained(tmp_path)
    expected = frames(encoder)
    for loaded in (AutoModel.from_pretrained(tmp_path), encoder_from_pretrained(str(tmp_path))):
        assert type(loaded) is type(encoder)
        torch.testing.assert_close(frames(loaded.eval()), expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_encoder_of_a_whole_model_keeps_its_weights(name, tmp_path):
    model = whole(name)
    model.save_pretrained(tmp_path)
    weights = {id(weight) for weight in model.parameters()}
    encoder = standalone(model)
    assert isinstance(encoder, Masked)
    assert {id(weight) for weight in encoder.parameters()} <= weights
    loaded = encoder_from_pretrained(str(tmp_path)).eval()
    torch.testing.assert_close(frames(loaded), frames(encoder))


@pytest.mark.parametrize("name", NAMES)
def test_every_module_of_it_has_the_encoder_s_own_configuration(name):
    encoder = standalone(whole(name))
    assert encoder.config.model_type.endswith("-encoder")
    assert not encoder.config.is_encoder_decoder
    assert {id(module.config) for module in encoder.modules() if hasattr(module, "config")} == {id(encoder.config)}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("whisper", WhisperForConditionalGeneration),
        ("moonshine", MoonshineForConditionalGeneration),
        ("seamless", SeamlessM4TForSpeechToText),
        ("speecht5 group", SpeechT5ForSpeechToText),
        ("wav2vec2 group", Wav2Vec2ForCTC),
        ("wav2vec2 group", Wav2Vec2Model),
    ],
)
def test_any_model_of_transformers_gives_its_encoder(name, kind):
    encoder = standalone(kind(whole_config(name)).eval())
    assert type(encoder) is type(built(name))
    assert standalone(encoder) is encoder
    assert frames(encoder).isfinite().all()


def test_a_model_that_hears_no_speech_is_refused():
    with pytest.raises(UserError, match="encoder = 'SpeechT5Model'\n    it has no speech encoder") as caught:
        standalone(SpeechT5Model(whole_config("speecht5 group")))
    assert caught.value.write == "write a model of speecht5-encoder that takes speech"


def test_a_class_of_the_user_s_own_stays_as_it_is():
    class Louder(WhisperEncoder):
        pass

    mine = Louder(whole_config("whisper"))
    assert standalone(mine) is mine
    assert type(mine) is Louder


def test_only_encoders_that_stock_transformers_has_load_there():
    stock = {name for name in VARIANTS if loads_in_stock_transformers(built(name).config)}
    assert {type(built(name)) for name in VARIANTS.keys() - stock} == set(ENCODERS_OF_WHOLE.values())
    assert not loads_in_stock_transformers(whole_config("whisper"))


REFUSED = """
import sys
from transformers import AutoModel, SpeechEncoderDecoderModel
assert "sedtrain" not in sys.modules
for kind in (AutoModel, SpeechEncoderDecoderModel):
    for folder in sys.argv[1:]:
        try:
            kind.from_pretrained(folder)
        except (ValueError, KeyError) as error:
            print(type(error).__name__, error)
"""


def test_stock_transformers_refuses_a_folder_and_names_the_model_type(tmp_path):
    decoder = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder |= {"intermediate_size": 16, "is_decoder": True, "add_cross_attention": True}
    bert, folders = BertLMHeadModel(BertConfig(**decoder)), [str(tmp_path / "encoder"), str(tmp_path / "decoder")]
    SpeechEncoderDecoderModel(encoder=built("whisper"), decoder=bert).save_pretrained(folders[0])
    SpeechEncoderDecoder(
        encoder=part("hubert"), decoder=whole("whisper", WhisperForConditionalGeneration)
    ).save_pretrained(folders[1])
    refusals = subprocess.run(
        [sys.executable, "-c", REFUSED, *folders], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert sum("whisper-encoder" in line for line in refusals) == 2
    assert sum("whisper-decoder" in line for line in refusals) == 2


def test_a_configuration_of_the_whole_model_becomes_that_of_its_encoder_and_stays_as_it_was():
    config = whole_config("whisper")
    config._attn_implementation = "eager"
    encoder = encoder_from_config(config)
    assert (encoder.config.model_type, config.model_type) == ("whisper-encoder", "whisper")
    assert encoder.config._attn_implementation == "eager"
    assert encoder.config.d_model == config.d_model


def test_weights_under_the_whole_model_s_type_load_into_the_encoder(tmp_path):
    """As the base class saves a joined model whose encoder is WhisperEncoder."""
    expected = built("whisper")
    base = whole("whisper").get_encoder()
    base.load_state_dict(expected.state_dict())
    old = encoder_from_config(
        SpeechEncoderDecoderConfig.from_encoder_decoder_configs(base.config, BertConfig()).encoder
    )
    old.load_state_dict(base.state_dict())
    torch.testing.assert_close(frames(old.eval()), frames(expected))


def test_the_encoder_of_a_parakeet_checkpoint_loads_alone(tmp_path):
    encoder = built("parakeet")
    config = AutoConfig.for_model("parakeet_ctc", encoder_config=encoder.config.to_dict(), vocab_size=20)
    model = ParakeetForCTC(config).eval()
    model.encoder.load_state_dict(encoder.state_dict())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(frames(encoder_from_pretrained(str(tmp_path)).eval()), frames(encoder))
    torch.testing.assert_close(frames(standalone(model)), frames(encoder))


@pytest.mark.parametrize("name", ["whisper"])
def test_attentions_and_hidden_states_are_those_of_transformers(name):
    config = WhisperConfig(**VARIANTS[name][1], attn_implementation="eager")
    upstream = WhisperModel(config).get_encoder().eval()
    ours = encoder_from_config(config).eval()
    ours.load_state_dict(upstream.state_dict())
    options = {"output_attentions": True, "output_hidden_states": True}
    features = torch.randn(2, 12, 800)
    with torch.inference_mode():
        expected, output = upstream(features, **options), ours(features, **options)
        assert len(output.hidden_states) == len(expected.hidden_states) == 3
        assert len(output.attentions) == len(expected.attentions) == 2
        for state, other in zip(
            output.hidden_states + output.attentions, expected.hidden_states + expected.attentions, strict=True
        ):
            torch.testing.assert_close(state, other, rtol=1e-4, atol=1e-5)
        assert isinstance(ours(features, return_dict=False), tuple)
