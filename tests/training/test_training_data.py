"""What training sees over epochs: augmented by epoch, within its bounds, and continued where it stopped."""

import json

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_datamodule import data_module, good, write  # noqa: F401 - a fixture

from sedtrain.data.augment import Augment
from sedtrain.data.augmentations import ColouredNoise, Speed
from sedtrain.data.buckets import Bucket

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:You're resuming from a checkpoint that ended before",  # the data module is resumable, its loader is not
)


class Remember(lightning.LightningModule):
    """A model with one weight, which keeps what it is trained and validated on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained, self.validated = [], []

    def training_step(self, batch, index):
        self.trained.append((self.current_epoch, *utterances(batch)))
        return 0.0 * self.weight

    def validation_step(self, batch, index):
        self.validated.append((self.current_epoch, *utterances(batch)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def utterances(batch):
    lengths = batch.attention_mask.sum(1)
    return [
        (id, row[:length].numpy().tobytes()) for id, row, length in zip(batch.ids, batch.inputs, lengths, strict=True)
    ]


def fitted(data, epochs, *, checkpoint=None, save_in=None):
    """The model that was trained, from `checkpoint` on; each step's checkpoint goes into the folder `save_in`."""
    model = Remember()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    saving = [ModelCheckpoint(save_in, "{step}", every_n_train_steps=1, save_top_k=-1)] if save_in else []
    lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", use_distributed_sampler=False, callbacks=saving,
        enable_checkpointing=bool(saving), **quiet,
    ).fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)  # fmt: skip
    return model


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


def test_training_is_augmented_anew_in_every_epoch_whatever_the_workers_and_evaluation_never(good):  # noqa: F811
    alone = fitted(augmented(good), 2)
    assert fitted(augmented(good, num_workers=2), 2).trained == alone.trained
    assert {len(each) for each in by_id(alone.trained).values()} == {2}
    assert {len(each) for each in by_id(alone.validated).values()} == {1}
    clean = data_module(good, batch_seconds=4)
    for split in ("validation", "train"):
        pairs = zip(augmented(good).batches(split), clean.batches(split), strict=True)
        assert all(torch.equal(ours.inputs, theirs.inputs) for ours, theirs in pairs)


def test_batches_keep_their_bound_when_audio_gets_longer(good):  # noqa: F811
    data = data_module(good, batch_seconds=4)
    data.augment = Augment({"speed": Speed([0.5])}, 0, max_seconds=30)
    batches = list(data.train_dataloader())
    assert sum(len(batch) > 1 for batch in batches) > 2
    assert all(batch.inputs.numel() <= 4 * 16_000 for batch in batches)


def test_batches_are_bounded_by_target_tokens_too(good):  # noqa: F811
    batches = list(data_module(good, batch_seconds=100, batch_tokens=20).train_dataloader())
    assert all(batch.labels.numel() <= 20 or len(batch) == 1 for batch in batches)
    assert max(batch.labels.numel() for batch in batches) > 10
    assert sum(len(batch) for batch in batches) == 12


BUCKETS = [
    {"seconds": 0.7, "tokens": 30, "utterances": 2},
    {"seconds": 1.2, "tokens": 30, "utterances": 3},
]


def test_measured_buckets_cut_what_trains_and_not_what_is_scored(good):  # noqa: F811
    data = data_module(good, batch_seconds=100, batches=BUCKETS)
    trained = list(data.train_dataloader())
    assert sorted(len(batch) for batch in trained) == [1, 1, 1, 2, 2, 2, 3]  # 1.3 and 1.4 s are beyond the buckets
    assert len({id for batch in trained for id in batch.ids}) == 12
    assert max(batch.inputs.numel() for batch in trained if len(batch) == 2) <= 2 * 1.2 * 16_000
    assert [len(batch) for batch in data.batches("train")] == [12]


def test_a_file_of_buckets_is_what_stands_in_it(good, tmp_path):  # noqa: F811
    (tmp_path / "batches.yaml").write_text(json.dumps(BUCKETS))
    from_file = data_module(good, batches=str(tmp_path / "batches.yaml"))
    assert from_file.buckets == data_module(good, batches=BUCKETS).buckets == [Bucket(**each) for each in BUCKETS]


@pytest.fixture
def shards(tmp_path):
    """Eleven utterances of 0.3 to 1.3 s in three shards, and as many to validate on."""
    for number in range(3):
        write(tmp_path / f"train-{number}.parquet", [0.3 + 0.1 * i for i in range(number, 11, 3)])
    write(tmp_path / "validation.parquet", [0.5] * 3)
    return tmp_path


OVERLAPPING = {"mix": {"all": {"weight": 1.5}, "again": {"train_split": "train-1", "weight": 0.4}}}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_that_was_stopped_goes_on_as_if_it_never_was(shards, tmp_path, num_workers):
    """Also from the checkpoints of Lightning's own; those of a run resume every kind of corpus."""

    def data():
        return data_module(shards, batch_seconds=2, num_workers=num_workers)

    saved = tmp_path / "saved"
    whole = fitted(data(), 3, save_in=saved).trained
    for step in (1, 4, len(whole) // 3, len(whole) // 3 + 1, len(whole) - 1):
        assert fitted(data(), 3, checkpoint=saved / f"step={step}.ckpt").trained == whole[step:]
