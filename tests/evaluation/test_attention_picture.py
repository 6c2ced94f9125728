"""Attention weights are those of transformers, times by CTC those of the whole lattice, of a bounded part of a text."""

import pytest
import torch
from families import DECODERS, tiny_decoder
from pairs import END, LABELS, ours_and_base, part, two_utterances
from tones import START, batch_of, two_tokens

from sedtrain.decoding import ctc
from sedtrain.decoding.alignment import align
from sedtrain.decoding.ctc import lattice_of
from sedtrain.evaluation import attention_picture
from sedtrain.evaluation.attention_picture import cross_attention, listen
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder


class Letters:
    def decode(self, tokens):
        return "abcdefghijklm"[tokens[0]]


def test_attention_is_the_mean_of_the_heads_and_layers_of_transformers():
    ours, base = ours_and_base("hubert", "bert")
    ours.decoder.config._attn_implementation = "sdpa"
    audio = {name: tensor[:1] for name, tensor in two_utterances().items()}
    expected = base(**audio, labels=LABELS[:1], output_attentions=True).cross_attentions
    encoded = ours.encode(audio["input_values"], audio["attention_mask"])
    weights = cross_attention(ours, encoded, LABELS[:1])
    torch.testing.assert_close(weights, torch.stack(expected).mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    assert ours.decoder.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", DECODERS)
def test_every_family_gives_attention_weights(name):
    model = SpeechEncoderDecoder(encoder=part("hubert"), decoder=tiny_decoder(name)).eval()
    model.set_special_tokens(1, 2, 0)
    weights = cross_attention(model, model.encode(torch.randn(1, 4000)), LABELS[:1].clamp(max=END))
    torch.testing.assert_close(weights.sum(1), torch.ones(4))


@pytest.mark.parametrize("chunk_elements", [1, 2**24])
def test_times_are_those_of_the_whole_lattice(chunk_elements, monkeypatch):
    monkeypatch.setattr(ctc, "ELEMENTS_AT_ONCE", chunk_elements)
    model, text = two_tokens(), [5, 6, 6, 5]
    batch = batch_of([text])
    found = listen(model, Letters(), batch)
    lattice = lattice_of(model, model.encode(batch.inputs, batch.attention_mask))
    [expected] = align(lattice, [text])
    scale = batch.seconds / int(lattice.num_frames)
    assert found.spans == [(token.start * scale, token.end * scale) for token in expected]
    assert found.tokens == ["f", "g", "g", "f"]
    assert found.attention.shape == (4, int(lattice.num_frames))


def test_of_a_long_text_the_first_tokens_are_looked_at_without_tags(monkeypatch):
    monkeypatch.setattr(attention_picture, "MOST_TOKENS", 3)
    model = two_tokens()
    batch = batch_of([[4, 5, 6, 6, 5, 6]], prompts=torch.tensor([[START, 4]]))
    found = listen(model, Letters(), batch)
    assert found.tokens == ["f", "g", "g"]
    assert (len(found.attention), len(found.spans)) == (3, 3)


def test_a_text_of_more_tokens_than_frames_and_a_model_without_ctc_have_no_times():
    model, batch = two_tokens(), batch_of([[5]])
    batch.labels = torch.tensor([[5, 6] * 40])
    assert listen(model, Letters(), batch).spans is None
    model.ctc_head = None
    assert listen(model, Letters(), batch_of([[5]])).spans is None
