"""What the machine decides where the user does not: precision, TF32, worker processes, pinned memory; and the wait for data."""

import time
from types import SimpleNamespace

import pytest
import torch

from sedtrain import build
from sedtrain.batch import Batch
from sedtrain.data import workers
from sedtrain.data.workers import Loader, usual_workers
from sedtrain.devices import precision_of
from sedtrain.training.progress import ProgressBar
from sedtrain.training.strategies import tensor_float32

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("supported", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_gpu_trains_in_bfloat16_where_it_has_it_and_a_cpu_in_float32(monkeypatch, supported, precision):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported or including_emulation)
    assert precision_of(CUDA) == precision
    assert precision_of(CPU) == "32-true"


@pytest.mark.parametrize(("given", "made"), [("auto", "bf16-mixed"), ("32-true", "32-true")])
def test_only_the_precision_auto_follows_the_device(monkeypatch, given, made):
    monkeypatch.setattr(build, "device", lambda cfg: CUDA)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(build, "create", lambda cfg, path: lambda precision=given: precision)
    cfg = SimpleNamespace(trainer={"precision": given})
    assert build.trainer_maker(cfg)() == made


def test_products_round_to_tf32_in_training_on_a_gpu_alone():
    before = torch.get_float32_matmul_precision()
    with tensor_float32(CPU):
        assert torch.get_float32_matmul_precision() == before
    with pytest.raises(KeyError), tensor_float32(CUDA):
        assert torch.get_float32_matmul_precision() == "high"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(("num_cores", "num_gpus", "number"), [(6, 2, 3), (1, 2, 1), (64, 1, 8), (64, 0, 0)])
def test_a_gpu_gets_a_worker_for_each_of_its_cores(monkeypatch, num_cores, num_gpus, number):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda process: set(range(num_cores)))
    assert usual_workers() == number


def test_every_tensor_of_a_batch_is_pinned_and_the_rest_stays(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    zeros = torch.zeros(1, 2)
    pinned = Batch(zeros, zeros, zeros, ["a"], ["b"], 1.0, prompts=zeros).pin_memory()
    tensors = pinned.inputs, pinned.attention_mask, pinned.labels, pinned.prompts
    assert all(torch.equal(each, zeros + 1) for each in tensors)
    assert (pinned.ids, pinned.texts, pinned.seconds) == (["a"], ["b"], 1.0)


class Slow(torch.utils.data.Dataset):
    def __getitem__(self, index):
        time.sleep(0.02)
        return index

    def __len__(self):
        return 3


def test_the_wait_for_data_is_counted_and_what_is_done_with_them_is_not():
    loader = Loader(Slow(), batch_size=None)
    for _ in loader:
        time.sleep(0.1)
    assert 0.06 <= loader.waited < 0.3


def test_the_log_shows_the_share_of_its_time_that_training_waits_for_data():
    bar, loader = ProgressBar(), Loader(Slow(), batch_size=None)
    bar.seconds, bar.validation_seconds, bar.seconds_before, loader.waited = 50.0, 10.0, 20.0, 5.0
    trainer = SimpleNamespace(callback_metrics={}, world_size=1, train_dataloader=loader)
    assert bar.scores(trainer) == "0 s/s  data wait 25 %"
