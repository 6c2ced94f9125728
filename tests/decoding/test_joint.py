"""Joint search and rescoring find what scoring every text finds."""

from itertools import product

import pytest
import torch
from families import TOKENIZER, tiny_decoder
from tones import AB, END, PAD, START, batch_of, joined, two_tokens

from sedtrain.decoding.ctc import lattice_of
from sedtrain.decoding.generate import DecodingOptions, decode_batch

SPOKEN = [token for token in range(len(AB)) if token not in (PAD, END)]
PROMPTS = [None, [START, 5, 6]]
EVERY = {"num_beams": 200, "num_return_sequences": 5, "length_penalty": 0.0}


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


@torch.inference_mode()
def every_text(model, batch, weight):
    """For each utterance, all texts with their joint scores, the best first: the decoder's one by one, CTC's by torch."""
    encoded = model.encode(batch.inputs, batch.attention_mask)
    lattice = lattice_of(model, encoded)
    assert lattice.num_frames.tolist() == [3, 2]
    texts = [list(text) for length in range(4) for text in product(SPOKEN, repeat=length)]
    prompt = [START] if batch.prompts is None else batch.prompts[0].tolist()
    found = []
    for row in range(2):
        audio = encoded.rows([row])
        scores = []
        for text in texts:
            ids = torch.tensor([prompt + text + [END]])
            log_probs = model(encoder_outputs=audio, decoder_input_ids=ids).logits[0].log_softmax(-1)
            spoken = range(len(prompt) - 1, ids.shape[1] - 1)
            decoder = sum(log_probs[u, ids[0, u + 1]].item() for u in spoken)
            ctc = -torch.nn.functional.ctc_loss(
                lattice.log_probs[row, : lattice.num_frames[row]].clamp(min=-1e4), torch.tensor(text, dtype=torch.long),
                lattice.num_frames[row], torch.tensor(len(text)), reduction="sum", blank=PAD,
            ).item()  # fmt: skip
            joint = (1 - weight) * decoder + (weight * ctc if weight else 0.0)
            scores.append(joint if ctc > -1e3 or not weight else -torch.inf)
        found.append(sorted(zip(scores, texts, strict=True), reverse=True))
    return found


def assert_best(found, expected):
    for each, all_texts in zip(found, expected, strict=True):
        best = all_texts[: len(each.ids)]
        assert each.scores == pytest.approx([score for score, _ in best], abs=1e-4)
        assert each.ids == [text for _, text in best]


@pytest.mark.parametrize("weight", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_wide_joint_beam_finds_the_best_of_all_texts(model, weight, prompt):
    batch = short_batch(prompt)
    found = decode_batch(model, AB, batch, DecodingOptions(search="joint", ctc_weight=weight, **EVERY))
    assert_best(found, every_text(model, batch, weight))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_rescoring_every_text_finds_the_best(model, weight, prompt):
    batch = short_batch(prompt)
    found = decode_batch(model, AB, batch, DecodingOptions(search="rescore", ctc_weight=weight, **EVERY))
    expected = every_text(model, batch, weight)
    possible = {
        row: {tuple(text) for score, text in texts if score > -torch.inf}
        for row, texts in enumerate(every_text(model, batch, 1.0))
    }
    assert_best(
        found, [[each for each in texts if tuple(each[1]) in possible[row]] for row, texts in enumerate(expected)]
    )


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart", "roberta"])
def test_without_weight_a_joint_beam_is_beam_search(family):
    model, batch = joined(tiny_decoder(family)), batch_of([[5, 6, 7], [8]])
    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 9}
    joint = decode_batch(model, TOKENIZER, batch, DecodingOptions(search="joint", ctc_weight=0.0, **options))
    assert joint == decode_batch(model, TOKENIZER, batch, DecodingOptions(**options))
