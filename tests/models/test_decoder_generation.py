"""Every family of decoder writes with its cache what it writes without and what it learns by teacher forcing."""

import pytest
import torch
from families import OPTIONS, STACKS, option_file, tiny_decoder
from transformers import HubertConfig, HubertModel

from sedtrain.errors import UserError
from sedtrain.models.family_settings import default_config
from sedtrain.models.positions import decoder_positions, max_tokens
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

PAD, START, END = 0, 1, 2
TABLES = ["camembert", "data2vec_text", "roberta", "xlm_roberta", "xmod"]
COUNTING = [*TABLES, "m2m_100", "seamless_m4t", "seamless_m4t_v2", "speech_to_text"]


@pytest.fixture(scope="module", params=OPTIONS)
def decoder(request):
    return tiny_decoder(request.param)


@pytest.fixture(scope="module")
def audio():
    """(B, T, D) encoder states."""
    return torch.randn(2, 11, 144, generator=torch.Generator().manual_seed(0))


def step(decoder, ids, audio, past_length=0, **cache):
    positions = decoder_positions(decoder, ids, past_length)
    return decoder(input_ids=ids, encoder_hidden_states=audio, **positions, **cache)


@torch.inference_mode()
@pytest.mark.parametrize("start", [START, PAD])
def test_teacher_forcing_uncached_and_cached_steps_agree_whatever_the_start_token(decoder, audio, start):
    ids = torch.tensor([[start, 5, PAD, 7, 8, 9], [start, 9, 8, 7, 6, 5]])
    taught = step(decoder, ids, audio).logits
    cache = None
    for u in range(ids.shape[1]):
        uncached = step(decoder, ids[:, : u + 1], audio, use_cache=False).logits[:, -1]
        output = step(decoder, ids[:, u : u + 1], audio, u, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        torch.testing.assert_close(uncached, taught[:, u], rtol=0, atol=1e-5)
        torch.testing.assert_close(output.logits[:, -1], taught[:, u], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_without_a_pad_token_within_the_positions_are_the_family_s_own(decoder, audio):
    ids = torch.tensor([[START, 5, 6, 7, 8, 9]])
    expected = decoder(input_ids=ids, encoder_hidden_states=audio[:1]).logits
    torch.testing.assert_close(step(decoder, ids, audio[:1]).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_positions_are_given_to_the_families_that_skip_pad_tokens(name):
    decoder = tiny_decoder(name)
    ids = torch.tensor([[START, 5, 6], [PAD, PAD, 7]])
    positions = decoder_positions(decoder, ids)
    if name not in COUNTING:
        assert positions == {}
        return
    embeddings = decoder.base_model.embeddings if name in TABLES else decoder.base_model.embed_positions
    upstream = embeddings.create_position_ids_from_input_ids(ids[:1], embeddings.padding_idx, 0)
    expected = upstream.expand(2, 3)
    assert torch.equal(positions["position_ids"], expected)
    assert torch.equal(decoder_positions(decoder, ids[:, 2:], past_length=2)["position_ids"], expected[:, 2:])
    assert torch.equal(decoder_positions(decoder, torch.zeros(2, 3, 144))["position_ids"], expected)


# --- in a model


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    config = HubertConfig(
        hidden_size=144, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_kernel=(10, 3), conv_stride=(5, 2), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return HubertModel(config)


def joined(encoder, decoder):
    model = SpeechEncoderDecoder(encoder=encoder, decoder=decoder).eval()
    model.set_special_tokens(START, END, PAD)
    return model


def written(model, **options):
    samples = torch.randn(2, 800, generator=torch.Generator().manual_seed(1))
    tokens = model.generate(samples, max_new_tokens=8, min_new_tokens=8, do_sample=False, **options)
    return samples, tokens


@torch.inference_mode()
def assert_writes_what_it_was_taught(model):
    samples, tokens = written(model)
    assert tokens.shape == (2, 9)
    assert torch.equal(written(model, use_cache=False)[1], tokens)
    logits = model(samples, decoder_input_ids=tokens).logits[:, :-1]
    logits[..., END] = -torch.inf  # min_new_tokens forbids it
    decided = slice(1, -1)  # the last token may be forced to end the text
    assert torch.equal(logits.argmax(-1)[:, : decided.stop], tokens[:, decided])
    assert written(model, num_beams=3)[1].shape == (2, 9)


def test_a_model_writes_what_teacher_forcing_scores_best(encoder, decoder):
    assert_writes_what_it_was_taught(joined(encoder, decoder))


@pytest.mark.parametrize("name", ["bart", "mbart", "plbart", "marian", "pegasus", "blenderbot", "blenderbot_small"])
def test_more_layers_than_the_absent_encoder_has_fit_the_cache(encoder, name):
    decoder = tiny_decoder(name, options={"decoder_layers": 3, "encoder_layers": 1})
    model = joined(encoder, decoder)
    assert model.config.decoder.num_hidden_layers == 3
    assert_writes_what_it_was_taught(model)


# --- 16 bits


def test_sixteen_bit_autocast_trains_every_family(encoder, decoder):
    labels = torch.tensor([[5, 6, 7, END], [5, END, -100, -100]])
    model = joined(encoder, decoder)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(2, 800), labels=labels).loss
    loss.backward()
    model.zero_grad()
    assert loss.isfinite()


# --- the last position

POSITIONS = {"options": {"max_position_embeddings": 12}}
LAST = dict.fromkeys(TABLES, 12 - PAD - 1)  # they skip the positions up to that of padding
TABLED = {"canary", "cohere_asr", "whisper"}
ENDLESS = {"xglm", "speech_to_text_2", *STACKS} - TABLED  # no table of positions


@pytest.mark.parametrize("name", OPTIONS)
def test_as_many_tokens_have_a_position_as_upstream_can_read(encoder, name):
    config = default_config("decoder", option_file("decoder", name)["model_type"])
    options = [each for each in ("max_position_embeddings", "max_target_positions") if hasattr(config, each)]
    decoder = tiny_decoder(name, options=dict.fromkeys(options[:1], 12))
    model = joined(encoder, decoder)
    if name in ENDLESS:
        assert model.max_tokens is None
        assert model.generate(torch.randn(2, 800), max_new_tokens=40, min_new_tokens=40).shape == (2, 41)
        return
    assert model.max_tokens == LAST.get(name, 12)
    ids = torch.full((1, model.max_tokens + 1), 5)
    states = torch.randn(1, 11, 144)
    with torch.inference_mode():
        assert decoder(input_ids=ids[:, :-1], encoder_hidden_states=states).logits.isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            decoder(input_ids=ids, encoder_hidden_states=states)


def test_sinusoids_that_are_computed_have_no_last_position():
    assert max_tokens(tiny_decoder("trocr", options={"use_learned_position_embeddings": False})) is None


def test_a_table_of_distances_is_none_of_positions():
    decoder = tiny_decoder("xglm")
    decoder.relative_position_embedding = torch.nn.Embedding(4, 2)
    assert max_tokens(decoder) is None
    decoder.positions = torch.nn.Embedding(6, 2)
    assert max_tokens(decoder) == 6


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "bart", "marian"])
def test_generation_ends_at_the_last_position(encoder, name):
    model = joined(encoder, tiny_decoder(name, **POSITIONS))
    for options in (
        {},
        {"num_beams": 3},
        {"use_cache": False},
        {"decoder_input_ids": torch.tensor([[START, 5, 6]] * 2)},
    ):
        tokens = model.generate(torch.randn(2, 800), max_new_tokens=40, min_new_tokens=40, **options)
        assert tokens.shape == (2, model.max_tokens + 1)


def test_labels_longer_than_the_positions_are_refused_with_both_numbers(encoder):
    model = joined(encoder, tiny_decoder("bert", **POSITIONS))
    with pytest.raises(UserError) as caught:
        model(torch.randn(1, 800), labels=torch.full((1, 13), 5))
    assert (caught.value.option, caught.value.value) == ("labels", (1, 13))
    assert caught.value.wrong == "a text of 13 tokens is too long for the decoder's 12 positions"
    assert caught.value.write == "write labels of at most 12 tokens"
