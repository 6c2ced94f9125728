"""Every argument and every output of the base class's forward is here what it is there."""

import pytest
import torch
from pairs import IDS, LABELS, PAD, START, assert_close, joined, ours_and_base, two_utterances
from transformers import SpeechEncoderDecoderModel
from transformers.modeling_outputs import BaseModelOutput

from sedtrain.models.adapter import ConvAdapter
from sedtrain.models.encoder import EncodedSpeech
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder


@pytest.fixture(scope="module", params=[("hubert", "bert"), ("hubert", "gpt2"), ("wav2vec2", "bart")], ids="+".join)
def pair(request):
    """Our model and the base class: with a projection, with one, and with equal widths."""
    return ours_and_base(*request.param)


@pytest.fixture
def ours(pair):
    return pair[0]


@pytest.fixture
def inputs():
    return two_utterances()


ALL = {"output_attentions": True, "output_hidden_states": True, "use_cache": True}
CACHED = ("keys", "values")


def assert_equal_caches(ours, base):
    for cache in ("self_attention_cache", "cross_attention_cache"):
        layers = [getattr(each, cache).layers for each in (ours, base)]
        assert_close(*([[getattr(layer, name) for name in CACHED for layer in of] for of in layers]))


# --- outputs


@torch.inference_mode()
def test_every_output_is_that_of_the_base_class(pair, inputs):
    ours, base = (dict(model(**inputs, decoder_input_ids=IDS, **ALL)) for model in pair)
    assert list(ours) == list(base)
    assert_equal_caches(ours.pop("past_key_values"), base.pop("past_key_values"))
    for name, values in base.items():
        assert_close(ours[name], values)


@torch.inference_mode()
def test_with_labels_the_loss_and_every_output_but_the_cache_are_those_of_the_base_class(pair, inputs):
    ours, base = (model(**inputs, labels=LABELS, **{**ALL, "use_cache": False}) for model in pair)
    assert list(ours) == list(base)
    for name, values in base.items():
        assert_close(ours[name], values)


@torch.inference_mode()
def test_labels_beside_decoder_inputs_are_not_shifted(pair, inputs):
    ours, base = (model(**inputs, labels=LABELS, decoder_input_ids=IDS) for model in pair)
    assert_close(ours.loss, base.loss)
    assert_close(ours.logits, base.logits)


@torch.inference_mode()
@pytest.mark.parametrize("labels", [None, LABELS])
def test_a_tuple_has_the_outputs_in_their_documented_order(pair, inputs, labels):
    given = {**inputs, "decoder_input_ids": IDS, "labels": labels, **ALL}
    ours, base = (model(**given, return_dict=False) for model in pair)
    named = pair[0](**given)
    num_of_decoder = (labels is not None) + 5  # loss; logits, cache, hidden states, attentions, cross attentions
    assert len(ours) == len(named) == num_of_decoder + 3
    cache = num_of_decoder - 4
    assert_equal_caches(ours[cache], base[cache])
    for i, name in enumerate(named):
        if i != cache:
            assert_close(ours[i], named[name])
        if i != cache and i < num_of_decoder:
            assert_close(ours[i], base[i])


def test_a_tuple_in_training_has_the_logits_behind_the_loss(pair, inputs):
    try:
        ours, base = (model.train()(**inputs, labels=LABELS, return_dict=False) for model in pair)
    finally:
        for model in pair:
            model.eval()
    assert_close(ours[:2], base[:2])


def test_a_tuple_comes_where_the_configuration_says_so(inputs):
    model = joined("hubert", "bert")
    model.config.return_dict = False
    assert isinstance(model(**inputs, decoder_input_ids=IDS), tuple)


@torch.inference_mode()
def test_hidden_states_and_attentions_come_where_the_parts_configurations_say_so(inputs):
    model = joined("hubert", "bert")
    for config in (model.config.encoder, model.config.decoder):
        config.output_hidden_states = config.output_attentions = True
    output = model(**inputs, decoder_input_ids=IDS)
    assert len(output.encoder_hidden_states) == len(output.decoder_hidden_states) == 3
    assert len(output.encoder_attentions) == len(output.cross_attentions) == 2


# --- inputs


@torch.inference_mode()
def test_inputs_are_taken_by_position_and_by_each_of_their_names(ours, inputs):
    audio = inputs["input_values"]
    logits = ours(audio, decoder_input_ids=IDS).logits
    for name in ("inputs", "input_values", "input_features"):
        assert torch.equal(ours(**{name: audio}, decoder_input_ids=IDS).logits, logits)


def test_no_input_and_two_of_them_are_refused(inputs):
    audio, model = inputs["input_values"], joined("hubert", "bert")
    with pytest.raises(ValueError, match="give one of inputs, input_values and input_features, not 2"):
        model(input_values=audio, input_features=audio, decoder_input_ids=IDS)
    with pytest.raises(ValueError, match="give one of inputs, input_values and input_features, not 0"):
        model(decoder_input_ids=IDS)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int32])
def test_a_mask_may_have_any_type(ours, inputs, dtype):
    expected = ours(**inputs, decoder_input_ids=IDS).logits
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    assert torch.equal(ours(**inputs, decoder_input_ids=IDS).logits, expected)


@torch.inference_mode()
def test_decoder_attention_mask_is_that_of_the_base_class(pair, inputs):
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    ours, base = (model(**inputs, decoder_input_ids=IDS, decoder_attention_mask=mask).logits for model in pair)
    assert_close(ours[mask == 1], base[mask == 1])
    assert_close(ours, base)


@torch.inference_mode()
def test_decoder_inputs_embeds_are_those_of_the_base_class(pair, inputs):
    for labels in (None, LABELS):
        embeddings = [model.get_input_embeddings()(IDS) for model in pair]
        ours, base = (
            model(**inputs, decoder_inputs_embeds=embedded, labels=labels, use_cache=False)
            for model, embedded in zip(pair, embeddings, strict=True)
        )
        assert list(ours) == list(base)
        assert_close(ours.to_tuple(), base.to_tuple())


@torch.inference_mode()
def test_keywords_go_to_the_encoder_and_those_with_the_prefix_to_the_decoder(inputs):
    pair = ours_and_base("hubert", "bert", mask_time_prob=0.5)
    positions = torch.tensor([[3, 1, 4, 2]]).expand(2, 4)
    logits = []
    for model in pair:
        model.train()
        num_frames = model.encoder._get_feat_extract_output_lengths(4000)
        masked = torch.zeros(2, num_frames, dtype=torch.bool)
        masked[:, 5:9] = True
        keywords = {"mask_time_indices": masked, "decoder_position_ids": positions}
        logits.append(model(**inputs, decoder_input_ids=IDS, **keywords).logits)
        for name in keywords:
            others = {key: value for key, value in keywords.items() if key != name}
            torch.manual_seed(0)
            assert not torch.allclose(model(**inputs, decoder_input_ids=IDS, **others).logits, logits[-1])
    assert_close(*logits)


# --- what the encoder gave, given again


@torch.inference_mode()
def test_encoder_outputs_are_taken_as_every_type_that_holds_them(pair, inputs):
    ours, base = pair
    given = {"attention_mask": inputs["attention_mask"], "decoder_input_ids": IDS}
    encoded = base.encoder(**inputs, output_hidden_states=True)
    expected = base(encoder_outputs=encoded, **given)
    for outputs in (
        encoded,
        encoded.to_tuple()[:1],
        BaseModelOutput(encoded.last_hidden_state),
        ours.encode(**{"inputs": inputs["input_values"], "attention_mask": inputs["attention_mask"]}),
    ):
        output = ours(encoder_outputs=outputs, **given)
        assert_close(output.logits, expected.logits)
        assert_close(output.encoder_last_hidden_state, expected.encoder_last_hidden_state)
    assert_close(ours(encoder_outputs=encoded, **given).encoder_hidden_states, encoded.hidden_states)


@torch.inference_mode()
def test_the_documented_output_is_taken_back_as_encoder_outputs(ours, inputs):
    first = ours(**inputs, decoder_input_ids=IDS)
    again = ours(
        encoder_outputs=(first.encoder_last_hidden_state,),
        attention_mask=inputs["attention_mask"],
        decoder_input_ids=IDS,
    )
    assert_close(again.logits, first.logits)


@torch.inference_mode()
@pytest.mark.parametrize("decoder", ["bert", "bart"])
def test_it_is_taken_back_behind_an_adapter_too(inputs, decoder):
    plain = joined("hubert", decoder)
    width = plain.decoder.config.hidden_size
    model = SpeechEncoderDecoder(encoder=plain.encoder, decoder=plain.decoder, adapter=ConvAdapter(24, width)).eval()
    first = model(**inputs, decoder_input_ids=IDS)
    outputs = (first.encoder_last_hidden_state,)
    again = model(encoder_outputs=outputs, attention_mask=inputs["attention_mask"], decoder_input_ids=IDS)
    assert_close(again.logits, first.logits)


@torch.inference_mode()
def test_encoded_speech_needs_no_mask_again(ours, inputs):
    encoded = ours.encode(inputs["input_values"], inputs["attention_mask"])
    assert isinstance(encoded, EncodedSpeech)
    assert_close(
        ours(encoder_outputs=encoded, decoder_input_ids=IDS).logits, ours(**inputs, decoder_input_ids=IDS).logits
    )


@torch.inference_mode()
def test_a_cache_is_continued_by_one_token(pair, inputs):
    for model in pair:
        full = model(**inputs, decoder_input_ids=IDS)
        first = model(**inputs, decoder_input_ids=IDS[:, :3], use_cache=True)
        last = model(**inputs, decoder_input_ids=IDS[:, 3:], past_key_values=first.past_key_values, use_cache=True)
        assert_close(last.logits, full.logits[:, 3:])
        assert last.past_key_values is first.past_key_values
        assert last.past_key_values.get_seq_length() == 4


@torch.inference_mode()
def test_a_cache_is_made_where_it_is_asked_for(ours, inputs):
    assert ours(**inputs, decoder_input_ids=IDS, use_cache=False).past_key_values is None
    assert ours(**inputs, labels=LABELS, use_cache=True).past_key_values.get_seq_length() == 4
    assert ours(**inputs, labels=LABELS).past_key_values is None


# --- special tokens


def test_labels_without_special_tokens_are_refused_and_told_what_to_call(inputs):
    model = joined("hubert", "bert", special_tokens=False)
    with pytest.raises(
        ValueError, match=r"decoder_start_token_id is None and config.pad_token_id None.*\n*.*set_special_tokens"
    ):
        model(**inputs, labels=LABELS)
    model.config.decoder_start_token_id, model.config.pad_token_id = START, PAD
    assert model(**inputs, labels=LABELS).loss.isfinite()


def test_decoder_inputs_made_of_labels_are_those_of_the_base_class(pair):
    ours, base = pair
    assert torch.equal(
        ours.prepare_decoder_input_ids_from_labels(LABELS), base.prepare_decoder_input_ids_from_labels(LABELS)
    )


# --- the rest of the interface


def test_embeddings_and_parts_are_got_and_set_as_in_the_base_class(pair):
    for model in (joined("hubert", "gpt2"), joined("hubert", "gpt2", kind=SpeechEncoderDecoderModel)):
        assert model.get_encoder() is model.encoder
        assert model.get_input_embeddings() is model.decoder.get_input_embeddings()
        assert model.get_output_embeddings() is model.decoder.lm_head
        layer = torch.nn.Linear(16, 30, bias=False)
        model.set_output_embeddings(layer)
        assert model.get_output_embeddings() is model.decoder.lm_head is layer
        assert model.main_input_name == "inputs"


@pytest.mark.parametrize(("decoder", "is_tied"), [("bert", True), ("gpt2", True), ("bart", True), ("bart", False)])
def test_tied_weights_stay_tied(decoder, is_tied, tmp_path):
    torch.manual_seed(0)
    model = joined("hubert", decoder, tie_word_embeddings=is_tied)

    def is_one(model):
        return model.get_input_embeddings().weight is model.get_output_embeddings().weight

    assert is_one(model) == is_tied
    model.save_pretrained(tmp_path)
    for kind in (SpeechEncoderDecoder, SpeechEncoderDecoderModel):
        assert is_one(kind.from_pretrained(tmp_path)) == is_tied
