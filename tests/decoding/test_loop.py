"""The loop writes the ids of `generate` of transformers, for every family that it drives."""

import pytest
import torch
from families import DECODERS, STACKS, TOKENIZER, tiny_decoder
from tones import END, PAD, START, batch_of, joined

from sedtrain.decoding.generate import decode_batch, token_limits
from sedtrain.decoding.hypotheses import Hypotheses
from sedtrain.decoding.options import DecodingOptions
from sedtrain.decoding.searches import SearchInputs, by_generate, by_loop, loop_of, steps_of_search
from sedtrain.models.steps import decoder_steps, forget

LEFT_TO_GENERATE = {"blenderbot_small", "xmod", *STACKS} - {"m2m_100", "speech_to_text", "whisper"}
TEXTS = [[5, 6, 7, 8, 9], [9, 8], [7, 7, 7, 6], [12]]
ENDS = [END, *range(20, 90, 4)]
TAGGED = torch.tensor([[START, 11, 12], [START, 5, 6], [START, 8, 8], [START, 11, 12]])


@pytest.fixture(scope="module", params=DECODERS)
def model(request):
    model = joined(tiny_decoder(request.param))
    model.settle_generation_config()
    model.generation_config.eos_token_id = ENDS  # random weights rarely write one alone
    return model


def of_both(model, options, prompts, scale=1.0):
    """The texts and scores of the loop and of `generate`; `scale` of the audio makes it matter."""
    batch = batch_of(TEXTS, seed=1)
    with torch.inference_mode():
        encoded = model.encode(batch.inputs, batch.attention_mask)
        encoded.last_hidden_state = scale * encoded.last_hidden_state
        inputs = SearchInputs(encoded, prompts, token_limits(model, encoded, [], prompts.shape[1], options), options)
        ours = by_loop(model, steps_of_search(model, options), inputs)
        theirs = by_generate(model, inputs)
    return [
        ([Hypotheses.of_rows(each, None, ENDS, PAD).ids for each in rows], scores) for rows, scores in (ours, theirs)
    ]


def test_every_family_is_driven_but_those_whose_layers_have_other_parts(model, request):
    is_left = request.node.callspec.params["model"] in LEFT_TO_GENERATE
    assert (decoder_steps(model) is None) == is_left
    for search in ("attention", "joint", "speculative"):
        assert loop_of(model, DecodingOptions(search=search)) == ("generate" if is_left else "sedtrain")
    for search in ("ctc", "rescore"):
        assert loop_of(model, DecodingOptions(search=search)) == "sedtrain"


def test_decoders_that_read_audio_as_a_prefix_are_left_to_generate():
    model = joined(tiny_decoder("llama"))
    assert [loop_of(model, DecodingOptions(num_beams=beams)) for beams in (1, 2)] == ["generate"] * 2


SEARCHES = [
    {}, {"num_beams": 3, "num_return_sequences": 3}, {"num_beams": 4, "length_penalty": 2.0},
    {"num_beams": 2, "length_penalty": -1.0, "no_repeat_ngram_size": 2},
]  # fmt: skip


def test_the_ids_are_those_of_generate(model):
    if decoder_steps(model) is None:
        pytest.skip("the family is left to generate")
    lengths = set()
    for number, search in enumerate(SEARCHES):
        prompts = TAGGED if number % 2 else torch.full((4, 1), START)
        options = DecodingOptions(**search, max_new_tokens=10)
        (ours, scores), (theirs, expected) = of_both(model, options, prompts, scale=8.0**number)
        assert ours == theirs
        if options.num_return_sequences > 1:
            assert scores == [pytest.approx(each, abs=1e-4) for each in expected]
        lengths |= {len(text) for texts in ours for text in texts}
    assert len(lengths) > 1


@pytest.fixture(scope="module")
def bert():
    return joined(tiny_decoder("bert"))


def test_settings_of_the_saved_model_that_the_loop_lacks_are_left_to_generate(bert):
    assert steps_of_search(bert, DecodingOptions()) is not None
    assert steps_of_search(bert, DecodingOptions(do_sample=True)) is None
    for name, value in (("early_stopping", True), ("use_cache", False)):
        before = getattr(bert.generation_config, name)
        setattr(bert.generation_config, name, value)
        assert steps_of_search(bert, DecodingOptions(num_beams=2)) is None
        setattr(bert.generation_config, name, before)
    assert steps_of_search(bert, DecodingOptions(max_new_tokens=513)) is None  # it has 512 positions


def test_a_model_in_training_is_driven_and_keeps_its_mode():
    model = joined(tiny_decoder("bert", options={"hidden_dropout_prob": 0.5})).train()
    assert loop_of(model, DecodingOptions()) == "sedtrain"
    assert model.training and model.decoder.training
    assert loop_of(model, DecodingOptions(do_sample=True)) == "generate"


def texts_of(model):
    return decode_batch(model, TOKENIZER, batch_of(TEXTS), DecodingOptions(max_new_tokens=6))


def test_changed_weights_are_seen(bert):
    """In place as an optimizer changes them, as another parameter, and as others may, after `forget`."""
    before = texts_of(bert)
    weight = bert.decoder.get_output_embeddings().weight
    with torch.no_grad():
        weight.mul_(-1)
    changed = texts_of(bert)
    assert changed != before
    weight.data = -weight.data
    assert texts_of(bert) == before
    weight.data.mul_(-1)
    forget(bert)
    assert texts_of(bert) == changed
