"""Whatever is wrong with an utterance, it is left out under a reason of its own, and the others are trained on."""

import io
import json
import os
import struct
import threading
import wave

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile
from corpora import COLUMNS, WITH_SECONDS, data_module, fit, listed, wav, write
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing import ProcessRaisedException

from sedtrain.batch import Skipped
from sedtrain.data.audio import UNREADABLE, RefusedAudio, read_audio
from sedtrain.data.skipped import Limits, SkippedUtterances
from sedtrain.errors import UserError
from sedtrain.text.normalizers import normalizer

RATE = 16_000
NOISE = np.random.default_rng(0).normal(0, 0.1, RATE)
NO_SECONDS = {**COLUMNS, "translation": None}
SECONDS = {**NO_SECONDS, "seconds": "seconds"}


def encoded(samples, container="WAV", subtype=None, rate=RATE):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=subtype)
    return file.getvalue()


def changed(content, at, number):
    return content[:at] + struct.pack("<I", number) + content[at + 4 :]


def with_one(value):
    return encoded(np.where(np.arange(RATE) == 5000, value, NOISE), subtype="FLOAT")


# The data chunk of WAV is at byte 40, the sampling rate at 24.
AUDIO = {
    "truncated.wav": (encoded(NOISE)[:20_000], "truncated audio"),
    "truncated.aiff": (encoded(NOISE, "AIFF")[:20_000], "truncated audio"),
    "truncated.mp3": (encoded(NOISE, "MP3")[:4_000], "truncated audio"),
    "truncated.flac": (encoded(NOISE, "FLAC")[:10_000], "undecodable audio"),
    "truncated.ogg": (encoded(NOISE, "OGG", "VORBIS")[:5_000], "no samples"),
    "truncated.opus": (encoded(NOISE, "OGG", "OPUS")[:400], "unreadable audio"),
    "header_alone.wav": (encoded(NOISE)[:44], "no samples"),
    "corrupt.flac": (b"fLaC" + bytes(1000), "unreadable audio"),
    "text.wav": (b"a letter, not a sound\n" * 10, "unreadable audio"),
    "page.mp3": (b"<html><body>404 Not Found</body></html>", "unreadable audio"),
    "wav_in.raw": (encoded(NOISE), "unreadable audio"),
    "empty.wav": (b"", "empty file"),
    "no_samples.wav": (encoded(NOISE[:0]), "no samples"),
    "nan.wav": (with_one(np.nan), "NaN or infinite samples"),
    "inf.wav": (with_one(-np.inf), "NaN or infinite samples"),
    "huge.wav": (with_one(1e30), "samples out of range"),
    "zeros.flac": (encoded(np.zeros(RATE), "FLAC"), "silent audio"),
    "constant.wav": (encoded(np.full(RATE, 0.25)), "silent audio"),
    "rate_1.wav": (changed(encoded(NOISE), 24, 1), "impossible sampling rate"),
    "rate_2e9.wav": (changed(encoded(NOISE), 24, 2_000_000_000), "impossible sampling rate"),
}


def split_of(folder, rows, name="train"):
    """A manifest of rows, the audio of which may be bytes that are written to a file."""
    (folder / "data").mkdir(exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps({"text": "one", "seconds": 1.0, **row}) for row in rows]
    (folder / f"data/{name}.jsonl").write_text("\n".join(lines))
    return folder / "data"


def left_out(folder, columns=NO_SECONDS, **options):
    """What training leaves out of a manifest, by id, and the ids of the others."""
    data = data_module(folder, folder.parent, columns, **options)
    fit(data, 1, limit_val_batches=0)
    seen = sorted(id for batch in data.train_dataloader() for id in batch.ids)
    return {line["id"]: line for line in listed(folder.parent)} if data.skipped.counts else {}, seen


pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


# --- audio


@pytest.mark.parametrize("columns", [NO_SECONDS, SECONDS], ids=["by header", "by column"])
def test_every_kind_of_bad_audio_has_a_reason_and_stops_nothing(tmp_path, columns):
    rows = [{"audio": name} for name in ("good.wav", *AUDIO)]
    folder = split_of(tmp_path, rows)
    (folder / "good.wav").write_bytes(wav(1.0))
    for name, (content, _) in AUDIO.items():
        (folder / name).write_bytes(content)
    lines, seen = left_out(folder, columns, num_workers=1, max_bad_fraction=1)
    assert seen == ["train-0"]
    found = {line["path"]: line["reason"] for line in lines.values()}
    expected = {str(folder / name): reason for name, (_, reason) in AUDIO.items()}
    if columns is NO_SECONDS:  # such a header gives a length that is left out before anything is decoded
        expected |= {
            str(folder / name): "too short" for name in ("truncated.ogg", "header_alone.wav", "no_samples.wav")
        }
    else:
        wrong = ("truncated.ogg", "header_alone.wav", "no_samples.wav")
        expected |= {str(folder / name): "declared duration is wrong" for name in wrong}
    assert found == expected


@pytest.mark.parametrize("columns", [NO_SECONDS, SECONDS], ids=["by header", "by column"])
def test_audio_that_is_not_there_is_named_by_its_path(tmp_path, columns):
    (tmp_path / "beside.wav").write_bytes(wav(1.0))
    rows = [{"audio": name} for name in ("good.wav", "none.wav", "../beside.wav", None, "", "good.wav/x.wav", "folder")]
    folder = split_of(tmp_path, [*rows, {"audio": "pipe"}])
    (folder / "good.wav").write_bytes(wav(1.0))
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    lines, seen = left_out(folder, columns)
    assert seen == ["train-0"]
    assert {id: (line["reason"], line["path"]) for id, line in lines.items()} == {
        "train-1": ("missing file", f"{folder}/none.wav"),
        "train-2": ("path outside the dataset's folder", f"{folder}/../beside.wav"),
        "train-3": ("no audio", f"{folder}/train.jsonl"),
        "train-4": ("no audio", f"{folder}/train.jsonl"),
        "train-5": ("missing file", f"{folder}/good.wav/x.wav"),
        "train-6": ("missing file", f"{folder}/folder"),
        "train-7": ("missing file", f"{folder}/pipe"),
    }


def test_an_mp3_that_is_called_wav_is_read(tmp_path):
    (tmp_path / "a.wav").write_bytes(encoded(NOISE, "MP3"))
    whole = read_audio("a.wav", RATE, tmp_path)
    assert np.array_equal(whole, read_audio(encoded(NOISE, "MP3"), RATE))
    assert len(whole) == RATE


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF024])
def test_audio_that_was_written_to_a_pipe_does_not_know_its_length_and_is_whole(size):
    assert len(read_audio(changed(encoded(NOISE), 40, size), RATE)) == RATE


def test_a_segment_before_the_end_of_a_cut_recording_is_used():
    cut = encoded(NOISE)[:24_044]  # 0.75 s
    assert len(read_audio(cut, RATE, None, 0.0, 0.5)) == RATE / 2
    with pytest.raises(RefusedAudio, match=r"0\.25 s are missing"):
        read_audio(cut, RATE, None, 0.25, None)


def test_a_stereo_file_that_is_silent_in_one_channel_is_used():
    both = np.stack([NOISE, np.zeros(RATE)], axis=1)
    np.testing.assert_allclose(read_audio(encoded(both, subtype="FLOAT"), RATE), NOISE / 2, atol=1e-6)


@pytest.mark.parametrize(("declared", "is_used"), [(1.0, True), (0.6, True), (1.5, True), (0.4, False), (25.0, False)])
def test_a_length_that_is_declared_may_be_wrong_by_half_a_second(tmp_path, declared, is_used):
    folder = split_of(tmp_path, [{"audio": "good.wav"}, {"audio": "b.wav", "seconds": declared}])
    for name in ("good.wav", "b.wav"):
        (folder / name).write_bytes(wav(1.0))
    lines, seen = left_out(folder, SECONDS)
    assert seen == ["train-0", "train-1"][: 1 + is_used]
    why = f"1.00 s, declared {declared:.2f} s"
    assert [(line["reason"], line["detail"]) for line in lines.values()] == [("declared duration is wrong", why)][
        is_used:
    ]


def test_audio_that_is_longer_than_allowed_although_declared_as_shorter_is_left_out(tmp_path):
    folder = split_of(tmp_path, [{"audio": "good.wav"}, {"audio": "b.wav", "seconds": 1.0}])
    (folder / "good.wav").write_bytes(wav(1.0))
    (folder / "b.wav").write_bytes(wav(1.3))
    lines, seen = left_out(folder, SECONDS, max_seconds=1.2)
    assert (seen, lines["train-1"]["reason"]) == (["train-0"], "too long")


# --- memory


def peak_of(call):
    import tracemalloc

    tracemalloc.start()
    try:
        call()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def claiming_flac(num_samples):
    """FLAC of a second whose header claims another number of samples, of at most 36 bits."""
    content = bytearray(encoded(NOISE, "FLAC"))
    content[21] = content[21] & 0xF0 | num_samples >> 32
    content[22:26] = (num_samples & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(content)


def test_memory_is_taken_for_what_is_there_whatever_the_header_claims():
    content = claiming_flac(2**36 - 1)  # 275 GB
    assert soundfile.info(io.BytesIO(content)).frames == 2**36 - 1

    def refused():
        with pytest.raises(UNREADABLE):
            read_audio(content, RATE)

    assert peak_of(refused) < 100e6


def test_what_a_header_claims_beyond_what_is_declared_is_not_decoded():
    with pytest.raises(RefusedAudio, match=r"4294967.30 s, declared 1.00 s"):
        read_audio(claiming_flac(2**36 - 1), RATE, declared=1.0)


# --- corruption anywhere

FORMATS = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)]
SHORT = {kind: encoded(NOISE[:4000], *kind) for kind in FORMATS}


@st.composite
def corrupted(draw):
    """A short file of some format with bytes changed, cut off, taken out or put in."""
    content = bytearray(SHORT[draw(st.sampled_from(FORMATS))])
    for _ in range(draw(st.integers(1, 4))):
        header = st.integers(0, min(100, max(len(content) - 1, 0)))  # the header decides most
        at = draw(st.one_of(header, st.integers(0, max(len(content) - 1, 0))))
        how = draw(st.sampled_from(["change", "cut", "remove", "insert"]))
        some = draw(st.binary(min_size=1, max_size=8))
        if how == "cut":
            del content[at:]
        else:
            content[at : at + (0 if how == "insert" else len(some))] = b"" if how == "remove" else some
    return bytes(content)


@settings(max_examples=400)
@given(corrupted())
def test_corrupt_audio_is_refused_or_finite(content):
    try:
        audio = read_audio(content, RATE)
    except RefusedAudio as error:
        assert error.reason
        return
    assert audio.ndim == 1 and len(audio)
    assert np.isfinite(audio.numpy()).all()


# --- text

TEXTS = {
    "null": (None, "empty text"),
    "empty": ("", "empty text"),
    "white": (" \t\n", "empty text"),
    "object": ({"words": "one"}, "text that is not text"),
    "list": (["one", "two"], "text that is not text"),
    "NUL": ("o\0ne", "control characters in the text"),
    "escape": ("\x1b[31mone", "control characters in the text"),
    "C1": ("one\x85two", "control characters in the text"),
    "short": ("o", "text too short"),
    "long": ("one " * 20, "text too long"),
    "marks": ("?! ...", "text empty once normalized"),
}
GOOD_TEXTS = ["one", 314, 2.5, "tab\tand\nline", "نعم", "zero\u200dwidth", "1", True]


def test_every_kind_of_bad_text_has_a_reason_and_numbers_are_text(tmp_path):
    bad = [{"id": name, "audio": "a.wav", "text": text} for name, (text, _) in TEXTS.items()]
    good = [{"id": f"good-{i}", "audio": "a.wav", "text": text} for i, text in enumerate(GOOD_TEXTS) if text != "1"]
    folder = split_of(tmp_path, [*bad, *good])
    (folder / "a.wav").write_bytes(wav(1.0))
    data = data_module(
        folder, tmp_path, {**NO_SECONDS, "id": "id"}, min_characters=2, max_characters=70, max_bad_fraction=1
    )
    data.corpus.rewrite = normalizer("whisper_basic")
    assert len(data.corpus.kept("train")) == len(good)
    found = {line["id"]: line["reason"] for line in listed(tmp_path)}
    assert found == {name: reason for name, (_, reason) in TEXTS.items()}


def test_only_training_texts_have_to_survive_their_normalizer(tmp_path):
    rows = [{"audio": "a.wav", "text": "..."}, {"audio": "a.wav"}]
    split_of(tmp_path, rows, "validation")
    folder = split_of(tmp_path, rows)
    (folder / "a.wav").write_bytes(wav(1.0))
    data = data_module(folder, tmp_path, NO_SECONDS)
    data.corpus.rewrite = normalizer("whisper_basic")
    assert (len(data.corpus.kept("train")), len(data.corpus.kept("validation"))) == (1, 2)


@given(st.text(max_size=30))
def test_every_text_is_kept_or_has_a_reason(text):
    reason = Limits(0, 30).refused_text(text)
    has_control = any((ord(each) < 32 and each not in "\t\n\r") or 127 <= ord(each) < 160 for each in text)
    assert bool(reason) == (not text.strip() or has_control)


# --- rows


def test_rows_that_cannot_be_read_are_named_by_the_file_they_stand_in(tmp_path):
    folder = split_of(tmp_path, [{"audio": "a.wav"}, '{"audio": "a.wav", "te', "[1]", '"\\ud800"'])
    (folder / "a.wav").write_bytes(wav(1.0))
    lines, seen = left_out(folder)
    assert seen == ["train-0"]
    manifest = f"{folder}/train.jsonl"
    assert {(line["reason"], line["path"]) for line in lines.values()} == {("broken JSON", manifest)}
    assert [line["detail"].partition(",")[0].partition(" is")[0] for line in lines.values()] == [
        "line 2",
        "line 3",
        "line 4",
    ]


def test_rows_of_parquet_that_cannot_be_decoded_leave_the_others(tmp_path):
    file = tmp_path / "data/train.parquet"
    file.parent.mkdir()
    table = pa.table({"audio": [wav(0.5, i) for i in range(4)], "text": ["one"] * 4})
    pyarrow.parquet.write_table(table, file, row_group_size=2, compression="zstd")
    content = bytearray(file.read_bytes())
    column = pyarrow.parquet.read_metadata(file).row_group(1).column(0)
    start = column.dictionary_page_offset
    content[start : start + 200] = bytes(200)
    file.write_bytes(content)
    lines, seen = left_out(file.parent)
    assert seen == ["train-0", "train-1"]
    assert {(line["reason"], line["path"]) for line in lines.values()} == {("broken Parquet", str(file))}
    assert lines.keys() == {"train-2", "train-3"}


def test_parquet_whose_end_is_damaged_is_told(tmp_path):
    write(tmp_path / "train.parquet", [0.5])
    content = bytearray((tmp_path / "train.parquet").read_bytes())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[footer : footer + 50] = b"\xff" * 50
    (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"split 'train': .*thrift.*\n  write instead: .* in files that can be read"):
        data_module(tmp_path).corpus.refuse_unusable(["train"])


# --- the list


def test_the_first_of_a_reason_is_told_and_the_totals_are_by_frequency(tmp_path, caplog):
    skipped = SkippedUtterances(tmp_path / "skipped.jsonl")
    skipped.note([Skipped("a", "too long", "9 s", "/a.wav"), Skipped("b", "too short"), Skipped("c", "too short")])
    assert caplog.messages == [
        "skipping utterances: too long (first: a 9 s)",
        "skipping utterances: too short (first: b)",
    ]
    assert list(skipped.totals().items()) == [("too short", 2), ("too long", 1)]
    assert list(json.loads((tmp_path / "skipped.jsonl").read_text().splitlines()[0]).items()) == [
        ("id", "a"), ("path", "/a.wav"), ("reason", "too long"), ("detail", "9 s")
    ]  # fmt: skip


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


def test_a_run_that_goes_on_reads_what_was_listed_but_for_a_line_that_was_cut(tmp_path):
    old = '{"id": "a", "reason": "too long", "detail": ""}\n{"id": "b", "rea'
    (tmp_path / "skipped.jsonl").write_text(old)
    skipped = SkippedUtterances(tmp_path / "skipped.jsonl")
    skipped.note([Skipped("a", "too long"), Skipped("c", "too long")])
    assert [line["id"] for line in listed(tmp_path)] == ["a", "c"]
    (tmp_path / "skipped.jsonl").unlink()
    skipped.note([Skipped("a", "too long"), Skipped("d", "too long")])
    assert [line["id"] for line in listed(tmp_path)] == ["a", "d"]


# --- how much is too much


def test_a_plan_with_too_many_bad_utterances_is_an_error_with_counts(tmp_path):
    rows = [{"audio": "a.wav"}] * 105 + [{"audio": "a.wav", "text": ""}] * 10 + [{"audio": "none.wav"}] * 5
    folder = split_of(tmp_path, rows)
    (folder / "a.wav").write_bytes(wav(0.1))
    with pytest.raises(UserError) as raised:
        data_module(folder, tmp_path, NO_SECONDS).corpus.refuse_unusable(["train"])
    assert raised.value.args == (
        "data.max_bad_fraction",
        0.1,
        "utterances of train: 15 of 120 could not be used, which is more "
        f"(in all splits 10 empty text, 5 missing file; {tmp_path}/skipped.jsonl lists them)",
        "write data.path and data.columns of utterances that can be used, "
        "or a higher data.max_bad_fraction to continue with the others",
    )
    data_module(folder, tmp_path, NO_SECONDS, max_bad_fraction=0.125).corpus.refuse_unusable(["train"])


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
                skipped.decoded("train", size, those)
            return
        skipped.decoded("train", size, those)


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
            skipped.decoded("train", 2, bad, ranks.sums)
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


def test_a_wave_file_of_the_standard_library_is_read():
    file = io.BytesIO()
    with wave.open(file, "wb") as content:
        content.setparams((1, 2, RATE, 0, "NONE", ""))
        content.writeframes((NOISE * 32767).astype("<i2").tobytes())
    np.testing.assert_allclose(read_audio(file.getvalue(), RATE), NOISE, atol=1e-4)
