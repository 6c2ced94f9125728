"""Joint search and rescoring find what scoring every text finds."""

from functools import cache
from itertools import product

import pytest
import torch
from families import TOKENIZER, tiny_decoder
from tones import AB, END, PAD, START, batch_of, joined, two_tokens

from sedtrain.decoding.ctc import lattice_of
from sedtrain.decoding.generate import decode_batch
from sedtrain.decoding.options import DecodingOptions

SPOKEN = [token for token in range(len(AB)) if token not in (PAD, END)]


@pytest.fixture(scope="module", params=[0, 1])
def model(request):
    return two_tokens(request.param)


def short_batch(prompt):
    """Two utterances, of three and of two frames."""
    batch = batch_of([[5], [5]], seed=3)
    batch.inputs, batch.attention_mask = batch.inputs[:, :60].clone(), batch.attention_mask[:, :60].clone()
    batch.inputs[1, 45:] = batch.attention_mask[1, 45:] = 0
    batch.prompts = None if prompt is None else torch.tensor([prompt] * 2)
    return batch


@cache
@torch.inference_mode()
def all_scores(model, prompt):
    """For each utterance (text, decoder, CTC) of every text: the decoder's scores one by one, CTC's by torch."""
    batch = short_batch(prompt)
    encoded = model.encode(batch.inputs, batch.attention_mask)
    lattice = lattice_of(model, encoded)
    assert lattice.num_frames.tolist() == [3, 2]
    texts = [list(text) for length in range(4) for text in product(SPOKEN, repeat=length)]
    return [[scored(model, encoded.rows([row]), lattice, row, prompt, text) for text in texts] for row in range(2)]


def scored(model, audio, lattice, row, prompt, text):
    ids = torch.tensor([[*(prompt or [START]), *text, END]])
    log_probs = model(encoder_outputs=audio, decoder_input_ids=ids).logits[0].log_softmax(-1)
    decoder = sum(log_probs[u - 1, ids[0, u]].item() for u in range(len(prompt or [START]), ids.shape[1]))
    num_frames, num_tokens = lattice.num_frames[row], torch.tensor(len(text))
    heard, spoken = lattice.log_probs[row, :num_frames].clamp(min=-1e4), torch.tensor(text, dtype=torch.long)
    ctc = -torch.nn.functional.ctc_loss(heard, spoken, num_frames, num_tokens, reduction="sum", blank=PAD).item()
    return text, decoder, ctc


@pytest.mark.parametrize(("search", "weight"), [("joint", 0.3), ("joint", 1.0), ("rescore", 0.0), ("rescore", 0.3)])
@pytest.mark.parametrize("prompt", [None, (START, 5, 6)])
def test_a_wide_search_finds_the_best_of_all_texts(model, search, weight, prompt):
    """Of all texts that CTC can write."""
    options = DecodingOptions(
        search=search, ctc_weight=weight, num_beams=200, num_return_sequences=5, length_penalty=0.0
    )
    found = decode_batch(model, AB, short_batch(prompt), options)
    for each, scores in zip(found, all_scores(model, prompt), strict=True):
        joint = [((1 - weight) * decoder + weight * ctc, text) for text, decoder, ctc in scores if ctc > -1e3]
        best = sorted(joint, reverse=True)[: len(each.ids)]
        assert each.scores == pytest.approx([score for score, _ in best], abs=1e-4)
        assert each.ids == [text for _, text in best]


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart", "roberta"])
def test_without_weight_a_joint_beam_is_beam_search(family):
    model, batch = joined(tiny_decoder(family)), batch_of([[5, 6, 7], [8]])
    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 9}
    joint = decode_batch(model, TOKENIZER, batch, DecodingOptions(search="joint", ctc_weight=0.0, **options))
    assert joint == decode_batch(model, TOKENIZER, batch, DecodingOptions(**options))
