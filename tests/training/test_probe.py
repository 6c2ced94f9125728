"""How much the right audio lowers the decoder's loss, against audio exchanged by hand."""

import pytest
import torch
from exactness import batch, new_module

from sedtrain.training.guards import OtherAudio


@pytest.fixture
def module():
    return listening("bert")


def listening(decoder):
    """One whose decoder listens more than random weights of 0.02 do."""
    module = new_module(decoder).eval()
    for name, weight in module.model.named_parameters():
        if ("crossattention" in name or "decoder.model.layers" in name) and weight.ndim == 2:
            weight.data *= 20
    return module


def sums_of(module, *batches):
    total = torch.zeros(4)
    with torch.no_grad():
        for each in batches:
            encoded = module.model.encode(each.inputs, each.attention_mask)
            total += module.probe(encoded, each.labels)
    return total.tolist()


def loss_of(module, text, audio, most=100):
    """The summed cross-entropy of the first tokens of an utterance's text with the audio of another, alone and unpadded."""
    with torch.no_grad():
        encoded = module.model.encode(batch([audio]).inputs, batch([audio]).attention_mask)
        return module.cross_entropy(encoded, batch([text]).labels[:, :most])[0].item()


@pytest.mark.parametrize("decoder", ["bert", "llama"])
def test_every_utterance_gets_the_audio_of_the_one_before_it(decoder):
    module = listening(decoder)
    own, num_tokens, gain, num_compared = sums_of(module, batch([0, 3, 1]))
    expected = loss_of(module, 0, audio=1) + loss_of(module, 3, audio=0) + loss_of(module, 1, audio=3)
    assert own == pytest.approx(sum(loss_of(module, each, audio=each) for each in (0, 3, 1)), rel=1e-5)
    assert gain == pytest.approx(expected - own, abs=3e-5)  # of sums of 80 nats in float32
    assert num_tokens == num_compared == 3 + 10 + 8 and abs(gain) > 1e-4


def test_of_a_text_longer_than_the_decoder_the_first_tokens_count(module):
    audio = batch([3])
    with torch.no_grad():
        encoded = module.model.encode(audio.inputs, audio.attention_mask)
        expected = module.cross_entropy(encoded, audio.labels[:, :4])[0].item()
    module.model.max_tokens = 4
    loss, num_tokens, *_ = sums_of(module, audio)
    assert (loss, num_tokens) == (pytest.approx(expected, rel=1e-6), 4)


def test_behind_a_prefix_each_text_is_cut_to_the_positions_that_its_own_audio_leaves():
    module = listening("llama")
    module.model.max_tokens = module.model.encode(batch([3]).inputs).last_hidden_state.shape[1] + 4
    loss, num_tokens, gain, num_compared = sums_of(module, batch([1, 3]))
    assert (num_tokens, num_compared) == (8 + 4, 4 + 4)
    assert loss == pytest.approx(loss_of(module, 1, audio=1) + loss_of(module, 3, audio=3, most=4), rel=1e-5)
    pairs = [(1, 3), (3, 1)]
    expected = sum(loss_of(module, text, audio, 4) - loss_of(module, text, text, 4) for text, audio in pairs)
    assert gain == pytest.approx(expected, abs=3e-5)


def test_an_utterance_alone_in_its_batch_gets_the_audio_of_the_previous_batch(module):
    _, num_tokens, gain, num_compared = sums_of(module, batch([5]), batch([3]), batch([1, 2]), batch([0]))
    pairs = [(3, 5), (1, 2), (2, 1), (0, 1)]
    expected = sum(loss_of(module, text, audio) - loss_of(module, text, text) for text, audio in pairs)
    assert gain == pytest.approx(expected, rel=1e-3)
    assert num_tokens - num_compared == 5  # nothing came before the first


def test_a_decoder_that_does_not_listen_gains_nothing(module):
    for name, weight in module.model.named_parameters():
        if "crossattention.output.dense" in name:
            weight.data.zero_()
    _, _, gain, num_compared = sums_of(module, batch([0, 3, 1]))
    assert abs(gain / num_compared) < 1e-6


def test_a_model_without_masks_is_probed_too(module):
    encoded = module.model.encode(torch.randn(2, 4000))
    other = OtherAudio().exchanged(encoded)
    assert other.attention_mask is None
    assert torch.equal(other.last_hidden_state, encoded.last_hidden_state.flip(0))
