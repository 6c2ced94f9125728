"""What training sees over epochs: augmented by epoch, within its bounds, and resumed where it stopped."""

import json

import pytest
import torch
from corpora import data_module, fit

from sedtrain.data.augment import Augment
from sedtrain.data.augmentations import ColouredNoise, Speed
from sedtrain.data.buckets import Bucket

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:You're resuming from a checkpoint that ended before",  # the data module is resumable, its loader is not
)


def by_id(seen):
    audio = {}
    for _, *batch in seen:
        for id, samples in batch:
            audio.setdefault(id, set()).add(samples)
    return audio


def augmented(folder, num_workers=0):
    data = data_module(folder, batch_seconds=4, num_workers=num_workers)
    data.augment = Augment({"speed": Speed([0.8, 1.25]), "noise": ColouredNoise()}, 0, max_seconds=1.5)
    return data


def test_training_is_augmented_anew_in_every_epoch_whatever_the_workers_and_evaluation_never(good):
    alone = fit(augmented(good), 2)
    assert fit(augmented(good, num_workers=2), 2).trained == alone.trained
    assert {len(each) for each in by_id(alone.trained).values()} == {2}
    assert {len(each) for each in by_id(alone.validated).values()} == {1}
    clean = data_module(good, batch_seconds=4)
    for split in ("validation", "train"):
        pairs = zip(augmented(good).batches(split), clean.batches(split), strict=True)
        assert all(torch.equal(ours.inputs, theirs.inputs) for ours, theirs in pairs)


def test_batches_keep_their_bound_when_audio_gets_longer(good):
    data = data_module(good, batch_seconds=4)
    data.augment = Augment({"speed": Speed([0.5])}, 0, max_seconds=30)
    batches = list(data.train_dataloader())
    assert sum(len(batch) > 1 for batch in batches) > 2
    assert all(batch.inputs.numel() <= 4 * 16_000 for batch in batches)


def test_batches_are_bounded_by_target_tokens_too(good):
    batches = list(data_module(good, batch_seconds=100, batch_tokens=20).train_dataloader())
    assert all(batch.labels.numel() <= 20 or len(batch) == 1 for batch in batches)
    assert max(batch.labels.numel() for batch in batches) > 10
    assert sum(len(batch) for batch in batches) == 12


BUCKETS = [{"seconds": 0.7, "tokens": 30, "utterances": 2}, {"seconds": 1.2, "tokens": 30, "utterances": 3}]


def test_measured_buckets_bound_batches_of_training_and_those_that_are_scored(good):
    data = data_module(good, batch_seconds=100, batches=BUCKETS)
    trained = list(data.train_dataloader())
    assert sorted(len(batch) for batch in trained) == [1, 1, 1, 2, 2, 2, 3]  # 1.3 and 1.4 s are beyond the buckets
    assert len({id for batch in trained for id in batch.ids}) == 12
    assert max(batch.inputs.numel() for batch in trained if len(batch) == 2) <= 2 * 1.2 * 16_000
    scored = list(data.batches("train"))
    assert sorted(len(batch) for batch in scored) == sorted(len(batch) for batch in trained)
    lengths = [batch.durations[0] for batch in scored]
    assert lengths == sorted(lengths, reverse=True)


def test_a_file_of_buckets_is_what_stands_in_it(good, tmp_path):
    (tmp_path / "batches.yaml").write_text(json.dumps(BUCKETS))
    from_file = data_module(good, batches=str(tmp_path / "batches.yaml"))
    assert (
        from_file.bounds.buckets
        == data_module(good, batches=BUCKETS).bounds.buckets
        == [Bucket(**each) for each in BUCKETS]
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_that_was_stopped_resumes_as_if_it_never_was(shards, tmp_path, num_workers):
    """Also from the checkpoints of Lightning's own; those of a run resume every kind of corpus."""

    def data():
        return data_module(shards, batch_seconds=2, num_workers=num_workers)

    saved = tmp_path / "saved"
    whole = fit(data(), 3, save_in=saved).trained
    for step in (1, 4, len(whole) // 3, len(whole) // 3 + 1, len(whole) - 1):
        assert fit(data(), 3, checkpoint=saved / f"step={step}.ckpt").trained == whole[step:]
