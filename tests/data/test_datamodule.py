"""Batches of a split: each utterance once, in the order of the epoch, the same whatever reads them."""

import gc
import pickle
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from corpora import WORDS, data_module

from sedtrain.data.readers import read_rows


def test_an_epoch_holds_every_utterance_of_the_split_once(good):
    data = data_module(good, batch_seconds=4)
    batches = list(data.train_dataloader())
    assert sorted(id for batch in batches for id in batch.ids) == sorted(f"train-{i}" for i in range(12))
    assert max(batch.inputs.numel() for batch in batches) <= 4 * 16_000
    assert data.split("train").total_seconds() == pytest.approx(sum(batch.seconds for batch in batches))
    assert not data.skipped.counts
    assert not (good / "skipped.jsonl").exists()


def test_only_training_is_shuffled(good):
    data = data_module(good, batch_seconds=1.5)

    def order(loader, epoch):
        loader.sampler.set_epoch(epoch)
        return [batch.ids for batch in loader]

    assert order(data.train_dataloader(), 0) != order(data.train_dataloader(), 1)
    assert order(data.val_dataloader(), 0) == order(data.val_dataloader(), 1)
    assert next(data.batches("test")).ids == ["test-11"]


def test_the_target_chooses_the_text(good):
    [batch] = data_module(good, target="translation", batch_seconds=100).val_dataloader()
    spoken = data_module(good, target="transcription", batch_seconds=100)
    [expected] = spoken.val_dataloader()
    assert [WORDS[text] for text in batch.texts] == expected.texts
    assert list(spoken.texts("train"))[:2] == ["one", "two"]
    assert not torch.equal(batch.labels, expected.labels)


def equal(one, other):
    assert (one.ids, one.texts, one.seconds, one.skipped) == (other.ids, other.texts, other.seconds, other.skipped)
    for name in ("inputs", "attention_mask", "labels"):
        assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"keep_decoded_hours": 0}], ids=str)
def test_workers_and_the_memory_of_decoded_audio_change_no_batch(good, options):
    plain, other = data_module(good, batch_seconds=3), data_module(good, batch_seconds=3, **options)
    loaders = plain.train_dataloader(), other.train_dataloader()
    for epoch in range(2):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        for one, two in zip(*loaders, strict=True):
            equal(one, two)


def test_decoded_audio_is_kept_up_to_the_hours_allowed(good, monkeypatch):
    for hours, num_decoded in ((1, 12), (12 / 3600, 12), (9 / 3600, 24)):
        split = data_module(good, keep_decoded_hours=hours).split("train")
        decoded = []
        [rows] = split.parts
        utterance = rows.utterance
        monkeypatch.setattr(rows, "utterance", lambda *a, f=utterance, seen=decoded: seen.append(a) or f(*a))
        for _ in range(2):
            split[0, split.kept[["part", "row"]].tolist()]
        assert len(decoded) == num_decoded


def test_a_split_can_be_sent_to_workers_that_are_started_afresh(good):
    split = data_module(good).split("train")
    references = [(0, 3), (0, 5)]
    equal(pickle.loads(pickle.dumps(split))[0, references], split[0, references])


def test_audio_is_found_by_the_id_of_its_utterance(good):
    split = data_module(good).split("test")
    samples, rate = split.audio_of("test-4")
    assert (len(samples), rate) == (round(0.7 * 16_000), 16_000)


def test_a_row_of_a_plan_takes_40_bytes_and_its_cells_stay_in_their_file(tmp_path):
    """Files with dictionaries, which are read a few rows at a time, are not kept in chunks of a few rows."""
    number = 50_000
    names, seconds = [f"{index:06}.wav" for index in range(number)], np.linspace(1, 20, number)
    table = pa.table({"audio": names, "text": names, "name": names, "seconds": seconds})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    read_rows(tmp_path / "train.parquet")
    columns = {"audio": "audio", "transcription": "text", "id": "name", "seconds": "seconds"}
    data, in_arrow = data_module(tmp_path, columns=columns, batch_seconds=200.0), pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        loader = data.train_dataloader()
        drawn = iter(loader.sampler)
        _, references = next(drawn)
        gc.collect()
        in_python = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert in_python + pa.total_allocated_bytes() - in_arrow < 40 * number + 100_000
    [rows] = loader.dataset.parts
    assert rows.table["text"].num_chunks < 20 and rows.texts([index for _, index in references])[0] in names


@pytest.mark.parametrize(("device", "returns"), [("cpu", 2), ("cuda", 0)])
def test_memory_that_batches_left_is_handed_back_every_eighth_batch_on_a_cpu(good, monkeypatch, device, returns):
    data, freed = data_module(good, batch_seconds=4), []
    monkeypatch.setattr("sedtrain.data.datamodule.return_freed_memory", lambda: freed.append(data.num_batches))
    batch = next(iter(data.train_dataloader()))
    strategy = SimpleNamespace(root_device=torch.device(device))
    data.trainer = SimpleNamespace(strategy=strategy, training=True, world_size=1)
    for _ in range(20):
        data.on_before_batch_transfer(batch, 0)
    assert freed == [8, 16][:returns]
