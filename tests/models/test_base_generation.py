"""What the base class's generate takes and gives; special tokens and lengths, wherever they are set."""

from collections import Counter

import pytest
import torch
import transformers
from families import TOKENIZER, tiny_decoder, tiny_encoder
from pairs import END, IDS, LABELS, PAD, START, assert_close, joined, ours_and_base, two_utterances
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from sedtrain.models.encoder import EncodedSpeech
from sedtrain.models.family_settings import feature_extractor_of
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder


@pytest.fixture(scope="module", params=[("hubert", "bert"), ("wav2vec2", "bart")], ids="+".join)
def pair(request):
    return ours_and_base(*request.param)


@pytest.fixture
def inputs():
    return two_utterances()


LENGTHS = {"max_new_tokens": 6, "min_new_tokens": 6}
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 5},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "best of beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "no cache": {"use_cache": False},
    "prefix": {"decoder_input_ids": IDS[:, :3]},
    "prefix without the start token": {"decoder_input_ids": IDS[:, 1:3]},
    "another start token": {"decoder_start_token_id": 9},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "labels, which it ignores": {"labels": LABELS},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_generate_gives_the_tokens_of_the_base_class(pair, inputs, way):
    tokens = []
    for model in pair:
        torch.manual_seed(0)
        tokens.append(model.generate(**inputs, **LENGTHS, **WAYS[way]))
    assert torch.equal(*tokens)


@torch.inference_mode()
def test_input_is_taken_by_position_and_by_name(pair, inputs):
    ours, base = pair
    audio, mask = inputs["input_values"], inputs["attention_mask"]
    expected = base.generate(audio, attention_mask=mask, **LENGTHS)
    config = GenerationConfig(**LENGTHS)
    assert torch.equal(ours.generate(audio, config, attention_mask=mask), expected)
    for name in ("inputs", "input_values", "input_features"):
        assert torch.equal(ours.generate(**{name: audio}, attention_mask=mask, **LENGTHS), expected)


@torch.inference_mode()
def test_encoder_outputs_are_taken_as_every_type_that_holds_them(pair, inputs):
    ours, base = pair
    expected = base.generate(**inputs, **LENGTHS, num_beams=2)
    frames = base.encoder(**inputs).last_hidden_state
    audio, mask = inputs.values()
    projected = ours(**inputs, decoder_input_ids=IDS).encoder_last_hidden_state
    for outputs in ((frames,), BaseModelOutput(frames), ours.encode(audio, mask), (projected,)):
        tokens = ours.generate(encoder_outputs=outputs, attention_mask=mask, **LENGTHS, num_beams=2)
        assert torch.equal(tokens, expected)
    encoded = EncodedSpeech(projected, attention_mask=ours.encode(audio, mask).attention_mask)
    assert torch.equal(ours.generate(encoder_outputs=encoded, **LENGTHS, num_beams=2), expected)


STATES = {"output_hidden_states": True, "output_attentions": True}
SCORES = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("said", ["by keyword", "by configuration", "by the model's configuration"])
def test_every_output_of_generation_is_that_of_the_base_class(inputs, num_beams, said):
    options = {**LENGTHS, **STATES, **SCORES, "num_beams": num_beams}
    outputs = []
    for model in ours_and_base("hubert", "bert"):
        if said == "by keyword":
            given = options
        elif said == "by configuration":
            given = {"generation_config": GenerationConfig(**options)}
        else:
            given = {}
            model.generation_config.update(**options)
        outputs.append(dict(model.generate(**inputs, **given)))
    ours, base = outputs
    del ours["past_key_values"], base["past_key_values"]
    assert list(ours) == list(base)
    for name, values in base.items():
        assert_close(ours[name], values)


# --- lengths and special tokens


def test_a_length_may_be_given_to_generate_to_the_configuration_and_to_the_generation_configuration(inputs):
    model = joined("hubert", "bert")
    unending = {"min_length": 30, "suppress_tokens": [END]}
    assert model.generate(**inputs, max_length=7, **unending | {"min_length": 0}).shape == (2, 7)
    model.generation_config.max_length = 8
    assert model.generate(**inputs, suppress_tokens=[END]).shape == (2, 8)
    model.config.max_length = 9
    assert model.generate(**inputs, suppress_tokens=[END]).shape == (2, 9)


def only_the_configuration_knows(decoder):
    """A model of a decoder with special tokens of its own, whose configuration alone is told others, as documents do."""
    model = joined("hubert", decoder, special_tokens=False)
    model.config.decoder_start_token_id, model.config.eos_token_id, model.config.pad_token_id = START, END, PAD
    return model


def ends_after(end, *num_tokens):
    """A rule for `generate`: row i writes token 21, and `end` after `num_tokens[i]` of them."""
    return lambda row, tokens: [end] if len(tokens) > num_tokens[row] else [21]


@pytest.mark.parametrize("decoder", ["bert", "gpt2", "bart"])
def test_generation_uses_the_special_tokens_of_the_configuration(inputs, decoder):
    model = only_the_configuration_knows(decoder)
    tokens = model.generate(**inputs, max_new_tokens=6, prefix_allowed_tokens_fn=ends_after(END, 1, 3))
    assert tokens.tolist() == [[START, 21, END, PAD, PAD], [START, 21, 21, 21, END]]
    model.config.eos_token_id, model.config.pad_token_id = 20, 6
    tokens = model.generate(**inputs, max_new_tokens=6, prefix_allowed_tokens_fn=ends_after(20, 0, 2))
    assert tokens.tolist() == [[START, 20, 6, 6], [START, 21, 21, 20]]


@pytest.mark.parametrize("decoder", ["bert", "gpt2", "bart"])
def test_special_tokens_of_the_configuration_are_saved_for_generation(decoder, tmp_path):
    only_the_configuration_knows(decoder).save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.decoder_start_token_id, saved.eos_token_id, saved.pad_token_id) == (START, END, PAD)


def test_several_end_tokens_of_generation_stay(inputs):
    model = only_the_configuration_knows("bert")
    model.generation_config.eos_token_id = [END, 20]
    for end in (END, 20):
        tokens = model.generate(**inputs, max_new_tokens=6, prefix_allowed_tokens_fn=ends_after(end, 1, 1))
        assert tokens.tolist() == [[START, 21, end]] * 2


@pytest.mark.parametrize("decoder", ["bert", "gpt2"])
def test_generation_starts_with_the_token_that_training_starts_with(inputs, decoder):
    model = joined("hubert", decoder)
    model.config.decoder_start_token_id = 11
    first = model.generate(**inputs, max_new_tokens=2)[:, 0]
    assert first.tolist() == model.prepare_decoder_input_ids_from_labels(LABELS)[:, 0].tolist() == [11, 11]


def test_a_model_without_special_tokens_is_saved_and_generates_behind_a_given_prefix(inputs, tmp_path):
    ours, base = ours_and_base("hubert", "bert", special_tokens=False)
    ours.save_pretrained(tmp_path)
    given = {**inputs, **LENGTHS, "decoder_start_token_id": 1}
    assert torch.equal(ours.generate(**given), base.generate(**given))


def test_generation_without_a_start_token_is_refused(inputs):
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        joined("hubert", "bert", special_tokens=False).generate(**inputs, **LENGTHS)


def test_encoder_projection_and_frame_mask_run_once_per_utterance(inputs, monkeypatch):
    model = joined("hubert", "bert")
    calls = Counter()
    for name in ("encoder", "enc_to_dec_proj", "decoder"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    frame_mask = model.encoder._get_feature_vector_attention_mask

    def counted(*args, **kwargs):
        calls.update(["frame mask"])
        return frame_mask(*args, **kwargs)

    monkeypatch.setattr(model.encoder, "_get_feature_vector_attention_mask", counted)
    model.generate(**inputs, **LENGTHS)
    assert calls == {"encoder": 1, "enc_to_dec_proj": 1, "decoder": 6, "frame mask": 2}  # the encoder's own, and ours


def test_a_pipeline_takes_the_model_and_writes_what_it_writes_for_the_base_class(tmp_path):
    model = SpeechEncoderDecoder(encoder=tiny_encoder("hubert"), decoder=tiny_decoder("bert")).eval()
    model.set_special_tokens(1, 2, 0)
    model.save_pretrained(tmp_path)
    stock = transformers.SpeechEncoderDecoderModel.from_pretrained(tmp_path)
    parts = {"tokenizer": TOKENIZER, "feature_extractor": feature_extractor_of(model.encoder)}
    audio = torch.randn(16000).numpy()
    texts = []
    for each in (model, stock):
        each.generation_config.max_new_tokens = 8
        texts.append(transformers.pipeline("automatic-speech-recognition", model=each, **parts)(audio)["text"])
    assert texts[0] == texts[1]


def test_an_assistant_model_hears_the_audio_too():
    model = SpeechEncoderDecoder(encoder=tiny_encoder("hubert"), decoder=tiny_decoder("gpt2")).eval()
    assistant = SpeechEncoderDecoder(
        encoder=tiny_encoder("hubert", seed=1), decoder=tiny_decoder("gpt2", seed=1)
    ).eval()
    for each in (model, assistant):
        each.set_special_tokens(1, 2, 0)
    audio, options = torch.randn(1, 16000), {"max_new_tokens": 8, "min_new_tokens": 8}
    assisted = model.generate(audio, assistant_model=assistant, **options)
    assert assisted.tolist() == model.generate(audio, **options).tolist()


@pytest.mark.parametrize("decoder", ["roberta", "bert", "gpt2"])
def test_a_prompt_padded_in_front_gives_the_logits_that_it_gives_alone(decoder):
    model = SpeechEncoderDecoder(encoder=tiny_encoder("hubert"), decoder=tiny_decoder(decoder)).eval()
    model.set_special_tokens(1, 2, 0)
    audio, prompt = torch.randn(1, 16000), torch.tensor([[0, 0, 1, 7]])
    mask = torch.tensor([[0, 0, 1, 1]])
    positions = {"decoder_position_ids": torch.tensor([[0, 0, 0, 1]])} if decoder != "roberta" else {}
    with torch.no_grad():
        padded = model(audio, decoder_input_ids=prompt, decoder_attention_mask=mask, **positions).logits[:, 2:]
        alone = model(audio, decoder_input_ids=prompt[:, 2:]).logits
    assert (padded - alone).abs().max() < 1e-5
