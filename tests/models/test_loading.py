"""Configurations and weights, from a family and from a checkpoint."""

import json
import shutil
from functools import partial

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    SpeechEncoderDecoderModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperModel,
)
from whispers import whisper_folder

from sedtrain.errors import UserError
from sedtrain.models.decoder import load_decoder
from sedtrain.models.encoder import load_encoder
from sedtrain.models.family_settings import load_config, published_name

TINY = {"hidden_size": 24, "num_attention_heads": 2}


def test_what_a_tiny_member_does_not_say_follows_from_what_it_says():
    config = load_config("encoder", None, "wav2vec2", TINY, add_adapter=True)
    assert (config.hidden_size, config.output_hidden_size) == (24, 24)


def test_options_go_before_the_tiny_member():
    assert load_config("encoder", None, "wav2vec2", TINY, hidden_size=32).hidden_size == 32


def test_a_checkpoint_keeps_what_the_options_do_not_say(tmp_path):
    Wav2Vec2Config(hidden_size=48, num_hidden_layers=3).save_pretrained(tmp_path)
    config = load_config("encoder", str(tmp_path), "wav2vec2", TINY, num_hidden_layers=2)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (48, 2, 12)


@pytest.mark.parametrize(
    ("option", "hint"), [("hiden_size", "; did you mean 'hidden_size'?"), ("zzz", "")], ids=["close", "far"]
)
def test_an_option_that_the_family_has_not_is_refused(option, hint):
    with pytest.raises(UserError) as caught:
        load_config("encoder", None, "wav2vec2", TINY, **{option: 1})
    assert (caught.value.option, caught.value.value) == (f"encoder.options.{option}", 1)
    assert caught.value.wrong == f"Wav2Vec2Config has no such option{hint}"
    assert caught.value.write == "write encoder.options.NAME=VALUE with a NAME of Wav2Vec2Config"


def test_sizes_of_another_family_are_named_where_they_stand():
    with pytest.raises(UserError) as caught:
        load_config("encoder", None, "speech_to_text", {"conv_dim": [8]})
    assert (caught.value.option, caught.value.value) == ("encoder.tiny.conv_dim", [8])
    assert caught.value.write == (
        "write encoder=speech_to_text, or if no option has that name '~encoder.tiny.conv_dim' to leave it out"
    )


@pytest.mark.parametrize("name", [None, "/nowhere"])
def test_a_family_that_transformers_does_not_know_is_met_with_the_close_one(name):
    with pytest.raises(UserError) as caught:
        load_config("encoder", name, "wav2vec", {})
    assert (caught.value.option, caught.value.value) == ("encoder.model_type", "wav2vec")
    assert caught.value.wrong == "transformers knows no such family; did you mean 'wav2vec2'?"
    assert caught.value.write == "write encoder=OPTION, or a model_type of transformers"


# --- weights

WAV2VEC2 = Wav2Vec2Config(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=[8, 8], conv_kernel=[10, 4],
    conv_stride=[10, 4], num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
)  # fmt: skip
BERT = BertConfig(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40, is_decoder=True
)
WHISPER = WhisperConfig(
    d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=40, num_mel_bins=8, max_source_positions=50, pad_token_id=0,
)  # fmt: skip


@pytest.fixture
def wav2vec2(tmp_path):
    """A folder of a very small Wav2Vec2."""
    Wav2Vec2Model(WAV2VEC2).save_pretrained(tmp_path / "wav2vec2")
    return tmp_path / "wav2vec2"


def encoder_problem(folder, model_type="wav2vec2", **options):
    with pytest.raises(UserError) as caught:
        load_encoder(model_type, {}, checkpoint=str(folder), options=options)
    assert (caught.value.option, caught.value.value) == ("encoder.checkpoint", str(folder))
    return caught.value


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "sedtrain.models.loading"]


def test_a_folder_with_the_weights_of_another_model_is_refused(wav2vec2, tmp_path):
    BertModel(BERT).save_pretrained(tmp_path / "bert")
    shutil.copy(tmp_path / "bert/model.safetensors", wav2vec2)
    problem = encoder_problem(wav2vec2)
    lack = "it lacks 46 of 46, such as encoder.layer_norm.bias"
    assert problem.wrong == f"its weights belong to another model: {lack}"
    assert problem.write == "write encoder.checkpoint=FOLDER whose config.json and weights belong together"


def test_weights_of_other_sizes_are_refused(wav2vec2):
    problem = encoder_problem(wav2vec2, hidden_size=32)
    assert problem.wrong == "encoder.layer_norm.bias has the shape (24,) in the file and (32,) in the model"
    assert problem.write.endswith("belong together, without options that change sizes")


def test_weights_that_are_missing_are_told(wav2vec2, caplog):
    load_encoder("wav2vec2", {}, checkpoint=str(wav2vec2), options={"num_hidden_layers": 3})
    assert told(caplog) == [f"encoder.checkpoint={wav2vec2} lacks some weights, which start at random: encoder.layers"]


@pytest.mark.parametrize("whole_class", [WhisperModel, WhisperForConditionalGeneration])
def test_a_whole_checkpoint_gives_its_encoder_without_a_word(tmp_path, caplog, whole_class):
    whole = whole_class(WHISPER)
    whole.save_pretrained(tmp_path)
    encoder = load_encoder("whisper", {}, checkpoint=str(tmp_path))
    assert torch.equal(encoder.conv1.weight, whole.get_encoder().conv1.weight)
    assert told(caplog) == []


def test_a_whole_checkpoint_without_its_encoder_is_refused(tmp_path):
    whole = WhisperModel(WHISPER)
    weights = {name: weight for name, weight in whole.state_dict().items() if not name.startswith("encoder.")}
    whole.save_pretrained(tmp_path, state_dict=weights)
    assert "its weights belong to another model: it lacks 37 of 37" in encoder_problem(tmp_path, "whisper").wrong


def test_a_decoder_gets_its_new_cross_attention_without_a_word(tmp_path, caplog):
    stored = BertLMHeadModel(BERT)
    stored.save_pretrained(tmp_path)
    decoder = load_decoder(None, "bert", {}, checkpoint=str(tmp_path))
    assert torch.equal(decoder.cls.predictions.transform.dense.weight, stored.cls.predictions.transform.dense.weight)
    assert told(caplog) == []


def test_a_decoder_without_an_output_layer_is_told_of(tmp_path, caplog):
    BertModel(BERT).save_pretrained(tmp_path)
    load_decoder(None, "bert", {}, checkpoint=str(tmp_path))
    assert told(caplog) == [f"decoder.checkpoint={tmp_path} lacks some weights, which start at random: cls.predictions"]


@pytest.mark.parametrize("num_bytes", [0, 100, 5000])
def test_a_truncated_file_is_refused(wav2vec2, num_bytes):
    weights = wav2vec2 / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:num_bytes])
    assert encoder_problem(wav2vec2).wrong.startswith("the folder gave: Error while deserializing header: ")


def test_a_truncated_pickle_is_refused(wav2vec2):
    (wav2vec2 / "model.safetensors").unlink()
    torch.save(Wav2Vec2Model(WAV2VEC2).state_dict(), wav2vec2 / "pytorch_model.bin")
    weights = wav2vec2 / "pytorch_model.bin"
    for num_bytes in (3000, 0):
        weights.write_bytes(weights.read_bytes()[:num_bytes])
        assert encoder_problem(wav2vec2).wrong.startswith("the folder gave: ")


def test_a_checkpoint_of_another_family_is_refused_and_its_option_named(tmp_path):
    WhisperModel(WHISPER).save_pretrained(tmp_path)
    problem = encoder_problem(tmp_path, "hubert")
    assert problem.wrong == "this is a whisper model, not hubert"
    assert problem.write == "write encoder=whisper, or if no option has that name encoder.model_type=whisper"
    BertForMaskedLM(BERT).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="write decoder=bert, or if no option"):
        load_decoder(None, "gpt2", {}, checkpoint=str(tmp_path))


@pytest.mark.parametrize("inside", ["", "model"])
def test_a_joined_model_is_no_part(wav2vec2, tmp_path, inside):
    cross = BertConfig(**{**BERT.to_dict(), "add_cross_attention": True})
    joined = SpeechEncoderDecoderModel(encoder=Wav2Vec2Model(WAV2VEC2), decoder=BertLMHeadModel(cross))
    joined.save_pretrained(tmp_path / "run/model")
    folder = tmp_path / "run" / inside
    problem = encoder_problem(folder)
    assert problem.wrong == "this is a joined model of encoder and decoder"
    assert problem.write == (
        f"write task=evaluate checkpoint={folder} to score it, or encoder.checkpoint=FOLDER of a part alone, "
        "as model.encoder.save_pretrained(FOLDER) writes it"
    )


def test_a_part_of_a_joined_model_loads_when_it_was_saved_alone(wav2vec2, tmp_path):
    encoder = load_encoder("wav2vec2", {}, checkpoint=str(wav2vec2))
    encoder.save_pretrained(tmp_path / "again")
    again = load_encoder("wav2vec2", {}, checkpoint=str(tmp_path / "again"))
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), again.parameters(), strict=True))


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert published_name("encoder", "tiny", "~/mine", {}) == str(tmp_path / "mine")
    assert published_name("encoder", "tiny", "some/id", {}) == "some/id"


def test_a_pickle_of_more_than_numbers_is_refused_in_our_words(wav2vec2):
    (wav2vec2 / "model.safetensors").unlink()
    torch.save({"weight": pytest.fail}, wav2vec2 / "pytorch_model.bin")
    wrong = "the folder gave: a pickle of weights that is damaged, or holds more than numbers and could run code"
    assert encoder_problem(wav2vec2).wrong == wrong


@pytest.mark.parametrize("load", [load_encoder, partial(load_decoder, None)])
def test_random_weights_have_32_bits_whatever_the_checkpoint_has(load, tmp_path):
    config = json.loads((whisper_folder(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    assert load("whisper", {}, checkpoint=str(tmp_path), pretrained=False).dtype == torch.float32
