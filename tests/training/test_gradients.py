"""The same update over any micro-batches and ranks; steps that are skipped."""

import copy
import json
import os
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from exactness import CUTS, KINDS, PRECISIONS, Loader, batch, new_module, trained, trainer_of
from torch.nn.utils import parameters_to_vector

from sedtrain.training.gradients import divide_gradients, multiply, skip

DOCS = Path(__file__).parents[2] / "docs/exactness.md"
BOUND = {"32-true": 1e-5, "bf16-mixed": 2.0**-7, "16-mixed": 2.0**-10}
ROWS = [(name, is_padded) for name in CUTS for is_padded in (False, True)]
pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`", "ignore:.*treespec, LeafSpec"
)


@pytest.fixture(scope="module")
def two_rank_updates(two_ranks):
    """(cut, precision, padded) -> the update, the micro-batches that synchronised, and `Update`, over two ranks."""
    results = torch.load(two_ranks / "out.0", weights_only=False)[0]
    return {key: each for key, each in results.items() if len(key) == 3}


@pytest.mark.parametrize("decoder", KINDS)
def test_the_update_of_each_kind_of_decoder_is_that_of_eight_at_once(two_ranks, decoder):
    expected = trained(CUTS["8 × 1"], decoder=decoder)[1]
    of_two_ranks = torch.load(two_ranks / "out.0", weights_only=False)[0]
    updates = [moved for key, moved in of_two_ranks.items() if key[1] == decoder]
    for name in ("1 × 8", "5, 1 and 2, × 3"):
        updates.append(trained(CUTS[name], is_padded=True, decoder=decoder)[1])
    assert len(updates) == 4
    assert max(difference(update, expected) for update in updates) < BOUND["32-true"]


@pytest.fixture(scope="module")
def updates(two_rank_updates):
    """(cut, precision, padded) -> the update of the weights."""
    alone = {
        (name, precision, is_padded): trained(CUTS[name], precision, is_padded)[1]
        for name, is_padded in ROWS
        for precision in PRECISIONS
        if len(CUTS[name]) == 1
    }
    return alone | {key: moved for key, (moved, *_) in two_rank_updates.items()}


def difference(update, expected):
    return ((update - expected).norm() / expected.norm()).item()


def by_hand(cut, precision, is_padded):
    """The update by the gradients of the micro-batches, added and divided in float64."""
    module, total, num_tokens = new_module(), 0.0, 0
    scale = 64.0 if precision == "16-mixed" else 1.0
    types = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    for utterances in [micro_batch for rank in cut for micro_batch in rank if micro_batch]:
        context = torch.autocast("cpu", types[precision], cache_enabled=False) if precision in types else nullcontext()
        with context:
            cross_entropy, count, ctc, *_ = module.losses(batch(utterances, is_padded))
        module.zero_grad()
        (scale * (0.7 * cross_entropy + 0.3 * ctc)).backward()
        total = total - parameters_to_vector([weight.grad for weight in module.parameters()]).double() / scale
        num_tokens += count
    return total / num_tokens


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("name", "is_padded"), ROWS)
def test_the_update_is_that_of_eight_at_once(updates, name, is_padded, precision):
    update = updates[name, precision, is_padded]
    assert update.norm() > 1
    assert difference(update, updates["8 × 1", precision, False]) < BOUND[precision]
    assert difference(update, by_hand(CUTS[name], precision, is_padded)) < 1e-5


def measured(updates):
    for name, is_padded in ROWS:
        numbers = [
            difference(updates[name, precision, is_padded], updates["8 × 1", precision, False])
            for precision in PRECISIONS
        ]
        yield f"| {name} | {'yes' if is_padded else 'no'} | {' | '.join(f'{each:.1e}' for each in numbers)} |"


def test_the_table_says_what_was_measured(updates):
    """The rows of this machine stand in it, or those of another that are within the bounds."""
    text = DOCS.read_text(encoding="utf-8")
    head, line, rows = text.partition("|---|---|---|---|---|\n")
    if os.environ.get("SEDTRAIN_WRITE_EXACTNESS"):
        rows = "\n".join(measured(updates)) + "\n"
        DOCS.write_text(head + line + rows, encoding="utf-8")
    cells = [re.findall(r"[^|]+", row) for row in rows.splitlines()]
    assert [(name.strip(), padded.strip() == "yes") for name, padded, *_ in cells] == ROWS
    for _, _, *numbers in cells:
        assert all(float(number) < BOUND[precision] for number, precision in zip(numbers, PRECISIONS, strict=True))


def test_gradients_are_reduced_over_the_ranks_once_a_step(two_rank_updates):
    for (name, *_), (_, synchronised, update) in two_rank_updates.items():
        num_micro_batches = len(CUTS[name][0])
        assert synchronised == [False] * (num_micro_batches - 1) + [True]
        assert update.num_tokens == 44


def test_the_loss_that_is_logged_is_the_mean_over_the_tokens_of_the_step():
    module, _ = trained(CUTS["5, 1 and 2, × 3"])
    cross_entropy, num_tokens, ctc, num_aligned, plain = new_module().losses(batch(range(8)))
    assert module.update.num_tokens == num_tokens == 44
    assert module.trainer.callback_metrics["train/loss"].item() == pytest.approx(cross_entropy.item() / 44, rel=1e-5)
    assert module.trainer.callback_metrics["train/cross_entropy"].item() == pytest.approx(plain.item() / 44, rel=1e-5)
    expected = ctc.item() / num_aligned.item()
    assert module.trainer.callback_metrics["train/ctc_loss"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["8 × 1", "1 × 8", "5, 1 and 2, × 3"])
def test_the_gradient_is_clipped_after_it_is_divided(name):
    _, free = trained(CUTS[name])
    module, clipped = trained(CUTS[name], gradient_clip_val=0.5)
    assert module.update.gradient_norm == pytest.approx(free.norm().item(), rel=1e-4)
    assert clipped.norm().item() == pytest.approx(0.5, rel=1e-4)
    assert difference(clipped, 0.5 * free / free.norm()) < 1e-4
    _, untouched = trained(CUTS[name], gradient_clip_val=100.0)
    assert difference(untouched, free) < 1e-6


def test_the_norms_of_the_parts_make_that_of_the_whole():
    module, update = trained(CUTS["4 × 2"])
    assert set(module.update.gradient_norms) == {"encoder", "adapter", "cross_attention", "decoder", "ctc_head"}
    assert module.update.gradient_norm == pytest.approx(update.norm().item(), rel=1e-4)


def test_the_last_step_of_an_epoch_may_have_fewer_micro_batches():
    module, start = new_module(), parameters_to_vector(new_module().parameters()).detach()
    first, last = [[0, 1], [2, 3]], [4, 5, 6, 7]
    trainer = trainer_of("32-true", accumulate_grad_batches=2, max_epochs=1, max_steps=-1)
    trainer.fit(module, Loader([batch(each) for each in [*first, last]]))
    assert trainer.global_step == 2
    again, expected = new_module(), start
    for utterances in ([0, 1, 2, 3], last):
        again.zero_grad()
        cross_entropy, num_tokens, ctc, *_ = again.losses(batch(utterances))
        ((0.7 * cross_entropy + 0.3 * ctc) / num_tokens).backward()
        with torch.no_grad():
            for weight in again.parameters():
                weight -= weight.grad
    expected = parameters_to_vector(again.parameters()).detach()
    moved = parameters_to_vector(module.parameters()).detach() - start
    assert difference(moved, expected - start) < 1e-5


# --- skipped steps


def test_a_step_is_skipped_on_every_rank_where_one_has_a_bad_batch(two_ranks):
    weights = [torch.load(two_ranks / f"out.{rank}", weights_only=False)[1] for rank in (0, 1)]
    assert torch.equal(*weights)
    [line] = map(json.loads, (two_ranks / "bad_steps.jsonl").read_text().splitlines())
    assert (line["step"], line["reason"], line["utterances"]) == (2, "the loss is not finite", ["utterance 7"])
    good = new_module()
    batches = [batch([each]) for each in [0, 1, 4, 5, 0, 1, 4, 5]]
    trainer_of("32-true", max_steps=2, accumulate_grad_batches=4).fit(good, Loader(batches))
    start = parameters_to_vector(new_module().parameters()).detach()
    assert difference(weights[0] - start, parameters_to_vector(good.parameters()).detach() - start) < 1e-5


def nan_batch(utterances):
    spoilt = batch(utterances)
    spoilt.inputs[0, 7] = torch.nan
    return spoilt


@pytest.mark.parametrize("empty", [nan_batch([1]), batch([])], ids=["not finite", "without utterances"])
def test_a_skipped_step_moves_neither_weights_nor_the_state_of_the_optimizer(empty):
    """AdamW moves weights by its momentum, and by decay, where the gradient is zero."""
    states = []
    for batches in ([batch([0]), empty], [batch([0])]):
        module = new_module()
        module.optimizer = torch.optim.AdamW
        trainer = trainer_of("32-true", max_steps=len(batches))
        trainer.fit(module, Loader(batches))
        assert trainer.global_step == len(batches)
        states.append((module.state_dict(), trainer.optimizers[0].state_dict()["state"]))
    (weights, moments), (expected_weights, expected_moments) = states
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)
    assert all(torch.equal(moments[each]["exp_avg"], expected_moments[each]["exp_avg"]) for each in expected_moments)
    assert all(moments[each]["step"] == 1 for each in moments)


class OverFrames(torch.nn.BatchNorm1d):
    """(B, T, E) normalized over utterances and frames."""

    def forward(self, frames):
        return super().forward(frames.transpose(1, 2)).transpose(1, 2)


def test_a_skipped_step_leaves_no_trace_in_batch_norms():
    """A NaN in a running mean would be in every validation after it."""
    statistics = []
    for batches in ([batch([0]), nan_batch([1]), batch([2])], [batch([0]), batch([2])]):
        module = new_module()
        norm = module.model.encoder.feature_projection.layer_norm = OverFrames(8)
        trainer_of("32-true", max_steps=len(batches)).fit(module, Loader(batches))
        statistics.append(dict(norm.named_buffers()))
    assert statistics[1]["num_batches_tracked"] == 2
    for name, expected in statistics[1].items():
        assert torch.equal(statistics[0][name], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_multiplied_by_the_factor_itself_and_rounded_once(dtype):
    gradients = [torch.randn(3, 5).to(dtype), torch.randn(()).to(dtype)]
    factor = torch.tensor(1024 / 37)
    expected = [(each.double() * factor.double()).to(dtype) for each in gradients]
    multiply(gradients, factor)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(
            found, wanted, rtol=torch.finfo(torch.float32).eps if dtype is torch.float32 else 0, atol=0
        )


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("is_fused", [True, False])
def test_a_bad_step_leaves_weights_and_moments_as_they_were(optimizer, is_fused):
    model = torch.nn.Linear(3, 2)
    stepper = optimizer(model.parameters(), lr=0.1, weight_decay=0.1, fused=is_fused)

    def step(value):
        for weight in model.parameters():
            weight.grad = torch.full_like(weight, value)
        micro_batches = torch.tensor([[value, 4.0, 0.0, 0.0, value]])
        update = divide_gradients(model, micro_batches, lambda sums: sums, num_ranks=1)
        skip(update, stepper, model)
        stepper.step()
        return copy.deepcopy((parameters_to_vector(model.parameters()).detach(), stepper.state_dict()["state"]))

    good, bad = step(0.5), step(torch.nan)
    assert torch.equal(good[0], bad[0])
    assert str(good[1]) == str(bad[1])
    assert not torch.equal(step(0.5)[0], bad[0])
