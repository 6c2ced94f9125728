import pickle
from collections import Counter

import pytest
import torch
from corpora import WITH_SECONDS, WORDS, data_module, fit, listed, wav, write
from lightning.pytorch.plugins.precision import HalfPrecision

from sedtrain.errors import UserError


@pytest.fixture
def dirty(tmp_path):
    """One good utterance and one of every kind that is left out before training."""
    audio = [wav(1.0), wav(0.01), wav(1.2), b"no audio", wav(1.0), wav(1.0)]
    text = ["one", "two", "three", "four", " ", None]
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.parquet", [1.0] * 6, audio=audio, text=text)
    return tmp_path


@pytest.fixture
def undecodable(tmp_path):
    """Four utterances, the second of which has a length but no audio."""
    audio = [wav(1.0), b"no audio", wav(1.0), wav(1.0)]
    write(tmp_path / "train.parquet", [1.0] * 4, audio=audio, seconds=[1.0] * 4)
    return tmp_path


# --- batches


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
            split[0, split.references]
        assert len(decoded) == num_decoded


def test_a_split_can_be_sent_to_workers_that_are_started_afresh(good):
    split = data_module(good).split("train")
    references = [(0, 3), (0, 5)]
    equal(pickle.loads(pickle.dumps(split))[0, references], split[0, references])


def test_audio_is_found_by_the_id_of_its_utterance(good):
    split = data_module(good).split("test")
    samples, rate = split.audio_of("test-4")
    assert (len(samples), rate) == (round(0.7 * 16_000), 16_000)


# --- what is left out


def test_utterances_left_out_are_counted_by_reason_and_listed(dirty, caplog):
    data = data_module(dirty, max_seconds=1.1)
    [batch] = data.train_dataloader()
    assert batch.ids == ["train-0"]
    assert data.skipped.counts == {"too short": 1, "too long": 1, "unreadable audio": 1, "empty text": 2}
    file = str(dirty / "train.parquet")
    assert listed(dirty) == [
        {"id": "train-1", "path": file, "reason": "too short", "detail": "0.01 s < data.min_seconds=0.05"},
        {"id": "train-2", "path": file, "reason": "too long", "detail": "1.20 s > data.max_seconds=1.1"},
        {"id": "train-3", "path": file, "reason": "unreadable audio", "detail": "Format not recognised."},
        {"id": "train-4", "path": file, "reason": "empty text", "detail": ""},
        {"id": "train-5", "path": file, "reason": "empty text", "detail": ""},
    ]
    assert caplog.messages == [
        "skipping utterances: too short (first: train-1 0.01 s < data.min_seconds=0.05)",
        "skipping utterances: too long (first: train-2 1.20 s > data.max_seconds=1.1)",
        "skipping utterances: unreadable audio (first: train-3 Format not recognised.)",
        "skipping utterances: empty text (first: train-4)",
    ]


def test_every_split_is_counted_once(dirty):
    data = data_module(dirty, max_seconds=1.1)
    for _ in range(2):
        data.train_dataloader()
    data.val_dataloader()
    assert data.skipped.counts == {"too short": 2, "too long": 2, "unreadable audio": 2, "empty text": 4}
    assert Counter(line["id"].partition("-")[0] for line in listed(dirty)) == {"train": 5, "validation": 5}


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({}, "'train-1' (FILE): too short 0.01 s < data.min_seconds=0.05"),
        ({"min_seconds": 0}, "'train-3' (FILE): unreadable audio Format not recognised."),
        ({"min_seconds": 0, "max_seconds": 1.1}, "'train-2' (FILE): too long 1.20 s > data.max_seconds=1.1"),
    ],
)
def test_the_first_bad_utterance_can_be_an_error(dirty, options, fault):
    with pytest.raises(UserError) as raised:
        data_module(dirty, on_bad_utterance="error", **options).train_dataloader()
    fault = fault.replace("FILE", f"{dirty}/train.parquet")
    assert str(raised.value) == (
        f"1 problem:\n\n  data.on_bad_utterance = 'error'\n    utterance {fault}\n"
        "    write data.on_bad_utterance=skip to continue without it"
    )


def test_a_split_of_which_nothing_is_left_is_reported(dirty):
    with pytest.raises(UserError) as raised:
        data_module(dirty, min_seconds=5).train_dataloader()
    assert raised.value.args == (
        "data.path",
        str(dirty),
        "none of the 6 utterances of 'train' can be used (5 too short, 1 unreadable audio)",
        "write data.min_seconds, data.max_seconds and data.columns that fit this dataset",
    )


def test_everything_that_is_wrong_with_the_splits_is_reported_at_once(good):
    write(good / "test.parquet", [0.01])
    data = data_module(good, validation_split="nein", test_split="test")
    data.corpus.refuse_unusable(["train", "train"])
    with pytest.raises(UserError) as raised:
        data.corpus.refuse_unusable(["train", "validation", "test"])
    first, second = raised.value.errors
    assert "Unknown split" in first.wrong
    assert second.wrong == "none of the 1 utterances of 'test' can be used (1 too short)"


@pytest.mark.parametrize(
    ("options", "name", "wrong"),
    [
        ({"max_seconds": 0.01}, "max_seconds", "this has to be above data.min_seconds, 0.05"),
        (
            {"min_characters": 9, "max_characters": 3},
            "max_characters",
            "this has to be data.min_characters, 9, or more",
        ),
    ],
)
def test_limits_that_nothing_can_keep_are_refused(good, options, name, wrong):
    with pytest.raises(UserError) as raised:
        data_module(good, **options)
    assert (raised.value.option, raised.value.value, raised.value.wrong) == (f"data.{name}", options[name], wrong)


def test_lightning_can_change_the_precision_of_a_batch_that_lacks_an_utterance(undecodable):
    [batch] = data_module(undecodable, columns=WITH_SECONDS).train_dataloader()
    converted = HalfPrecision("bf16-true").convert_input(batch)
    assert converted.inputs.dtype == torch.bfloat16
    assert torch.equal(converted.inputs, batch.inputs.bfloat16())
    assert torch.equal(converted.labels, batch.labels)
    assert (converted.ids, converted.texts, converted.skipped) == (batch.ids, batch.texts, batch.skipped)
    assert batch.inputs.dtype == torch.float32


def test_audio_that_cannot_be_decoded_leaves_the_rest_of_its_batch(undecodable):
    data = data_module(undecodable, columns=WITH_SECONDS)
    [batch] = data.train_dataloader()
    assert sorted(batch.ids) == ["train-0", "train-2", "train-3"]
    assert [(each.id, each.reason) for each in batch.skipped] == [("train-1", "unreadable audio")]
    assert len(batch.inputs) == len(batch.labels) == 3


def test_a_batch_of_which_nothing_can_be_decoded_is_empty(undecodable):
    split = data_module(undecodable, columns=WITH_SECONDS).split("train")
    assert len(split[0, [(0, 1)]]) == 0
    assert len(split[0, [(0, 1)]].skipped) == 1


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_could_not_be_decoded_is_counted_once_however_long_training_runs(undecodable, num_workers):
    data = data_module(undecodable, columns=WITH_SECONDS, batch_seconds=2, num_workers=num_workers)
    fit(data, 3, limit_val_batches=0)
    assert data.skipped.counts == {"unreadable audio": 1}
    line = {"id": "train-1", "path": f"{undecodable}/train.parquet", "reason": "unreadable audio"}
    assert listed(undecodable) == [line | {"detail": "Format not recognised."}]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_could_not_be_decoded_can_be_an_error_also_from_a_worker(undecodable, num_workers):
    data = data_module(undecodable, columns=WITH_SECONDS, num_workers=num_workers, on_bad_utterance="error")
    with pytest.raises(
        UserError, match=r"utterance 'train-1' \(.*train.parquet\): unreadable audio Format not recognised"
    ):
        fit(data, 1, limit_val_batches=0)
