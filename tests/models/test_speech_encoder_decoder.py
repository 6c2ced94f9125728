"""The model against the base class of transformers, with the same weights."""

import json

import pytest
import torch
from pairs import BERT as DECODER
from pairs import END, PAD, START
from pairs import WAVE_ENCODER as ENCODER
from transformers import (
    BertConfig,
    BertLMHeadModel,
    HubertConfig,
    HubertModel,
    SpeechEncoderDecoderModel,
    WhisperConfig,
    WhisperModel,
)

from sedtrain.models.encoder import encoder_from_config
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder


@pytest.fixture(scope="module")
def pair():
    """Our model and the base class, with the same weights."""
    torch.manual_seed(0)
    ours = SpeechEncoderDecoder(
        encoder=encoder_from_config(HubertConfig(**ENCODER)), decoder=BertLMHeadModel(BertConfig(**DECODER))
    )
    base = SpeechEncoderDecoderModel(
        encoder=HubertModel(HubertConfig(**ENCODER)), decoder=BertLMHeadModel(BertConfig(**DECODER))
    )
    base.load_state_dict(ours.state_dict())
    for model in (ours, base):
        for config in (model.config, model.generation_config):
            config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = START, END, PAD
    return ours.eval(), base.eval()


@pytest.fixture
def inputs():
    """Two utterances, the second of half the length."""
    audio = torch.randn(2, 4000, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 4000, dtype=torch.long)
    audio[1, 2000:], mask[1, 2000:] = 0.0, 0
    return {"input_values": audio, "attention_mask": mask}


@pytest.fixture
def labels():
    return torch.tensor([[7, 8, 9, END], [10, END, -100, -100]])


@torch.inference_mode()
def test_logits_loss_and_encoder_states_are_those_of_the_base_class(pair, inputs, labels):
    ours, base = (model(**inputs, labels=labels) for model in pair)
    for name in ("logits", "loss", "encoder_last_hidden_state"):
        torch.testing.assert_close(getattr(ours, name), getattr(base, name), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_base_class(pair, inputs, labels):
    gradients = []
    for model in pair:
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generated_tokens_are_those_of_the_base_class(pair, inputs, num_beams):
    ours, base = (model.generate(**inputs, num_beams=num_beams, max_new_tokens=10) for model in pair)
    assert ours.tolist() == base.tolist()
    assert ours[:, 0].tolist() == [START, START]


@torch.inference_mode()
def test_an_utterance_alone_has_the_logits_it_has_in_a_padded_batch(pair, inputs):
    ours, _ = pair
    ids = torch.tensor([[START, 7, 8]])
    alone = ours(inputs["input_values"][1:, :2000], decoder_input_ids=ids).logits
    padded = ours(**inputs, decoder_input_ids=ids.expand(2, 3)).logits
    torch.testing.assert_close(padded[1:], alone, rtol=0, atol=1e-4)


def test_special_tokens_stand_where_training_and_where_generation_look_for_them():
    model = SpeechEncoderDecoder(
        encoder=HubertModel(HubertConfig(**ENCODER)), decoder=BertLMHeadModel(BertConfig(**DECODER))
    )
    model.set_special_tokens(start=START, end=END, pad=PAD)
    for config in (model.config, model.generation_config):
        assert (config.decoder_start_token_id, config.eos_token_id, config.pad_token_id) == (START, END, PAD)
    assert model.generation_config.bos_token_id == START


@torch.inference_mode()
def test_a_saved_model_loads_in_both_classes_with_equal_logits(pair, inputs, labels, tmp_path):
    ours, _ = pair
    ours.save_pretrained(tmp_path)
    expected = ours(**inputs, labels=labels).logits
    for kind in (SpeechEncoderDecoder, SpeechEncoderDecoderModel):
        loaded = kind.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(loaded(**inputs, labels=labels).logits, expected, rtol=1e-4, atol=1e-5)
        assert loaded.generation_config.decoder_start_token_id == START


def test_the_base_class_s_ways_to_construct_keep_working(tmp_path):
    HubertModel(HubertConfig(**ENCODER)).save_pretrained(tmp_path / "encoder")
    BertLMHeadModel(BertConfig(**DECODER)).save_pretrained(tmp_path / "decoder")
    model = SpeechEncoderDecoder.from_encoder_decoder_pretrained(
        tmp_path / "encoder", tmp_path / "decoder", encoder_layerdrop=0.0
    )
    assert isinstance(model, SpeechEncoderDecoder)
    assert model.encoder.config.layerdrop == 0.0


# --- whole sequence-to-sequence models as encoders

WHISPER = {
    "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_layers": 1,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "begin_suppress_tokens": None,
}  # fmt: skip


def test_a_folder_that_the_base_class_saved_around_whisper_loads_and_is_saved_under_its_own_type(tmp_path):
    encoder = WhisperModel(WhisperConfig(**WHISPER)).get_encoder()
    SpeechEncoderDecoderModel(encoder=encoder, decoder=BertLMHeadModel(BertConfig(**DECODER))).save_pretrained(
        tmp_path / "base"
    )
    model = SpeechEncoderDecoder.from_pretrained(tmp_path / "base")
    assert torch.equal(model.encoder.conv1.weight, encoder.conv1.weight)
    model.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours/config.json").read_text())["encoder"]["model_type"] == "whisper-encoder"


def test_of_a_whole_checkpoint_the_encoder_is_taken_and_keywords_reach_the_parts(tmp_path):
    whisper = WhisperModel(WhisperConfig(**WHISPER))
    whisper.save_pretrained(tmp_path / "whisper")
    BertLMHeadModel(BertConfig(**DECODER)).save_pretrained(tmp_path / "bert")
    model = SpeechEncoderDecoder.from_encoder_decoder_pretrained(
        tmp_path / "whisper", tmp_path / "bert", encoder_encoder_layerdrop=0.25, decoder_hidden_dropout_prob=0.5,
        dtype=torch.bfloat16, attn_implementation="eager",
    )  # fmt: skip
    assert torch.equal(model.encoder.conv1.weight, whisper.encoder.conv1.weight.bfloat16())
    for part in (model.encoder, model.decoder):
        assert (part.dtype, part.config._attn_implementation) == (torch.bfloat16, "eager")
    assert model.encoder.config.encoder_layerdrop == 0.25
    assert model.decoder.config.hidden_dropout_prob == 0.5
