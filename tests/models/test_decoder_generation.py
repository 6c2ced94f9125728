"""Every family of decoder writes with its cache what it writes without and what it learns by teacher forcing."""

import pytest
import torch
from families import DECODERS, tiny_decoder
from transformers import HubertConfig, HubertModel

from sedtrain.models.decoder import decoder_positions
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

PAD, START, END = 0, 1, 2
COUNTING = ["camembert", "data2vec_text", "roberta", "xlm_roberta", "xmod"]


@pytest.fixture(scope="module", params=DECODERS)
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


@pytest.mark.parametrize("name", DECODERS)
def test_positions_are_given_to_the_families_that_skip_pad_tokens(name):
    decoder = tiny_decoder(name)
    ids = torch.tensor([[START, 5, 6], [PAD, PAD, 7]])
    positions = decoder_positions(decoder, ids)
    if name not in COUNTING:
        assert positions == {}
        return
    embeddings = decoder.base_model.embeddings
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
