"""Two processes over gloo share an epoch: each utterance once, as many steps on both, and one resumes alone."""

import json
from types import SimpleNamespace

import pytest
import torch
from corpora import data_module, write
from torch import distributed
from torch.multiprocessing import start_processes

KINDS = {
    "whole": {},
    "streamed": {"streaming": True, "block_utterances": 7},
    "mixed": {"mix": {"all": {"weight": 2}, "again": {"train_split": "train-0"}}},
}
EPOCHS = 2
STOP = 3


def loader_of(folder, rank, num_ranks, options, epoch, position=None):
    """The loader and the sampler of one rank, which keeps the position."""
    data = data_module(folder, folder.parent, batch_seconds=2, **options)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=num_ranks, current_epoch=epoch)
    data.load_state_dict(position or {})
    return data.train_dataloader(), data.train_batches


def steps_together(loader, num_steps=None):
    """The ids of each step; both ranks wait for each other at each, and would hang were they of unequal number."""
    for number, batch in enumerate(loader, start=1):
        distributed.all_reduce(torch.ones(()))
        yield batch.ids
        if number == num_steps:
            return


def rank_main(rank, folder, init):
    distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    seen = {}
    for kind, options in KINDS.items():
        for num_workers in (0, 2):
            for epoch in range(EPOCHS):
                loader, _ = loader_of(folder, rank, 2, {**options, "num_workers": num_workers}, epoch)
                seen[f"{kind} {num_workers} {epoch}"] = list(steps_together(loader))
        loader, batches = loader_of(folder, rank, 2, options, 1)
        seen[f"{kind} stopped"] = list(steps_together(loader, STOP))
        seen[f"{kind} position"] = batches.state_dict(STOP)
    (folder.parent / f"rank{rank}.json").write_text(json.dumps(seen))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nineteen utterances in three files."""
    folder = tmp_path_factory.mktemp("ranks") / "data"
    folder.mkdir()
    for number in range(3):
        write(folder / f"train-{number}.parquet", [0.3 + 0.07 * i for i in range(number, 19, 3)])
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """What each of the two saw, by kind, workers and epoch."""
    start_processes(rank_main, (folder, f"file://{folder.parent}/meet"), nprocs=2, start_method="fork")
    return [json.loads((folder.parent / f"rank{rank}.json").read_text()) for rank in range(2)]


def flat(steps):
    return [id for ids in steps for id in ids]


def everything(kind):
    sizes = {f"train-{number}": len(range(number, 19, 3)) for number in range(3)}
    if kind == "whole":
        return [f"train-{i}" for i in range(19)]
    if kind == "streamed":
        return [f"{name}-{i}" for name, size in sizes.items() for i in range(size)]
    return [f"all/train-{i}" for i in range(19)] * 2 + [f"again/train-0-{i}" for i in range(sizes["train-0"])]


@pytest.mark.parametrize("epoch", range(EPOCHS))
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_both_make_as_many_steps_and_see_every_utterance_once(ranks, kind, num_workers, epoch):
    seen = [rank[f"{kind} {num_workers} {epoch}"] for rank in ranks]
    assert len(seen[0]) == len(seen[1]) > STOP
    assert sorted(flat(seen[0]) + flat(seen[1])) == sorted(everything(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_one_resumes_alone_without_loss_or_repeat(ranks, folder, kind):
    assert ranks[0][f"{kind} position"] == ranks[1][f"{kind} position"]
    loader, _ = loader_of(folder, 0, 1, KINDS[kind], 1, ranks[0][f"{kind} position"])
    rest = [batch.ids for batch in loader]
    assert sorted(flat(rest + ranks[0][f"{kind} stopped"] + ranks[1][f"{kind} stopped"])) == sorted(everything(kind))
