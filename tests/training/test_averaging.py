"""Averages of weights against closed formulas and brute force; what validation sees, what checkpoints hold, what resumes."""

import copy

import lightning
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_finetune import QUIET, SmallModule

from sedtrain.errors import UserError
from sedtrain.training.averaging import EMA, AverageBest, mean_weights
from sedtrain.training.finetune import FineTuning


class Validated(SmallModule):
    """Notes the weights of every step and of every validation; scores are given."""

    def __init__(self, scores=(), frozen=()):
        callback = FineTuning(frozen=frozen)
        super().__init__(callback)
        callback.prepare(self.model)
        self.scores, self.after_step, self.validated = list(scores), [], []

    def on_train_batch_end(self, *_):
        self.after_step.append(copy.deepcopy(self.model.state_dict()))

    def validation_step(self, batch, index):
        self.validated.append(copy.deepcopy(self.model.state_dict()))

    def on_validation_epoch_end(self):
        step = self.trainer.global_step
        self.log("val/wer", self.scores[step - 1] if self.scores else 1.0 / step)


def fit(folder, module, *callbacks, max_steps=6, resume=None):
    loader = torch.utils.data.DataLoader(range(20), batch_size=None)
    trainer = lightning.Trainer(
        max_steps=max_steps, accelerator="cpu", logger=False, default_root_dir=folder, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, val_check_interval=1, check_val_every_n_epoch=None,
        limit_val_batches=1, num_sanity_val_steps=0, callbacks=[*callbacks],
    )  # fmt: skip
    trainer.fit(module, loader, loader, ckpt_path=resume, weights_only=True if resume else None)
    return trainer


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def expected_averages(states, decay):
    """The recursion, from the weights after the first step."""
    average = {name: weight.double() for name, weight in states[0].items()}
    yield average
    for number, state in enumerate(states[1:], start=1):
        share = min(decay, (1 + number) / (10 + number))
        average = {name: share * average[name] + (1 - share) * state[name].double() for name in average}
        yield average


# --- the moving average


@QUIET
@pytest.mark.parametrize("decay", [0.2, 0.999])
def test_the_moving_average_is_what_validation_sees_and_what_training_ends_with(tmp_path, decay):
    module = Validated()
    fit(tmp_path, module, EMA(decay))
    for average, seen in zip(expected_averages(module.after_step, decay), module.validated, strict=True):
        for name in average:
            torch.testing.assert_close(seen[name].double(), average[name], rtol=1e-6, atol=1e-7)
    assert equal(module.model.state_dict(), module.validated[-1])
    assert not equal(module.model.state_dict(), module.after_step[-1])


@QUIET
def test_training_goes_on_from_its_own_weights_not_from_their_average(tmp_path):
    with_average, without = Validated(), Validated()
    fit(tmp_path, with_average, EMA(0.5))
    fit(tmp_path, without)
    assert equal(with_average.after_step[-1], without.after_step[-1])


@QUIET
def test_what_is_frozen_is_the_same_to_the_last_bit_in_the_average(tmp_path):
    module = Validated(frozen=["encoder"])
    before = copy.deepcopy(module.model.encoder.state_dict())
    fit(tmp_path, module, EMA(0.7))
    assert equal(module.model.encoder.state_dict(), before)


class SaveAtTheEnd(lightning.Callback):
    """Writes a checkpoint as the last of what a training does, as Checkpoints does."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / "last.ckpt")


@QUIET
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_run_that_is_resumed_ends_with_the_same_weights_and_the_same_average(tmp_path, stop):
    whole, resumed = Validated(), Validated()
    fit(tmp_path, whole, EMA(0.9))
    fit(tmp_path, Validated(), EMA(0.9), SaveAtTheEnd(tmp_path), max_steps=stop)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    average = {name.removeprefix("model."): weight for name, weight in stored["state_dict"].items()}
    assert equal(average, whole.validated[stop - 1])
    fit(tmp_path, resumed, EMA(0.9), resume=tmp_path / "last.ckpt")
    assert equal(resumed.after_step[-1], whole.after_step[-1])
    assert equal(resumed.model.state_dict(), whole.model.state_dict())


def test_an_average_of_16_bits_is_refused():
    trainer = lightning.Trainer(precision="bf16-true", accelerator="cpu", logger=False)
    with pytest.raises(UserError) as caught:
        EMA().setup(trainer, Validated().to(torch.bfloat16), "fit")
    assert str(caught.value) == (
        "1 problem:\n\n  trainer.precision = 'bf16-true'\n"
        "    weights in torch.bfloat16 are too coarse for an average that moves by small steps\n"
        "    write trainer.precision=bf16-mixed, or callbacks=default"
    )


# --- the mean of the best


@given(st.lists(st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3), min_size=1, max_size=6))
def test_the_mean_is_the_mean(values):
    states = [{"weight": torch.tensor(each), "steps": torch.tensor(7)} for each in values]
    mean = mean_weights(iter(states))
    assert mean["steps"] == 7 and mean["steps"].dtype == torch.int64
    torch.testing.assert_close(mean["weight"], torch.tensor(values, dtype=torch.float64).mean(0).float())


def test_the_mean_of_equal_weights_is_them_to_the_last_bit():
    weight = torch.randn(1000)
    assert torch.equal(mean_weights([{"w": weight}] * 7)["w"], weight)


SCORES = [0.5, 0.3, float("nan"), 0.3, 0.9, 0.1]


@QUIET
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_best_validations_are_kept_and_no_others(tmp_path, number, mode):
    module, keep = Validated(SCORES), AverageBest(str(tmp_path), "val/wer", mode, number)
    fit(tmp_path, module, keep)
    sign = 1 if mode == "min" else -1
    real = [step for step in range(6) if SCORES[step] == SCORES[step]]
    best = sorted(real, key=lambda step: (sign * SCORES[step], step))[:number]
    assert [path.name for path in keep.paths] == [f"average-{step + 1}.ckpt" for step in best]
    for path, step in zip(keep.paths, best, strict=True):
        stored = torch.load(path, weights_only=True)["state_dict"]
        assert equal({name.removeprefix("model."): w for name, w in stored.items()}, module.validated[step])
    late = {path.name for path in tmp_path.glob("average-*.ckpt")} - {path.name for path in keep.paths}
    assert len(late) <= 1  # goes with the next validation


@QUIET
def test_the_weights_that_are_kept_are_the_moving_average_where_there_is_one(tmp_path):
    module, keep = Validated(), AverageBest(str(tmp_path), "val/wer", "min", 1)
    fit(tmp_path, module, EMA(0.5), keep)
    stored = torch.load(keep.paths[0], weights_only=True)["state_dict"]
    assert equal({name.removeprefix("model."): w for name, w in stored.items()}, module.validated[-1])


@QUIET
@pytest.mark.parametrize("stop", range(1, 6))
def test_a_run_killed_after_a_validation_keeps_the_same_ones_when_it_is_resumed(tmp_path, stop):
    """The checkpoint is one validation old, and the files are already those of the next one."""
    whole = AverageBest(str(tmp_path / "whole"), "val/wer", "min", 2)
    fit(tmp_path, Validated(SCORES), whole)
    keep = AverageBest(str(tmp_path / "half"), "val/wer", "min", 2)
    half = fit(tmp_path, Validated(SCORES), keep, max_steps=stop)
    half.save_checkpoint(tmp_path / "half.ckpt")
    fit(tmp_path, Validated(SCORES), keep, max_steps=stop + 1, resume=tmp_path / "half.ckpt")
    again = AverageBest(str(tmp_path / "half"), "val/wer", "min", 2)
    fit(tmp_path, Validated(SCORES), again, resume=tmp_path / "half.ckpt")
    assert again.scores == whole.scores
    for path in whole.paths:
        first, second = (
            torch.load(each, weights_only=True)["state_dict"] for each in (path, tmp_path / "half" / path.name)
        )
        assert equal(first, second)


def test_the_files_of_another_run_do_not_count(tmp_path):
    keep = AverageBest(str(tmp_path), "val/wer", "min", 2)
    (tmp_path / "average-3.ckpt").touch()
    keep.load_state_dict({"scores": {"average-3.ckpt": 0.1, "average-5.ckpt": 0.2}})
    assert [path.name for path in keep.paths] == ["average-3.ckpt"]


# --- in a whole run


@pytest.mark.parametrize("option", ["ema", "average"])
def test_a_run_saves_and_scores_its_average(train, tmp_path, option):
    from safetensors.torch import load_file

    folder = train(
        tmp_path / "run", f"callbacks=[default,{option}]", "trainer.val_check_interval=1", "finetune=encoder_frozen"
    )
    saved = load_file(folder / "model/model.safetensors")
    names = ["best.ckpt"] if option == "ema" else [f"average-{step}.ckpt" for step in (1, 2, 3)]
    states = [torch.load(folder / f"checkpoints/{name}", weights_only=True) for name in names]
    expected = mean_weights(state["state_dict"] for state in states)
    assert ("current_model_state" in states[0]) is (option == "ema")
    assert all(torch.equal(weight, expected[f"model.{name}"]) for name, weight in saved.items())
