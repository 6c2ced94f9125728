"""Utterances that are left out are listed once and counted over all ranks; too many of them stop the run."""

import io
import threading
import tracemalloc
import unicodedata
from collections import Counter
from functools import partial

import numpy as np
import pytest
import soundfile
import torch
from corpora import STREAMED, WITH_SECONDS, data_module, fit, listed, refused, wav, write
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.plugins.precision import HalfPrecision
from torch.multiprocessing import ProcessRaisedException

from sedtrain.batch import Skipped
from sedtrain.data.limits import Limits
from sedtrain.data.skipped import SkippedUtterances
from sedtrain.errors import UserError
from sedtrain.text.normalizers import normalizer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


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


# --- by limits and faults


def bounded(folder, most, **options):
    """Data for a decoder of so many positions; tokens are the characters of a text and its end."""
    data = data_module(folder, batch_seconds=0.6, **options)
    data.corpus.leave_out(partial(data.collator.too_long, most=most))
    return data


@pytest.mark.parametrize("options", [{}, STREAMED, {"mix": {"a": {"weight": 2.0}}}], ids=["whole", "stream", "weight"])
def test_texts_longer_than_the_decoder_are_left_out_of_training_and_of_nothing_else(tmp_path, options):
    texts = ["one", "one two three", "three", "one two three four", "two"]
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.parquet", [0.5] * 5, text=texts)
    data = bounded(tmp_path, 14, **options)
    seen = [text for batch in data.train_dataloader() for text in batch.texts]
    assert sorted(set(seen)) == ["one", "one two three", "three", "two"]
    assert data.skipped.totals() == {"text too long for the decoder's 14 positions": 1}
    [line] = listed(tmp_path)
    assert (line["id"].removeprefix("a/"), line["detail"]) == ("train-3", "19 tokens")
    assert sorted(text for batch in data.val_dataloader() for text in batch.texts) == sorted(texts)


def test_texts_longer_than_the_decoder_are_faults(tmp_path):
    write(tmp_path / "train.parquet", [0.1] * 120, text=["one"] * 100 + ["one two three"] * 20)
    with pytest.raises(
        UserError, match=r"20 of 120 could not be used, .* 20 text too long for the decoder's 5 positions"
    ):
        bounded(tmp_path, 5)
    with pytest.raises(UserError, match=r"'train-100' .*: text too long for the decoder's 5 positions 14 tokens"):
        bounded(tmp_path, 5, on_bad_utterance="error")
    with pytest.raises(UserError, match=r"of 'train' can be used \(120 text too long for the decoder's 3 positions\)"):
        bounded(tmp_path, 3, max_bad_fraction=1.0)


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
    assert list(listed(dirty)[0]) == ["id", "path", "reason", "detail"]
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
    for _ in range(2):
        data.val_dataloader()
    assert data.skipped.totals() == {"too short": 1, "too long": 1, "unreadable audio": 2, "empty text": 2}
    assert list(data.skipped.totals())[:2] == ["unreadable audio", "empty text"]  # the most frequent
    assert Counter(line["id"].partition("-")[0] for line in listed(dirty)) == {"train": 5, "validation": 1}
    assert data.skipped.of_split["validation"] == {"unreadable audio": 1}
    assert data.skipped.of_split["train"] == {"too short": 1, "too long": 1, "unreadable audio": 1, "empty text": 2}


# --- splits that are scored


def test_a_split_that_is_scored_is_scored_whole(dirty):
    data = data_module(dirty, min_seconds=0.5, max_seconds=1.1, max_characters=3, batch_seconds=1.0)
    [batch] = data_module(dirty, min_seconds=0.5, max_seconds=1.1, max_characters=3).val_dataloader()
    assert sorted(batch.ids) == [f"validation-{number}" for number in (0, 1, 2, 4, 5)]
    assert dict(zip(batch.ids, batch.texts, strict=True))["validation-5"] == ""
    assert sum(len(batch) for batch in data.batches("validation")) == 5  # an utterance may be longer than a batch


def test_silence_is_scored_and_not_learnt(tmp_path):
    silent = io.BytesIO()
    soundfile.write(silent, np.zeros(16_000), 16_000, format="WAV")
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", [1.0] * 2, audio=[wav(1.0), silent.getvalue()], text=["one", ""])
    data = data_module(tmp_path)
    [batch] = data.batches("test")
    assert sorted(batch.ids) == ["test-0", "test-1"] and bool(batch.inputs.isfinite().all())
    samples, _ = data.split("test").audio_of("test-1")  # which the report plays
    assert len(samples) == 16_000
    [batch] = data_module(tmp_path, min_characters=0).batches("train")
    assert batch.ids == ["train-0"] and [each.reason for each in batch.skipped] == ["silent audio"]


def test_audio_of_validation_that_memory_or_the_encoder_cannot_take_is_named(tmp_path, caplog):
    write(tmp_path / "validation.parquet", [1.0, 3.9, 4.1, 9.0])
    data = data_module(tmp_path, max_seconds=1, batch_seconds=2.0)
    names = [f"validation-{number}" for number in range(2)]
    assert [id for batch in data.val_dataloader() for id in batch.ids] == names[::-1]
    assert data.skipped.of_split["validation"] == {"too long": 2}
    assert caplog.messages == ["skipping utterances: too long (first: validation-2 4.10 s > 4 * data.max_seconds=4)"]
    data = data_module(tmp_path, tmp_path / "b", max_seconds=1, batch_seconds=8.5)
    data.collator.max_seconds = 3.9
    assert sorted(id for batch in data.batches("validation") for id in batch.ids) == names
    assert [each["detail"] for each in listed(tmp_path / "b")] == [
        "9.00 s > data.batch_seconds=8.5",
        "4.10 s > the limit of the model=3.9",
    ]


def test_every_utterance_of_a_test_split_is_in_a_batch_or_among_the_long_ones(tmp_path):
    write(tmp_path / "test.parquet", [1.0, 3.9, 4.1, 9.0], audio=[wav(1.0), wav(3.9), wav(4.1), b"no audio"])
    data = data_module(tmp_path, max_seconds=1, batch_seconds=2.0)
    data.collator.max_seconds = 4.0
    assert [id for batch in data.batches("test", 4.0) for id in batch.ids] == ["test-1", "test-0"]
    assert [(each.id, each.seconds) for each in data.long_utterances("test", 4.0)] == [("test-2", 4.1)]
    assert data.skipped.of_split["test"] == {"unreadable audio": 1}


def test_a_split_without_any_text_is_scored_only_when_asked_for(tmp_path):
    write(tmp_path / "test.parquet", [1.0] * 2, text=["", None])
    assert refused(data_module(tmp_path).corpus.kept, "test") == (
        "1 problem:\n\n  data.columns = 'text'\n"
        "    all 2 texts of 'test' are empty: only insertions would be scored\n"
        "    write data.columns of the texts, or data.min_characters=0 where nobody speaks in any of this audio"
    )
    assert len(data_module(tmp_path, min_characters=0).corpus.kept("test")) == 2


def test_empty_texts_are_learnt_only_when_asked_for(tmp_path):
    write(tmp_path / "train.parquet", [1.0] * 3, text=["one", "", "(laughs)"])
    assert [len(data_module(tmp_path, min_characters=least).corpus.kept("train")) for least in (1, 0)] == [2, 3]
    data = data_module(tmp_path, min_characters=0)
    data.corpus.rewrite = normalizer("whisper_basic")  # which empties the last
    [batch] = data.train_dataloader()
    assert len(batch) == 3 and batch.labels.shape[0] == 3


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
    write(good / "test.parquet", [1.0], audio=[b"no audio"])
    data = data_module(good, validation_split="nein", test_split="test")
    data.corpus.refuse_unusable(["train", "train"])
    with pytest.raises(UserError) as raised:
        data.corpus.refuse_unusable(["train", "validation", "test"])
    first, second = raised.value.errors
    assert "Unknown split" in first.wrong
    assert second.wrong == "none of the 1 utterances of 'test' can be used (1 unreadable audio)"


@pytest.mark.parametrize(
    ("options", "name", "wrong"),
    [
        ({"max_seconds": 0.01}, "max_seconds", "this has to be above min_seconds, 0.05"),
        (
            {"min_characters": 9, "max_characters": 3},
            "max_characters",
            "this has to be min_characters, 9, or more",
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


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_could_not_be_decoded_is_counted_once_however_long_training_runs(undecodable, num_workers):
    data = data_module(undecodable, columns=WITH_SECONDS, batch_seconds=2, num_workers=num_workers)
    fit(data, 3, limit_val_batches=0)
    assert data.skipped.counts == {"unreadable audio": 1}
    line = {"id": "train-1", "path": f"{undecodable}/train.parquet", "reason": "unreadable audio"}
    assert listed(undecodable) == [line | {"detail": "Format not recognised."}]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_could_not_be_decoded_can_be_an_error_also_from_a_worker(undecodable, num_workers):
    data = data_module(undecodable, columns=WITH_SECONDS, num_workers=num_workers, on_bad_utterance="error")
    with pytest.raises(
        UserError, match=r"utterance 'train-1' \(.*train.parquet\): unreadable audio Format not recognised"
    ):
        fit(data, 1, limit_val_batches=0)


@given(st.text(max_size=30))
def test_every_text_is_kept_or_has_a_reason(text):
    reason = Limits(0, 30).refused_text(text)
    shows = [each for each in text if unicodedata.category(each)[0] not in "CZ"]
    assert bool(reason) == (not shows)


# --- the list


def test_ranks_list_an_utterance_once_and_count_it_all(tmp_path, caplog):
    ranks = [SkippedUtterances(tmp_path / "skipped.jsonl") for _ in range(3)]
    for rank in ranks:
        rank.note([Skipped("planned", "too long")])
    for number, rank in enumerate(ranks):
        rank.note([Skipped(f"decoded-{number}", "silent audio"), Skipped("decoded-by-all", "silent audio")])
    ids = [line["id"] for line in listed(tmp_path)]
    assert sorted(ids) == ["decoded-0", "decoded-1", "decoded-2", "decoded-by-all", "planned"]
    assert [rank.totals() for rank in ranks] == [{"silent audio": 4, "too long": 1}] * 3
    assert len(caplog.messages) == 2


def test_threads_of_ranks_lose_no_line(tmp_path):
    def note(rank):
        skipped = SkippedUtterances(tmp_path / "skipped.jsonl")
        for number in range(50):
            skipped.note([Skipped(str(number), "shared"), Skipped(f"{rank}-{number}", "own")])

    threads = [threading.Thread(target=note, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert SkippedUtterances(tmp_path / "skipped.jsonl").totals() == {"own": 200, "shared": 50}
    assert len(listed(tmp_path)) == 250


def test_a_resumed_run_reads_the_list_except_for_an_unfinished_line(tmp_path):
    old = '{"id": "a", "reason": "too long", "detail": ""}\n{"id": "b", "rea'
    (tmp_path / "skipped.jsonl").write_text(old)
    skipped = SkippedUtterances(tmp_path / "skipped.jsonl")
    skipped.note([Skipped("a", "too long"), Skipped("c", "too long")])
    assert [line["id"] for line in listed(tmp_path)] == ["a", "c"]
    (tmp_path / "skipped.jsonl").unlink()
    skipped.note([Skipped("a", "too long"), Skipped("d", "too long")])
    assert [line["id"] for line in listed(tmp_path)] == ["a", "d"]


def test_an_utterance_that_is_left_out_takes_under_200_bytes_of_memory(tmp_path):
    number, skipped = 10_000, SkippedUtterances(tmp_path / "skipped.jsonl")
    tracemalloc.start()
    try:
        for first in range(0, number, 500):
            some = [Skipped(f"utterance-{first + i}", "too long", "31 s > 30 s", f"/data/{i}.wav") for i in range(500)]
            skipped.note(some, "train")
            skipped.note(some, "train")
        del some
        ours = [tracemalloc.Filter(True, "*/sedtrain/*")]
        found = tracemalloc.take_snapshot().filter_traces(ours).statistics("filename")
    finally:
        tracemalloc.stop()
    assert 0 < sum(each.size for each in found) < 200 * number
    assert skipped.of_split["train"] == skipped.totals() == {"too long": number}
    assert SkippedUtterances(tmp_path / "skipped.jsonl").totals() == {"too long": number}


# --- how much is too much


def test_a_plan_with_too_many_bad_utterances_is_an_error_with_counts(tmp_path):
    audio, texts = ["a.wav"] * 115 + ["none.wav"] * 5, ["one"] * 105 + [""] * 10 + ["one"] * 5
    write(tmp_path / "train.parquet", [0.1] * 120, audio=audio, text=texts)
    (tmp_path / "a.wav").write_bytes(wav(0.1))
    with pytest.raises(UserError) as raised:
        data_module(tmp_path).corpus.refuse_unusable(["train"])
    assert raised.value.args == (
        "data.max_bad_fraction",
        0.1,
        "utterances of train: 15 of 120 could not be used, which is more "
        f"(in all splits 10 empty text, 5 missing file; {tmp_path}/skipped.jsonl lists them)",
        "write data.path and data.columns of utterances that can be used, "
        "or a higher data.max_bad_fraction to continue with the others",
    )
    data_module(tmp_path, max_bad_fraction=0.125).corpus.refuse_unusable(["train"])


def test_what_is_beyond_the_limits_that_were_set_does_not_count(tmp_path):
    write(tmp_path / "train.parquet", [0.1, 0.2, 0.3, 0.4] * 30)
    options = {"max_seconds": 0.35, "min_seconds": 0.15, "max_characters": 3, "max_bad_fraction": 0}
    data = data_module(tmp_path, **options)
    assert len(data.corpus.kept("train")) == 30
    assert data.skipped.totals() == {"too short": 30, "too long": 30, "text too long": 30}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_that_cannot_be_decoded_stop_training(tmp_path, num_workers):
    write(tmp_path / "train.parquet", [0.5] * 30, audio=[wav(0.5)] * 22 + [b"no audio"] * 8, seconds=[0.5] * 30)
    fit(data_module(tmp_path, columns=WITH_SECONDS, batch_seconds=2, num_workers=num_workers), 1, limit_val_batches=0)
    data = data_module(tmp_path, columns=WITH_SECONDS, batch_seconds=2, num_workers=num_workers)
    with pytest.raises(
        UserError, match=r"utterances of train: 1\d of \d\d could not be decoded, .* 8 unreadable audio;"
    ):
        fit(data, 9, limit_val_batches=0)


def test_a_stream_with_too_many_bad_utterances_stops_where_it_reads_them(tmp_path):
    write(tmp_path / "train.parquet", [0.1] * 200, text=["one"] * 150 + [""] * 50)
    options = {"streaming": True, "block_utterances": 20, "batch_seconds": 2}
    with pytest.raises(UserError, match="utterances of train: 30 of 180 could not be used, which is more"):
        for _ in data_module(tmp_path, **options).train_dataloader():
            pass
    seen = [
        id for batch in data_module(tmp_path, **options, max_bad_fraction=0.5).train_dataloader() for id in batch.ids
    ]
    assert len(seen) == 150


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), max_size=20), st.floats(0, 1))
def test_a_run_is_stopped_where_the_fraction_is_passed_and_not_before(tmp_path_factory, batches, most):
    skipped = SkippedUtterances(tmp_path_factory.mktemp("run") / "skipped.jsonl", max_bad_fraction=most)
    num_seen = num_bad = 0
    for number, (size, bad) in enumerate(batches):
        num_seen, num_bad = num_seen + size, num_bad + min(bad, size)
        those = [Skipped(f"{number}-{each}", "bad") for each in range(min(bad, size))]
        if num_bad / max(num_seen, 100) > most:
            with pytest.raises(UserError):
                skipped.note_decoded("train", size, those)
            return
        skipped.note_decoded("train", size, those)


class Ranks:
    """Threads that sum what each of them gives."""

    def __init__(self, number):
        self.barrier, self.given = threading.Barrier(number, timeout=20), {}

    def sums(self, numbers):
        self.given[threading.get_ident()] = numbers
        self.barrier.wait()
        total = [sum(each) for each in zip(*self.given.values(), strict=True)]
        self.barrier.wait()
        return total

    def run(self, steps):
        """What each rank raised, and after which step."""
        ended = {}

        def one(rank):
            try:
                for step in steps(rank):
                    ended[rank] = (step, None)
            except UserError as error:
                ended[rank] = (ended[rank][0] if rank in ended else -1, str(error))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.barrier.parties)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return ended


@pytest.mark.parametrize("policy", ["skip", "error"])
def test_ranks_stop_at_the_same_step_whichever_of_them_met_the_bad_utterances(tmp_path, policy):
    ranks = Ranks(3)

    def steps(rank):
        skipped = SkippedUtterances(tmp_path / "skipped.jsonl", policy, 0.1)
        for step in range(100):
            bad = [Skipped(f"bad-{step}", "silent audio", "", "/a.wav")] if rank == 1 and step >= 5 else []
            skipped.note_decoded("train", 2, bad, ranks.sums)
            yield step

    ended = ranks.run(steps)
    assert len({step for step, _ in ended.values()}) == 1
    step, error = ended[0]
    if policy == "error":
        assert step == 4
        assert set(ended.values()) == {(4, error)}
        assert "\n    utterance 'bad-5' (/a.wav): silent audio\n" in error
    else:
        assert step == 14
        assert "\n    utterances of train: 11 of 96 could not be decoded, which is more" in error


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ("skip", "utterances of train: 1[0-9]+ of [0-9]+ could not be decoded"),
        ("error", "utterance 'train-[0-9]+' .*unreadable"),
    ],
)
def test_two_processes_end_together_with_the_same_message(tmp_path, policy, told):
    audio = [wav(0.5)] * 22 + [b"no audio"] * 8
    write(tmp_path / "train.parquet", [0.5] * 30, audio=audio, seconds=[0.5] * 30)
    data = data_module(tmp_path, columns=WITH_SECONDS, batch_seconds=1, on_bad_utterance=policy)
    with pytest.raises(ProcessRaisedException, match=told):
        fit(data, 20, limit_val_batches=0, devices=2, strategy="ddp_fork")
    assert len(listed(tmp_path)) == len({line["id"] for line in listed(tmp_path)})
