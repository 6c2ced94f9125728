"""Checkpoints are written when they are due, and training resumes from each as if it had never stopped."""

import math
import shutil
import signal
from pathlib import Path

import lightning
import pytest
import torch
from corpora import OVERLAPPING, STREAMED, data_module
from kill_and_resume import equal
from lightning.pytorch.callbacks import EarlyStopping, Timer

from sedtrain.training.checkpoint_files import is_intact, read_checkpoint
from sedtrain.training.checkpoints import NEVER, Checkpoints, Stopped, ValidateEvery
from sedtrain.training.loggers import MetricsFile
from sedtrain.training.signals import StopOnInterrupt
from sedtrain.training.tracking import Tracker

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:You're resuming from a checkpoint that ended before",  # the data module is resumable, its loader is not
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:The number of training batches",
)
EXACT = {"state_dict", "optimizer_states", "lr_schedulers", "loops", "resume", "SpeechTextDataModule", "global_step"}


class Tiny(lightning.LightningModule):
    """A model that a different draw, batch or learning rate anywhere leads elsewhere."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8))
        self.num_trained = 0

    def training_step(self, batch, index):
        self.num_trained += 1
        loss = (self.weight - torch.rand(8) - batch.seconds).square().mean()
        self.log("train/loss", loss, batch_size=1)
        return loss

    def validation_step(self, batch, index):
        torch.rand(1)
        self.log("val/score", (self.weight.mean() - 1).abs(), batch_size=1)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 5))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Keeping(Checkpoints):
    """Keeps a copy of each `last.ckpt` by its step."""

    def save(self, trainer):
        super().save(trainer)
        shutil.copy(f"{self.dirpath}/last.ckpt", f"{self.dirpath}/../{trainer.global_step}.kept")


class SendAt(lightning.Callback):
    """Sends this process a signal when a training batch of this number ends."""

    def __init__(self, number, batch):
        self.number, self.batch = number, batch

    def on_train_batch_end(self, trainer, *_):
        if trainer.fit_loop.total_batch_idx == self.batch:
            signal.raise_signal(self.number)


def fit(data, run, *, start=None, callbacks=(), kind=Checkpoints, every=None, mode="min", reading=None, **options):
    """The model, trained in the folder `run`, and its trainer."""
    torch.manual_seed(0)
    folder, model = run / "checkpoints", Tiny()
    if start == "own":
        start = folder / "last.ckpt"
    checkpoints = kind(str(folder), "val/score", mode, **({"every_steps": 1} if every is None else every))
    defaults = {"max_epochs": 3, "val_check_interval": 2, "check_val_every_n_epoch": None, "log_every_n_steps": 1}
    trainer = lightning.Trainer(
        accelerator="cpu", use_distributed_sampler=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, callbacks=[*callbacks, checkpoints],
        logger=Tracker("csv", lambda: MetricsFile(run)),
        **(defaults | options),
    )  # fmt: skip
    try:
        trainer.fit(
            model,
            datamodule=data_module(data, folder=str(run), **{"batch_seconds": 2, **(reading or {})}),
            ckpt_path=start,
        )
    except Stopped:
        model.stopped = True
    return model, trainer


def last(run):
    return {part: value for part, value in read_checkpoint(run / "checkpoints/last.ckpt").items() if part in EXACT}


def moved_to(run, kept):
    """A run's folder with what a killed one left: the checkpoint `kept` and the whole log."""
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(kept, run / "checkpoints/last.ckpt")
    shutil.copy(kept.parent / "metrics.csv", run)
    return run


LARGER = {"batch_seconds": 3}  # five batches an epoch or a few more: each place in an epoch, and not each often
CASES = {
    "validation in the middle of epochs": {},
    "validation at the end of epochs": {"check_val_every_n_epoch": 1, "val_check_interval": 1.0},
    "accumulation": {"accumulate_grad_batches": 2, "val_check_interval": NEVER, "callbacks": [ValidateEvery(3)]},
    "accumulation over more than is left of an epoch": {"accumulate_grad_batches": 4},
    "an end in the middle of an epoch": {"max_epochs": None, "max_steps": 11, "val_check_interval": 3},
    "no validation": {"limit_val_batches": 0},
}


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_from_every_step_as_if_it_had_never_stopped(good, tmp_path, case):
    never = tmp_path / "never"
    fit(good, never, kind=Keeping, reading=LARGER, **CASES[case])
    kept = sorted(never.glob("*.kept"), key=lambda path: int(path.stem))
    assert len(kept) >= 5
    for path in kept[:-1]:
        run = moved_to(tmp_path / path.stem, path)
        model, _ = fit(good, run, start="own", reading=LARGER, **CASES[case])
        assert model.num_trained > 0
        assert equal(last(run), last(never)), path
        assert (run / "metrics.csv").read_text() == (never / "metrics.csv").read_text()


def test_a_training_that_goes_on_sets_a_damaged_last_checkpoint_aside(good, tmp_path):
    fit(good, tmp_path, kind=Keeping)
    shutil.copy(tmp_path / "3.kept", tmp_path / "checkpoints/previous.ckpt")
    damaged = tmp_path / "checkpoints/last.ckpt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    fit(good, tmp_path, start=tmp_path / "checkpoints/previous.ckpt")
    assert not is_intact(tmp_path / "checkpoints/last.ckpt.damaged")
    assert is_intact(damaged)


@pytest.mark.parametrize("limit", [{}, {"max_epochs": None, "max_steps": 11}], ids=["epochs", "steps"])
@pytest.mark.parametrize("reading", [STREAMED | LARGER, OVERLAPPING | LARGER], ids=["streamed", "mixed"])
def test_training_on_a_corpus_without_length_goes_on_from_every_step(shards, tmp_path, reading, limit):
    never = tmp_path / "never"
    fit(shards, never, kind=Keeping, reading=reading, **limit)
    kept = sorted(never.glob("*.kept"), key=lambda path: int(path.stem))
    assert len(kept) >= 5
    for path in kept[:-1]:
        run = moved_to(tmp_path / path.stem, path)
        fit(shards, run, start="own", reading=reading, **limit)
        assert equal(last(run), last(never)), path


def test_a_training_that_ended_trains_no_more_but_another_goes_on_from_it(good, tmp_path):
    one, longer, whole = tmp_path / "one", tmp_path / "longer", tmp_path / "whole"
    steps = {"max_epochs": None, "val_check_interval": 3}
    for number in (5, 9, 18):  # in the middle and at the end of an epoch
        shutil.rmtree(one, ignore_errors=True)
        shutil.rmtree(longer, ignore_errors=True)
        fit(good, one, max_steps=number, **steps)
        ended = last(one)
        assert fit(good, one, start="own", max_steps=number, **steps)[0].num_trained == 0
        assert fit(good, one, start="own", max_steps=99, **steps)[0].num_trained == 0
        assert equal(last(one), ended)
        fit(good, longer, start=one / "checkpoints/last.ckpt", max_steps=21, **steps)
        shutil.rmtree(whole, ignore_errors=True)
        fit(good, whole, max_steps=21, **steps)
        assert equal(last(longer)["state_dict"], last(whole)["state_dict"]), number


# --- when


def steps_of(run):
    return sorted(int(path.stem) for path in run.glob("*.kept"))


@pytest.mark.parametrize(
    ("every", "options", "expected"),
    [
        ({}, {"val_check_interval": 5}, [5, 10, 15, 20, 25, 27]),
        ({"every_steps": 10}, {"limit_val_batches": 0}, [10, 20, 27]),
        ({"every_steps": 3}, {"limit_val_batches": 0, "accumulate_grad_batches": 2}, [3, 6, 9, 12, 15]),
        ({"every_epochs": 2}, {"limit_val_batches": 0}, [18, 27]),
        ({"every_minutes": 1e-9}, {"limit_val_batches": 0}, list(range(28))),
        ({"every_minutes": 60.0}, {"limit_val_batches": 0}, [27]),
    ],
)
def test_checkpoints_are_written_by_steps_minutes_epochs_validations_and_at_the_end(
    good, tmp_path, every, options, expected
):
    fit(good, tmp_path, kind=Keeping, every=every, **options)
    assert steps_of(tmp_path) == expected


# --- state of other callbacks


def best(trainer):
    callback = trainer.checkpoint_callback
    return callback.best_model_path, callback.best_model_score


def test_the_best_score_goes_on_in_a_moved_folder_and_starts_anew_in_another_run(good, tmp_path):
    never, moved, other = tmp_path / "never", tmp_path / "moved", tmp_path / "other"
    path, score = best(fit(good, never, kind=Keeping, mode="max")[1])
    assert read_checkpoint(Path(path))["global_step"] == 2  # the first validation's
    shutil.copy(path, moved_to(moved, never / "7.kept") / "checkpoints/best.ckpt")
    assert best(fit(good, moved, start="own", mode="max")[1]) == (str(moved / "checkpoints/best.ckpt"), score)
    other_path, other_score = best(fit(good, other, start=never / "7.kept", mode="max")[1])
    assert read_checkpoint(Path(other_path))["global_step"] == 8
    assert other_path == str(other / "checkpoints/best.ckpt")
    assert other_score < score


def test_early_stopping_goes_on_counting(good, tmp_path):
    def stopping():
        return {"callbacks": [EarlyStopping("val/score", patience=3, min_delta=math.inf)], "max_epochs": 30}

    never = tmp_path / "never"
    fit(good, never, kind=Keeping, **stopping())
    assert steps_of(never)[-1] == 6  # after three validations, none of which is good enough
    run = moved_to(tmp_path / "run", never / "3.kept")
    fit(good, run, start="own", **stopping())
    assert equal(last(run), last(never))


def test_the_time_limit_counts_over_restarts(good, tmp_path):
    never = tmp_path / "never"
    fit(good, never, kind=Keeping, callbacks=[Timer("00:01:00:00")])
    run = moved_to(tmp_path / "run", never / "5.kept")
    checkpoint = read_checkpoint(never / "5.kept")
    timer = Timer("00:01:00:00")
    assert checkpoint["callbacks"]["Timer"]["time_elapsed"]["train"] > 0
    fit(good, run, start="own", callbacks=[timer])
    assert timer._offset == checkpoint["callbacks"]["Timer"]["time_elapsed"]["train"]


# --- signals


def handlers():
    return [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]


@pytest.fixture
def as_found():
    """What signals do before training and after it, SIGUSR1 nothing, as the command has it."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    yield handlers()
    signal.signal(signal.SIGUSR1, before)


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """The end of a training with these options that no signal stops."""
    ends = {}

    def end(data, **options):
        key = tuple(options.values())
        if key not in ends:
            fit(data, folder := tmp_path_factory.mktemp("never"), every={}, **options)
            ends[key] = last(folder)
        return ends[key]

    return end


@pytest.mark.parametrize(
    ("number", "batch", "accumulate"),
    [(signal.SIGTERM, batch, accumulate) for batch in (0, 3, 8, 9) for accumulate in (1, 2)] + [(signal.SIGINT, 3, 2)],
)
def test_a_signal_stops_after_the_step_and_nothing_is_lost(
    good, tmp_path, as_found, never_stopped, batch, number, accumulate
):
    options = {"accumulate_grad_batches": accumulate, "val_check_interval": 4}
    stop = StopOnInterrupt()
    model, trainer = fit(good, tmp_path / "run", every={}, callbacks=[stop, SendAt(number, batch)], **options)
    assert model.stopped
    assert stop.stopped_by == number
    assert trainer.fit_loop.total_batch_idx <= batch + accumulate  # of which nothing was computed yet
    assert handlers() == as_found
    fit(good, tmp_path / "run", every={}, start="own", **options)
    assert equal(last(tmp_path / "run"), never_stopped(good, **options))


class SendAtEnd(lightning.Callback):
    """Sends this process a signal at the end of training, when the last checkpoint is not yet written."""

    def __init__(self, number):
        self.number = number

    def on_train_end(self, trainer, *_):
        signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_last_checkpoint_is_not_lost(good, tmp_path, as_found, number):
    stop = StopOnInterrupt()
    fit(good, tmp_path, kind=Keeping, every={}, callbacks=[stop, SendAtEnd(number)], limit_val_batches=0)
    assert stop.stopped_by == number
    assert steps_of(tmp_path) == [27]
    assert handlers() == as_found


def test_sigusr1_has_a_checkpoint_written_and_training_goes_on(good, tmp_path, as_found):
    callbacks = [StopOnInterrupt(), SendAt(signal.SIGUSR1, 3)]
    fit(good, tmp_path, kind=Keeping, every={}, callbacks=callbacks, limit_val_batches=0)
    assert steps_of(tmp_path) == [4, 27]
