"""Memory that runs out names the batch and what to change, in forward, backward and the optimizer's step."""

import pytest
import torch
from exactness import Loader, batch, new_module, trainer_of

from sedtrain.errors import UserError
from sedtrain.training.module import enough_for

MESSAGE = (
    "out of memory in a batch of 2 utterances, 0.5 s of audio as an input of (2, 5000), 11 target tokens\n"
    "  write instead: data.batches=FILE of task=fit_batches, which finds what fits, data.batch_seconds=LESS (with "
    "trainer.accumulate_grad_batches=MORE each update stays as large), data.batch_tokens=NUMBER, data.max_seconds=LESS where "
    "one utterance is too long by itself, or "
    "trainer.precision=bf16-mixed"
)
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "python"])
def test_the_message_names_the_batch_and_the_settings(error):
    with pytest.raises(UserError) as raised, enough_for(batch([0, 1])):
        raise error
    assert str(raised.value) == MESSAGE
    assert raised.value.__cause__ is error


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match=r"^shapes$"), enough_for(batch([0, 1])):
        raise RuntimeError("shapes")


@pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`", "ignore:.*treespec, LeafSpec"
)
@pytest.mark.parametrize("place", ["sedtrain.training.module.ctc", "torch.Tensor.backward", "torch.optim.SGD.step"])
def test_it_is_told_wherever_a_step_runs_out(monkeypatch, place):
    def fail(*_, **__):
        raise ERRORS[0]

    module, trainer = new_module(), trainer_of("32-true")
    monkeypatch.setattr(place, fail)
    with pytest.raises(UserError, match=r"^out of memory in a batch of 2 utterances"):
        trainer.fit(module, Loader([batch([0, 1])]))


def test_a_tensor_that_no_machine_holds_is_too_large():
    with pytest.raises(UserError, match=r"^out of memory"), enough_for(batch([0])):
        torch.empty(2**60, dtype=torch.uint8)
