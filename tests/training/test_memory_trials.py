"""Steps to be measured: real ones, of one process, that change nothing and outlive a memory that runs out."""

import pytest
import torch
from hydra import compose, initialize_config_dir

from sedtrain import build
from sedtrain.config.schema import conf_dir, register
from sedtrain.errors import UserError
from sedtrain.training import module
from sedtrain.training.averaging import EMA
from sedtrain.training.memory import OutOfMemory
from sedtrain.training.memory_trials import SMALL_STEPS, TrialSteps


class Counted:
    """Memory in which every look takes one byte more; the looks before a step and after it are known by that."""

    def __init__(self):
        self.looks = 0

    def reset(self):
        self.looks = 0

    def used(self):
        self.looks += 1
        return self.looks

    def peak(self):
        return 10 + self.looks


@pytest.fixture
def steps(corpus, tmp_path):
    """A function of overrides: the steps of a run on the small corpus."""

    def made(*overrides):
        register()
        choices = ["data=parquet", f"data.path={corpus}", f"run_dir={tmp_path}", "logger=none"]
        small = ["encoder.tiny.num_hidden_layers=1", "decoder.tiny.num_hidden_layers=1", "vocabulary_texts=0"]
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = compose("train", [*choices, *small, *overrides])
        run = build.training_run(cfg)
        return TrialSteps(run, build.trainer_factory(cfg, run.trainer.world_size), Counted())

    return made


def test_a_trial_is_a_step_on_as_many_utterances_of_that_length_and_changes_no_weight(steps, monkeypatch):
    made, seen, moving = steps("finetune=gradual", "encoder=hubert"), [], []
    weights = {name: weight.clone() for name, weight in made.run.saved.model.state_dict().items()}
    original = module.SpeechSeq2SeqModule.training_step

    def training_step(self, batch, index):
        seen.append((tuple(batch.inputs.shape), tuple(batch.labels.shape)))
        moving.append(sum(weight.requires_grad for weight in self.model.parameters()))
        return original(self, batch, index)

    monkeypatch.setattr(module.SpeechSeq2SeqModule, "training_step", training_step)
    trial = made.trial(1.5, 6, 3)
    assert (trial.utterances, trial.at_rest, trial.peak) == (3, 1, 11) and trial.seconds > 0
    assert seen == [((1, 16_000), (1, 2))] * SMALL_STEPS + [((3, 24_000), (3, 6))]
    assert set(moving) == {len(made.run.finetuning.starts)}
    assert all(torch.equal(weight, weights[name]) for name, weight in made.run.saved.model.state_dict().items())
    assert made.run.saved.model.encoder.config.layerdrop == 0.0


def test_memory_that_runs_out_is_a_trial_too_and_the_next_one_is_as_if_it_had_not(steps, monkeypatch):
    made, original = steps(), module.ctc

    def ctc(logits, *rest, **named):
        if len(logits) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(logits, *rest, **named)

    monkeypatch.setattr(module, "ctc", ctc)
    assert [made.trial(1.0, 3, number).peak for number in (2, 4, 3)] == [11, None, 11]


def test_memory_that_runs_out_before_is_no_trial(steps, monkeypatch):
    made = steps()

    def ctc(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module, "ctc", ctc)
    with pytest.raises(OutOfMemory, match=r"out of memory in a batch of 1 utterances"):
        made.trial(1.0, 3, 2)


def test_steps_without_effect_are_not_taken_for_a_measure(steps, monkeypatch):
    made = steps("optimizer.fused=false")  # a fused one makes its state even so
    monkeypatch.setattr(module, "ctc", lambda *_, **__: (torch.tensor(torch.inf), torch.tensor(1)))
    with pytest.raises(UserError) as raised:
        made.trial(1.0, 3, 2)
    assert raised.value.option == "trainer.precision"
    assert raised.value.wrong == "steps on noise have no finite gradient, so the optimizer skips all of them"
    assert raised.value.write == "write trainer.precision=bf16-mixed or 32-true"


def test_the_copy_that_fsdp_cuts_can_be_cut_again(steps, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK"):  # which Lightning sets
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    made = steps("strategy=fsdp", "trainer.devices=2", "trainer.accelerator=cpu")
    assert [made.trial(1.0, 3, number).peak for number in (1, 2)] == [11, 11]
    torch.distributed.destroy_process_group()


def test_the_moving_average_takes_memory_in_a_trial_as_in_training(steps):
    made = steps("callbacks=[default,ema]")
    [average] = made.run.callbacks(EMA)
    made.trial(1.0, 3, 2)
    assert len(average.averages) == len(list(made.run.saved.model.parameters()))
