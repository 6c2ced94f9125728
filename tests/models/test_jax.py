"""The model under JAX beside the model in PyTorch: logits, ids, compilations and files."""

import numpy as np
import pytest
import torch
from pairs import IDS, joined, two_utterances

jax = pytest.importorskip("jax")
pytest.importorskip("torchax", minversion="0.0.14.dev")

from sedtrain.models.jax import FlaxSpeechEncoderDecoderModel  # noqa: E402

AUDIO, MASK = (each.numpy() for each in two_utterances().values())


@pytest.fixture(scope="module")
def model():
    return joined("wav2vec2", "bart")


@pytest.fixture(scope="module")
def under_jax(model):
    return FlaxSpeechEncoderDecoderModel(model)


@pytest.fixture(scope="module")
def traces(model):
    """Grows by one each time that the decoder is traced."""
    found = []
    model.decoder.register_forward_pre_hook(lambda *_: found.append(1))
    return found


def test_logits_are_those_of_pytorch_compiled_once_for_a_shape(model, under_jax, traces):
    with torch.no_grad():
        expected = model(**two_utterances(), decoder_input_ids=IDS).logits
    traces.clear()
    for ids in (IDS, IDS.flip(0)):
        output = under_jax(AUDIO, MASK, decoder_input_ids=ids.numpy())
        assert isinstance(output.logits, jax.Array)
        if ids is IDS:
            np.testing.assert_allclose(output.logits, expected, atol=1e-4, rtol=0)
            assert output[0] is output.logits
    assert len(traces) == 1


def test_greedy_decoding_writes_the_ids_of_pytorch(model, under_jax):
    for options in ({"max_new_tokens": 12}, {"max_length": 7, "forced_bos_token_id": 9, "forced_eos_token_id": 2}):
        expected = model.generate(**two_utterances(), num_beams=1, do_sample=False, **options)
        assert under_jax.generate(AUDIO, MASK, **options).sequences.tolist() == expected.tolist()
