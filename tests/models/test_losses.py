"""The label shift and the losses, against transformers, torch and brute force."""

from itertools import groupby, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.models.speech_encoder_decoder.modeling_speech_encoder_decoder import shift_tokens_right

from sedtrain.batch import IGNORE_INDEX
from sedtrain.models.losses import ctc, shift_right, token_cross_entropy, without_token

BLANK, END = 0, 2


def rows(draw_from):
    """Rectangular lists of label ids."""
    return st.integers(1, 6).flatmap(
        lambda width: st.lists(st.lists(draw_from, min_size=width, max_size=width), min_size=1, max_size=4)
    )


labels_or_padding = st.sampled_from([IGNORE_INDEX, 0, 1, 2, 3, 4])


@given(rows(labels_or_padding), st.integers(0, 4), st.integers(0, 4))
def test_the_shift_is_that_of_transformers(ids, start, pad):
    labels = torch.tensor(ids)
    expected = shift_tokens_right(labels, pad_token_id=pad, decoder_start_token_id=start)
    assert torch.equal(shift_right(labels, start, pad), expected)


def test_the_shift_leaves_its_argument_as_it_was():
    labels = torch.tensor([[3, IGNORE_INDEX]])
    shift_right(labels, 1, 0)
    assert labels.tolist() == [[3, IGNORE_INDEX]]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_sum_over_target_tokens_and_their_number(label_smoothing):
    logits = torch.randn(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, 3, 4, 2], [5, 2, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX], [IGNORE_INDEX] * 5])
    loss, num_tokens, plain = token_cross_entropy(logits.requires_grad_(), labels, label_smoothing)
    by_hand = torch.zeros((), dtype=torch.float64)
    for row, target in zip(logits.flatten(0, 1), labels.flatten().tolist(), strict=True):
        if target != IGNORE_INDEX:
            log_probabilities = row.log_softmax(0)
            by_hand -= (1 - label_smoothing) * log_probabilities[target] + label_smoothing * log_probabilities.mean()
    assert num_tokens == 7
    torch.testing.assert_close(loss.double(), by_hand, rtol=1e-5, atol=0)
    mean = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=label_smoothing)
    torch.testing.assert_close((loss / num_tokens).double(), mean, rtol=1e-5, atol=0)
    without = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").detach()
    torch.testing.assert_close(plain.double(), without, rtol=1e-5, atol=0)
    assert not plain.requires_grad


def test_cross_entropy_of_half_precision_logits_is_summed_in_float32():
    logits = torch.zeros(1, 1000, 50, dtype=torch.bfloat16)
    loss, *_ = token_cross_entropy(logits, torch.ones(1, 1000, dtype=torch.long))
    torch.testing.assert_close(loss, 1000 * torch.tensor(50.0).log())


def test_a_batch_without_target_tokens_has_zero_loss_and_a_finite_gradient():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss, num_tokens, plain = token_cross_entropy(logits, torch.full((2, 3), IGNORE_INDEX), 0.1)
    loss.backward()
    assert loss == plain == 0
    assert num_tokens == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def frame_logits(num_rows, num_frames, vocab_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, num_frames, vocab_size, generator=generator, requires_grad=True)


def test_ctc_is_the_sum_of_torch_s_losses():
    logits, num_frames = frame_logits(3, 12, 6), torch.tensor([12, 9, 7])
    texts = [[3, 4, 5], [3, 3], [4]]
    labels = torch.full((3, 4), IGNORE_INDEX)
    for row, text in zip(labels, texts, strict=True):
        row[: len(text) + 1] = torch.tensor([*text, END])
    loss, num_tokens = ctc(logits, num_frames, labels, blank=BLANK, end=END)
    expected = torch.zeros(())
    for row, length, text in zip(logits.log_softmax(-1), num_frames.tolist(), texts, strict=True):
        targets, lengths = torch.tensor([text]), ((length,), (len(text),))
        expected = expected + nn.functional.ctc_loss(row[:length, None], targets, *lengths, reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert num_tokens == 6
    loss.backward()
    assert logits.grad[1, 9:].abs().max() == 0
    assert logits.grad[1, :9].abs().min() > 0


def probability_by_brute_force(log_probabilities, text):
    """The sum over every path of symbols that reads as `text` once repeats, then blanks, are taken out."""
    num_frames, vocab_size = log_probabilities.shape
    total = 0.0
    for path in product(range(vocab_size), repeat=num_frames):
        if [symbol for symbol, _ in groupby(path) if symbol != BLANK] == text:
            total += log_probabilities[range(num_frames), path].sum().exp().item()
    return total


@pytest.mark.parametrize("text", [[1], [1, 1], [1, 3], [3, 1, 3]])
def test_ctc_sums_over_all_alignments(text):
    logits = frame_logits(1, 5, 4, seed=1).detach().double()
    loss, num_tokens = ctc(logits, torch.tensor([5]), torch.tensor([[*text, END]]), blank=BLANK, end=END)
    expected = probability_by_brute_force(logits[0].log_softmax(-1), text)
    assert (-loss).exp().item() == pytest.approx(expected, rel=1e-5)
    assert num_tokens == len(text)


@pytest.mark.parametrize(("num_frames", "text"), [(2, [1, 3, 1]), (2, [1, 1]), (3, [1, 1, 3])])
def test_an_utterance_too_short_for_its_text_adds_no_loss_and_no_tokens(num_frames, text):
    logits = frame_logits(2, 6, 4)
    labels = torch.tensor([[*text, END], [3, END] + [IGNORE_INDEX] * (len(text) - 1)])
    loss, num_tokens = ctc(logits, torch.tensor([num_frames, 6]), labels, blank=BLANK, end=END)
    alone, alone_tokens = ctc(logits[1:], torch.tensor([6]), labels[1:], blank=BLANK, end=END)
    torch.testing.assert_close(loss, alone)
    assert num_tokens == alone_tokens == 1
    loss.backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0].abs().max() == 0


def test_one_frame_more_and_a_repeated_token_can_be_aligned():
    logits = frame_logits(1, 3, 4)
    loss, num_tokens = ctc(logits, torch.tensor([3]), torch.tensor([[1, 1, END]]), blank=BLANK, end=END)
    assert loss > 0
    assert num_tokens == 2


def test_ctc_of_nothing_but_padding_is_zero():
    logits = frame_logits(2, 4, 5)
    loss, num_tokens = ctc(logits, torch.tensor([4, 0]), torch.full((2, 3), IGNORE_INDEX), blank=BLANK, end=END)
    loss.backward()
    assert num_tokens == 0
    assert logits.grad.isfinite().all()


@given(rows(labels_or_padding), st.integers(0, 4))
def test_a_token_is_taken_out_and_the_rest_keeps_its_order(ids, token):
    moved, num_kept = without_token(torch.tensor(ids), token)
    for row, new_row, number in zip(ids, moved.tolist(), num_kept.tolist(), strict=True):
        kept = [label for label in row if label not in (IGNORE_INDEX, token)]
        assert number == len(kept)
        assert new_row == kept + [0] * (len(row) - len(kept))
