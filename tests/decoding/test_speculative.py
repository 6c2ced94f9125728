"""Speculative search writes the ids of greedy search, whatever the draft is, in fewer calls of the decoder."""

import random
from unittest.mock import patch

import pytest
import torch
from families import DECODERS, TOKENIZER, tiny_decoder
from test_loop import LEFT_TO_GENERATE
from tones import END, START, TOKENS, batch_of, drawn_texts, joined, train
from transformers import LogitsProcessorList, StoppingCriteriaList

from sedtrain.decoding.generate import decode_batch
from sedtrain.decoding.loop import Task
from sedtrain.decoding.options import DecodingOptions
from sedtrain.decoding.searches import OwnLimit
from sedtrain.decoding.speculative import speculate
from sedtrain.models.steps import Steps, decoder_steps

TEXTS = [[5, 6, 7, 8, 9], [9, 8], [7, 7, 7, 6]]


@pytest.fixture(scope="module", params=[each for each in DECODERS if each not in LEFT_TO_GENERATE])
def model(request):
    return joined(tiny_decoder(request.param))


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def trained(request):
    return train(joined(tiny_decoder(request.param)))


def number_of_calls(model, search):
    """What the search returns, and how often it calls the decoder."""
    decoder_steps(model)  # the first call compares the steps with the decoder
    calls = []
    hook = model.decoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        with patch.object(Steps, "step", autospec=True, side_effect=Steps.step) as step:
            return search(), len(calls) + step.call_count
    finally:
        hook.remove()


def searches(model, drafts, most=10, prompts=None):
    """The tokens of greedy search and of speculative search from drafts, and the calls of each."""
    batch = batch_of(TEXTS)
    with torch.inference_mode():
        encoded = model.encode(batch.inputs, batch.attention_mask)
    prompts = torch.full((len(TEXTS), 1), START) if prompts is None else prompts
    options = {"encoder_outputs": encoded, "decoder_input_ids": prompts, "max_new_tokens": most, "do_sample": False}
    limits = torch.full((len(TEXTS),), most)
    options["stopping_criteria"] = StoppingCriteriaList([OwnLimit(prompts.shape[1] + limits)])
    options["max_new_tokens"] = most + 1  # else BART is forced to end there
    expected, by_greedy = number_of_calls(model, lambda: model.generate(**options))
    task = Task(decoder_steps(model), encoded, prompts, limits, [END], LogitsProcessorList())
    written, by_speculation = number_of_calls(model, lambda: speculate(task, drafts))
    return texts_of(expected[:, prompts.shape[1] :]), texts_of(written), by_greedy, by_speculation


def texts_of(rows):
    return [
        row[: row.index(END)] if END in row else row
        for row in (rows.tolist() if isinstance(rows, torch.Tensor) else rows)
    ]


def damaged(text, seed):
    """The text with tokens left out, added and replaced."""
    draw = random.Random(seed)
    kept = [token for token in text if draw.random() > 0.2]
    replaced = [draw.choice(TOKENS) if draw.random() < 0.2 else token for token in kept]
    return [each for token in replaced for each in ([token] if draw.random() > 0.2 else [draw.choice(TOKENS), token])]


def test_a_draft_that_is_right_takes_one_call(model):
    drafts, *_ = searches(model, [[]] * 3)
    expected, written, by_greedy, by_speculation = searches(model, drafts)
    assert written == expected == drafts
    assert by_speculation == 1 < by_greedy


@pytest.mark.parametrize("seed", range(2))
def test_a_wrong_draft_changes_no_token(model, seed):
    texts = searches(model, [[]] * 3)[0]
    drafts = [damaged(text, seed + 10 * row) for row, text in enumerate(texts)]
    expected, written, by_greedy, by_speculation = searches(model, drafts)
    assert written == expected
    assert by_speculation <= by_greedy


@pytest.mark.parametrize("most", [1, 2, 5])
def test_no_text_is_longer_than_greedy_search_may_write(trained, most):
    expected, written, *_ = searches(trained, TEXTS, most)
    assert written == expected


def test_prompts_act_as_in_greedy_search(trained):
    prompts = torch.tensor([[START, 11, 12], [START, 5, 6], [START, 8, 8]])
    texts = searches(trained, [[]] * 3, prompts=prompts)[0]
    for drafts in (texts, TEXTS, [damaged(text, 0) for text in texts]):
        expected, written, *_ = searches(trained, drafts, prompts=prompts)
        assert written == expected


def test_settings_that_change_scores_are_left_to_greedy_search(trained):
    batch, options = batch_of(TEXTS), {"no_repeat_ngram_size": 2}
    greedy = decode_batch(trained, TOKENIZER, batch, DecodingOptions(**options))
    assert decode_batch(trained, TOKENIZER, batch, DecodingOptions(search="speculative", **options)) == greedy


def decoded(model, search, prompts=None):
    """The hypotheses of twelve utterances, and the calls of the decoder."""
    batch = batch_of(drawn_texts(12, seed=7), seed=7, prompts=prompts)
    return number_of_calls(model, lambda: decode_batch(model, TOKENIZER, batch, DecodingOptions(search=search)))


def decoded_alone(model, search):
    """The hypotheses of twelve utterances, each decoded alone, and the calls of the decoder."""
    batches, options = [batch_of([text]) for text in drawn_texts(12, seed=7)], DecodingOptions(search=search)
    return number_of_calls(model, lambda: [decode_batch(model, TOKENIZER, each, options)[0] for each in batches])


def test_drafts_of_ctc_save_calls_and_change_no_text(trained):
    names = ("attention", "speculative", "ctc")
    (greedy, by_greedy), (speculative, by_speculation), (drafts, no_calls) = (
        decoded_alone(trained, name) for name in names
    )
    assert speculative == greedy
    assert by_speculation < by_greedy
    assert no_calls == 0
    agreeing = sum(draft.ids == each.ids for draft, each in zip(drafts, greedy, strict=True))
    assert agreeing < len(greedy)  # the decoder has corrected some


@pytest.mark.parametrize("family", ["bart", "xglm"])
def test_drafts_of_random_weights_change_no_text_behind_prompts(family):
    model, prompts = joined(tiny_decoder(family)), torch.tensor([[START, 11, 12]] * 12)
    assert decoded(model, "speculative", prompts)[0] == decoded(model, "attention", prompts)[0]
