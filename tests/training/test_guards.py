"""Bad steps are skipped, named and counted; too many stop the run; a decoder that does not listen is reported."""

import io
import json
import logging
import math
import re
from collections import deque
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from exactness import Loader, batch, new_module, trainer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.nn.utils import parameters_to_vector

from sedtrain.errors import UserError
from sedtrain.training import guards
from sedtrain.training.gradients import SCALE, Update
from sedtrain.training.guards import Guards, lasting_rise

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:.*treespec, LeafSpec",
    "ignore:Detected call of `lr_scheduler.step",
)


class Spoil(lightning.Callback):
    """Makes the audio of some batches, or the gradient after them, what is not finite."""

    def __init__(self, audio=(), gradient=()):
        self.audio, self.gradient, self.batch = audio, gradient, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batch = batch_idx
        if batch_idx in self.audio:
            batch.inputs[0, 7] = torch.nan

    def on_after_backward(self, trainer, pl_module):
        if self.batch in self.gradient:
            next(pl_module.parameters()).grad[0] = torch.inf


def fitted(guard, *callbacks, utterances=((0,), (1,), (2,), (3,)), precision="32-true", **options):
    module = new_module()
    options = {"max_steps": len(utterances), "log_every_n_steps": 1, **options}
    trainer = trainer_of(precision, callbacks=[*callbacks, guard], **options)
    trainer.fit(module, Loader([batch(each) for each in utterances]))
    return module


def lines(folder):
    return [json.loads(line) for line in (folder / "bad_steps.jsonl").read_text().splitlines()]


def test_a_batch_with_nan_is_skipped_named_and_counted(tmp_path, caplog):
    guard = Guards(str(tmp_path))
    with caplog.at_level(logging.WARNING, "sedtrain"):
        module = fitted(guard, Spoil(audio=[1]))
    without = fitted(Guards(str(tmp_path)), utterances=[(0,), (2,), (3,)])
    assert torch.equal(parameters_to_vector(module.parameters()), parameters_to_vector(without.parameters()))
    [line] = lines(tmp_path)
    assert line == {
        "step": 2,
        "reason": "the loss is not finite",
        "skipped": True,
        "loss": "nan",
        "ctc_loss": "nan",
        "gradient_norm": "nan",
        "utterances": ["utterance 1"],
    }
    assert (guard.num_bad, guard.num_in_a_row) == (1, 0)
    assert module.trainer.callback_metrics["train/bad_steps"] == 1
    assert (
        "step 2: the loss is not finite (loss nan, gradient norm nan), skipped; its 1 utterances are in" in caplog.text
    )
    assert f"1 steps were skipped, since their loss or gradient is not finite; see {tmp_path}" in caplog.text


def test_of_several_micro_batches_the_bad_one_is_named(tmp_path):
    fitted(Guards(str(tmp_path)), Spoil(audio=[2]), max_steps=1, accumulate_grad_batches=4)
    assert lines(tmp_path)[0]["utterances"] == ["utterance 2"]


def test_where_only_the_gradient_is_not_finite_every_utterance_of_the_step_is_named(tmp_path):
    fitted(Guards(str(tmp_path)), Spoil(gradient=[3]), max_steps=2, accumulate_grad_batches=2)
    [line] = lines(tmp_path)
    assert (line["step"], line["reason"]) == (2, "the gradient is not finite")
    assert math.isfinite(line["loss"])
    assert line["gradient_norm"] == "inf"
    assert line["utterances"] == ["utterance 2", "utterance 3"]


def test_a_run_that_makes_only_bad_steps_ends_with_a_message(tmp_path):
    with pytest.raises(UserError) as raised:
        fitted(Guards(str(tmp_path), max_bad_steps=2), Spoil(audio=[0, 2, 3]))
    assert str(raised.value) == (
        "1 problem:\n\n  callbacks.guards.max_bad_steps = 2\n"
        "    2 steps in a row were skipped, since their loss or gradient is not finite\n"
        f"    {tmp_path}/bad_steps.jsonl names their utterances\n"
        "    write a lower optimizer.lr, trainer.precision=32-true, or data without these utterances; "
        "a higher callbacks.guards.max_bad_steps lets the run continue for longer"
    )
    assert [line["step"] for line in lines(tmp_path)] == [1, 3, 4]


def half(init_scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    return {"precision": None, "plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def test_gradients_too_large_for_float16_are_the_scaler_s_business(tmp_path):
    guard = Guards(str(tmp_path), max_bad_steps=1)
    module = fitted(guard, **half(2.0**60))
    assert guard.num_bad == 0
    assert module.trainer.precision_plugin.scaler.get_scale() == 2.0**56
    assert torch.equal(parameters_to_vector(module.parameters()), parameters_to_vector(new_module().parameters()))


def test_gradients_too_large_for_float16_at_any_scale_are_not(tmp_path):
    with pytest.raises(UserError, match=r"3 steps in a row"):
        fitted(Guards(str(tmp_path), max_bad_steps=3), Spoil(gradient=range(4)), **half(1.0))


def rises(losses, least=0.5):
    """The steps after which a run with these losses warns."""
    seen, steps = deque(maxlen=guards.HISTORY + guards.LASTING), []
    for step, loss in enumerate(losses):
        seen.append(loss)
        if lasting_rise(seen, least):
            steps.append(step)
            seen.clear()
    return steps


@st.composite
def healthy_losses(draw):
    """Losses of a run that learns: means over batches of few tokens, whose own losses have a long tail."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    floor, start, decay = draw(st.floats(0.01, 2)), draw(st.floats(0, 8)), draw(st.floats(20, 500))
    tokens = random.integers(1, draw(st.integers(2, 500)), 250)
    expected = floor + start * np.exp(-np.arange(250) / decay)
    shape = draw(st.floats(0.05, 2))  # of a token's loss; below 1, most tokens are easy and a few are very hard
    return random.gamma(shape * tokens, expected / (shape * tokens))


@given(healthy_losses(), st.integers(50, 230), st.floats(1, 5))
@settings(max_examples=20)
def test_a_loss_that_falls_however_noisily_is_never_reported_and_one_that_jumps_and_stays_is(losses, step, jump):
    assert rises(losses) == []
    gone_bad = losses.copy()
    gone_bad[step:] += jump + losses.max()
    assert len(found := rises(gone_bad)) == 1 and step + 5 <= found[0] <= step + 9


def test_single_batches_that_are_hard_are_not_reported():
    usual = [0.7, 0.72] * 100
    assert rises([*usual, 9.0, *usual, *[3.0] * 9, *usual]) == []
    assert rises([*usual, *[1.1] * 200]) == []  # less than half a nat
    assert rises(usual[:20] + [3.0] * 200) == []  # too few steps to compare with


def test_a_learning_rate_that_explodes_is_reported_once(tmp_path, caplog):
    utterances = [[each % 4, 4 + each % 4] for each in range(60)]
    guard = Guards(str(tmp_path), min_loss_rise=0.3)

    class Explode(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            trainer.optimizers[0].param_groups[0]["lr"] = 1e-3 if batch_idx < 45 else 30.0

    module = fitted(guard, Explode(), utterances=utterances, gradient_clip_val=1.0)
    [line] = lines(tmp_path)
    assert line["step"] == 56
    assert (line["reason"][:13], line["skipped"], line["utterances"]) == (
        "the loss rose",
        False,
        ["utterance 3", "utterance 7"],
    )
    assert module.trainer.callback_metrics["train/loss_rises"] == 1
    assert re.search(
        r"step 56: the loss rose from \d\.\d\d to \d+\.\d\d nats per token and stays up \(loss .*, gradient norm .*\), "
        r"try a lower optimizer.lr or more warm-up",
        caplog.text,
    )


def test_gradient_norms_are_logged_by_part(tmp_path):
    module = fitted(Guards(str(tmp_path)))
    logged = {name: value.item() for name, value in module.trainer.callback_metrics.items() if "norm/" in name}
    assert set(logged) == {
        f"gradient_norm/{part}" for part in ("encoder", "adapter", "cross_attention", "decoder", "ctc_head")
    }
    assert logged == pytest.approx(
        {f"gradient_norm/{name}": value for name, value in module.update.gradient_norms.items()}
    )
    assert not (tmp_path / "bad_steps.jsonl").exists()


def test_its_state_travels_in_a_checkpoint_without_code(tmp_path):
    guard = Guards(str(tmp_path), max_bad_steps=5)
    fitted(guard, Spoil(audio=[2, 3]))
    file = io.BytesIO()
    torch.save(guard.state_dict(), file)
    file.seek(0)
    again = Guards(str(tmp_path), max_bad_steps=5)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.state_dict() == guard.state_dict()
    assert (again.num_bad, again.num_in_a_row, len(again.losses)) == (2, 2, 2)


def test_a_step_without_tokens_is_neither_bad_nor_a_loss(tmp_path):
    guard = Guards(str(tmp_path), max_bad_steps=1)
    fitted(guard, utterances=[(0,), (), (1,)])
    assert guard.num_bad == 0
    assert len(guard.losses) == 2


def test_an_update_that_is_not_finite_says_which():
    def update(loss, norm):
        sums, norms = torch.tensor([3 * loss, 3, 0, 0, 3 * loss]), torch.tensor([1.0, norm])
        return Update(sums, norms * 3 * SCALE, ("encoder", "decoder"), torch.zeros(0, 5), num_ranks=1)

    assert update(1.0, 2.0).loss_is_finite and update(1.0, 2.0).gradient_is_finite
    assert not update(math.nan, 2.0).loss_is_finite
    assert not update(1.0, math.inf).gradient_is_finite
    assert update(1.0, 2.0).gradient_norm == pytest.approx(5**0.5)


# --- a decoder that does not listen


@pytest.mark.parametrize(
    ("step", "gain", "function", "is_reported"),
    [
        (250, 0.04, "fit", True),
        (249, 0.04, "fit", False),  # a quarter of the steps have to be made
        (250, 0.06, "fit", False),
        (250, None, "fit", False),  # no utterance had another one to be compared with
        (250, 0.04, "validate", False),
    ],
)
def test_a_decoder_that_hardly_listens_is_reported_after_the_beginning(
    tmp_path, caplog, step, gain, function, is_reported
):
    trainer = SimpleNamespace(
        callback_metrics={} if gain is None else {"val/audio_gain": torch.tensor(gain)},
        state=SimpleNamespace(fn=function), is_global_zero=True, global_step=step, estimated_stepping_batches=1000,
    )  # fmt: skip
    Guards(str(tmp_path)).on_validation_end(trainer, None)
    expected = "step 250: the decoder hardly listens to the audio: "
    expected += "with the audio of other utterances, its loss rises by only 0.040"
    assert (expected in caplog.text) == is_reported
    assert bool(caplog.records) == is_reported


def test_in_a_short_run_the_beginning_is_100_steps(tmp_path, caplog):
    trainer = SimpleNamespace(
        callback_metrics={"val/audio_gain": torch.tensor(0.0)}, state=SimpleNamespace(fn="fit"), is_global_zero=True,
        global_step=99, estimated_stepping_batches=200,
    )  # fmt: skip
    guard = Guards(str(tmp_path))
    guard.on_validation_end(trainer, None)
    assert not caplog.records
    trainer.global_step = 100
    guard.on_validation_end(trainer, None)
    assert "step 100: the decoder hardly listens" in caplog.text


def test_a_run_measures_whether_its_decoder_listens(sedtrain, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "HISTORY", 0)
    ended = sedtrain(
        "data=parquet", f"data.path={corpus}", f"run_dir={tmp_path / 'run'}", "trainer.max_steps=2",
        "encoder.tiny.num_hidden_layers=1", "decoder.tiny.num_hidden_layers=1", "decoding.max_new_tokens=5",
        "callbacks.guards.min_audio_gain=100",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    assert "step 2: the decoder hardly listens to the audio" in ended.err
    assert "val/audio_gain" in (tmp_path / "run/metrics.csv").read_text()
