"""Memory that runs out names the batch and what to change, in forward, backward and the optimizer's step."""

from types import SimpleNamespace

import pytest
import torch
from exactness import Loader, batch, new_module, trainer_of

from sedtrain.errors import UserError
from sedtrain.training.memory import memory_for

MESSAGE = """\
1 problem:

  data.batch_seconds = 24.0
    out of memory in a batch of 2 utterances: 0.5 s of audio, an input of shape (2, 5000), 11 target tokens
    write data.batches=FILE, which task=fit_batches measures for this device
    or a smaller data.batch_seconds, with trainer.accumulate_grad_batches=NUMBER for updates of the same size
    or data.batch_tokens=NUMBER, or trainer.precision=bf16-mixed
    or a smaller data.max_seconds, if a single utterance is too long"""
DATA = SimpleNamespace(batch_seconds=24.0)
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "python"])
def test_the_message_names_the_batch_and_the_settings(error):
    with pytest.raises(UserError) as raised, memory_for(batch([0, 1]), DATA):
        raise error
    assert str(raised.value) == MESSAGE
    assert raised.value.__cause__ is error


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match=r"^shapes$"), memory_for(batch([0, 1]), DATA):
        raise RuntimeError("shapes")


@pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`", "ignore:.*treespec, LeafSpec"
)
@pytest.mark.parametrize("phase", ["sedtrain.training.module.ctc", "torch.Tensor.backward", "torch.optim.SGD.step"])
def test_every_phase_of_a_step_reports_it(monkeypatch, phase):
    def fail(*_, **__):
        raise ERRORS[0]

    module, trainer = new_module(), trainer_of("32-true")
    monkeypatch.setattr(phase, fail)
    with pytest.raises(UserError, match=r"out of memory in a batch of 2 utterances"):
        trainer.fit(module, Loader([batch([0, 1])]))


def test_a_tensor_that_no_machine_holds_is_too_large():
    with pytest.raises(UserError, match=r"out of memory"), memory_for(batch([0]), DATA):
        torch.empty(2**60, dtype=torch.uint8)
