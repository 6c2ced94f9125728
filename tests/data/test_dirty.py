"""Whatever is wrong with an utterance, it is left out under a reason of its own, and the others are trained on."""

import io
import json
import os
import struct
import wave

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile
from corpora import COLUMNS, data_module, fit, listed, wav, write
from hypothesis import given, settings
from hypothesis import strategies as st

from sedtrain.data.audio import read_audio
from sedtrain.data.headers import RefusedAudio
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
    "truncated.flac": (encoded(NOISE, "FLAC")[:10_000], "truncated audio"),
    "truncated.ogg": (encoded(NOISE, "OGG", "VORBIS")[:5_000], "truncated audio"),
    "truncated.opus": (encoded(NOISE, "OGG", "OPUS")[:400], "truncated audio"),
    "header_alone.wav": (encoded(NOISE)[:44], "no samples"),
    "corrupt.flac": (b"fLaC" + bytes(1000), "unreadable audio"),
    "text.wav": (b"a letter, not a sound\n" * 10, "unreadable audio"),
    "page.mp3": (b"<html><body>404 Not Found</body></html>", "unreadable audio"),
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


def test_a_wave_file_of_the_standard_library_is_read():
    file = io.BytesIO()
    with wave.open(file, "wb") as content:
        content.setparams((1, 2, RATE, 0, "NONE", ""))
        content.writeframes((NOISE * 32767).astype("<i2").tobytes())
    np.testing.assert_allclose(read_audio(file.getvalue(), RATE), NOISE, atol=1e-4)


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


DECLARED = {
    "right": (1.0, None),
    "none": (None, None),
    "NaN": (float("nan"), None),
    "hours": (3600.0, "declared duration is wrong"),
    "nothing": (0.0, "declared duration is wrong"),
    "1e308": (1e308, "impossible time"),
    "inf": (float("inf"), "impossible time"),
    "negative": (-1.0, "impossible time"),
}


def test_a_declared_length_is_a_limit_of_the_user_only_where_the_audio_has_it(tmp_path):
    rows = [{"id": name, "audio": "a.wav", "seconds": seconds} for name, (seconds, _) in DECLARED.items()]
    rows += [{"id": "long", "audio": "long.wav", "seconds": 3.0}, {"id": "gone", "audio": "gone.wav", "seconds": 3.0}]
    folder = split_of(tmp_path, rows)
    (folder / "a.wav").write_bytes(wav(1.0))
    (folder / "long.wav").write_bytes(wav(3.0))
    lines, seen = left_out(folder, {**SECONDS, "id": "id"}, max_seconds=2.0, max_bad_fraction=1)
    wrong = {name: reason for name, (_, reason) in DECLARED.items() if reason}
    assert {id: line["reason"] for id, line in lines.items()} == wrong | {"long": "too long", "gone": "missing file"}
    assert seen == sorted(DECLARED.keys() - wrong.keys())
    assert max(len(line["detail"]) for id, line in lines.items() if id != "gone") < 40


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
        with pytest.raises(RefusedAudio):
            read_audio(content, RATE)

    assert peak_of(refused) < 100e6


def test_what_a_header_claims_beyond_what_is_declared_is_not_decoded():
    with pytest.raises(RefusedAudio, match=r"4294966.30 s are missing"):
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
    "controls": ("\0\x1b\x9f", "empty text"),
    "invisible": ("\u200b \ufeff\u00a0\u2060", "empty text"),
    "short": ("o", "text too short"),
    "long": ("one " * 20, "text too long"),
    "marks": ("?! ...", "text empty once normalized"),
}
GOOD_TEXTS = [
    "o\0ne",
    "\x1b[31mone",
    "one\x85two",
    "one",
    314,
    2.5,
    "tab\tand\nline",
    "نعم",
    "zero\u200dwidth",
    "1",
    True,
]


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


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_control_characters_are_taken_out_of_a_text_and_its_utterances_counted(tmp_path, caplog, suffix):
    texts = ["h\0e\0l\0l\0o\0", "one\x0ctwo\x85three", "\x07\x7fbell", "fine\ttab", '{"a": 1}', "\x1b\x9f"]
    rows = [{"id": f"r{number}", "audio": "a.wav", "text": text} for number, text in enumerate(texts)]
    if suffix == "jsonl":
        split_of(tmp_path, [*rows, {"id": "list", "audio": "a.wav", "text": ["no text"]}])
    else:
        (tmp_path / "data").mkdir()
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "data/train.parquet")
    (tmp_path / "data/a.wav").write_bytes(wav(1.0))
    data = data_module(tmp_path / "data", tmp_path, {**NO_SECONDS, "id": "id"}, max_bad_fraction=1)
    data.corpus.kept("train")
    assert list(data.corpus.texts("train"))[:6] == ["hello", "one two three", "bell", "fine\ttab", '{"a": 1}', ""]
    assert "train: texts from which control characters are taken out: 4 (first: r0)" in caplog.messages
    assert {line["id"]: line["reason"] for line in listed(tmp_path)} == {"r5": "empty text"} | (
        {"list": "text that is not text"} if suffix == "jsonl" else {}
    )


def test_only_training_texts_have_to_survive_their_normalizer(tmp_path):
    rows = [{"audio": "a.wav", "text": "..."}, {"audio": "a.wav"}]
    split_of(tmp_path, rows, "validation")
    folder = split_of(tmp_path, rows)
    (folder / "a.wav").write_bytes(wav(1.0))
    data = data_module(folder, tmp_path, NO_SECONDS)
    data.corpus.rewrite = normalizer("whisper_basic")
    assert (len(data.corpus.kept("train")), len(data.corpus.kept("validation"))) == (1, 2)


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


def test_parquet_whose_end_is_damaged_is_reported(tmp_path):
    write(tmp_path / "train.parquet", [0.5])
    content = bytearray((tmp_path / "train.parquet").read_bytes())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[footer : footer + 50] = b"\xff" * 50
    (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"split 'train': .*thrift.*\n    write .* in files that can be read"):
        data_module(tmp_path).corpus.refuse_unusable(["train"])
