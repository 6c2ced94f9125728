"""What a local path can be: every format is written here with other tools than those that read it."""

import io
import json
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import soundfile
from corpora import known, mistake, refused, utterance_rows

from sedtrain.batch import Skipped
from sedtrain.data.audio import ByteRange, path_in, read_audio
from sedtrain.data.audio_paths import audio_paths
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.data.dataset import SplitDataset
from sedtrain.data.headers import RefusedAudio
from sedtrain.data.load_rows import load_rows
from sedtrain.data.parts import parts_of
from sedtrain.data.readers import READERS
from sedtrain.data.source import Columns, Source
from sedtrain.data.tables import NOT_TEXT, PROBLEM

PLAIN = Columns(audio="audio", text="text")
WITH_ID = Columns(audio="audio", text="text", id="id")
NEMO = Columns(audio="audio_filepath", text="text", seconds="duration", start="offset")
RATE = 16_000


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def speech(seed, seconds=0.2):
    """(S,) samples that 16 bits hold exactly, other ones for every seed."""
    return np.random.default_rng(seed).integers(-(2**14), 2**14, int(seconds * RATE)).astype(np.float32) / 2**15


def save(path, samples, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, RATE, **options)


def wav(samples):
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="WAV")
    return file.getvalue()


def rows_of(path, columns=PLAIN, split="train", folder=None):
    return utterance_rows(load_rows(str(path), split), columns, str(path), split, folder)


def read(path, columns=PLAIN, split="train"):
    """Text and samples of each utterance by its id."""
    rows = rows_of(path, columns, split)
    found = (rows.utterance(index, RATE) for index in range(len(rows)))
    return {each.id: (each.text, each.audio.numpy()) for each in found}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for id, (text, samples) in expected.items():
        assert found[id][0] == text
        np.testing.assert_array_equal(found[id][1], samples)


def problems(path, columns=PLAIN, split="train"):
    rows = rows_of(path, columns, split)
    found = {rows.id(index): rows.problem(index, seconds) for index, seconds in enumerate(rows.seconds())}
    return {id: reason for id, reason in found.items() if reason}


# --- saved by datasets


def test_what_save_to_disk_wrote_is_read(tmp_path):
    clips = [speech(i) for i in range(3)]
    rows = datasets.Dataset.from_dict({"audio": [wav(each) for each in clips], "text": ["a", "b", "c"]})
    rows.save_to_disk(tmp_path / "one")
    expected = {f"train-{i}": ("abc"[i], clips[i]) for i in range(3)}
    assert_same(read(tmp_path / "one"), expected)
    datasets.DatasetDict({"train": rows, "test": rows.select([2])}).save_to_disk(tmp_path / "several")
    assert_same(read(tmp_path / "several"), expected)
    assert_same(read(tmp_path / "several", split="test"), {"test-0": ("c", clips[2])})
    assert mistake(load_rows, str(tmp_path / "several"), "dev") == (
        "data.path",
        str(tmp_path / "several"),
        "there is no split 'dev', there are train, test",
        "write data.train_split, data.validation_split, data.test_split that are there, or slices of one: "
        "'train[:90%]', 'train[90%:]'",
    )


# --- folders of audio


@pytest.mark.parametrize("table", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_a_folder_has_its_texts_in_a_metadata_file(tmp_path, table):
    for split in ("train", "test"):
        rows = [{"file_name": f"{i}.flac", "text": f"{split} {i}", "translation": "x"} for i in range(2)]
        for i in range(2):
            save(tmp_path / split / f"{i}.flac", speech(i))
        pyarrow_rows = pa.Table.from_pylist(rows)
        if table.endswith("csv"):
            pyarrow.csv.write_csv(pyarrow_rows, tmp_path / split / table)
        elif table.endswith("jsonl"):
            (tmp_path / split / table).write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pyarrow.parquet.write_table(pyarrow_rows, tmp_path / split / table)
    for split in ("train", "test"):
        expected = {f"{i}.flac": (f"{split} {i}", speech(i)) for i in range(2)}
        assert_same(read(tmp_path, WITH_ID, split), expected)


def test_a_metadata_file_without_file_names_is_told(tmp_path):
    save(tmp_path / "a.wav", speech(0))
    (tmp_path / "metadata.csv").write_text("name,text\na.wav,hello\n")
    wrong = "metadata.csv has no column 'file_name', it has name, text"
    write = "write a metadata.csv with file_name, relative to its folder, and text"
    assert mistake(load_rows, str(tmp_path), "train") == ("data.path", str(tmp_path), wrong, write)


def test_a_folder_has_a_text_file_beside_each_audio_file(tmp_path):
    for i, name in enumerate(["a.wav", "deep/b.flac"]):
        save(tmp_path / name, speech(i))
        (tmp_path / name).with_suffix(".txt").write_text(f"text {i}\n", encoding="utf-8-sig")
    assert_same(read(tmp_path, WITH_ID), {"a": ("text 0", speech(0)), "deep/b": ("text 1", speech(1))})


def test_a_missing_or_unreadable_text_file_is_a_problem_of_its_utterance(tmp_path):
    for name in "abc":
        save(tmp_path / f"{name}.wav", speech(0))
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    assert problems(tmp_path, WITH_ID) == {
        "b": ("no transcript", "b.txt"),
        "c": ("text that is not UTF-8", "c.txt"),
    }


SUFFIXES = {
    "wav": "WAV", "WAV": "WAV", "wave": "WAV", "flac": "FLAC", "ogg": "OGG", "oga": "OGG", "aif": "AIFF", "aiff": "AIFF",
    "sph": "NIST", "au": "AU", "snd": "AU", "caf": "CAF", "w64": "W64", "mp3": "MP3", "MP3": "MP3",
}  # fmt: skip
CONTAINERS = {
    "m4a": b"\0\0\0\x20ftypM4A \0\0",
    "mp4": b"\0\0\0\x20ftypisom\0\0",
    "webm": b"\x1aE\xdf\xa3\x01\0\0\0",
    "aac": b"\xff\xf1\x50\x80\x02\x1f\xfc\xde",
    "WMA": b"0&\xb2u\x8ef\xcf\x11",
    "amr": b"#!AMR\n",
}


@pytest.mark.parametrize("text", ["txt", "TXT"])
def test_whatever_has_a_text_is_a_row_that_is_read_or_left_out_by_name(tmp_path, text):
    for suffix, container in SUFFIXES.items():
        save(tmp_path / f"{suffix}.{suffix}", speech(0), format=container)
    for suffix, content in CONTAINERS.items():
        (tmp_path / f"{suffix}.{suffix}").write_bytes(content + bytes(1000))
    for name in (*SUFFIXES, *CONTAINERS):
        (tmp_path / f"{name}.{text}").write_text(f"text of {name}")
    rows = rows_of(tmp_path, WITH_ID)
    assert set(rows.ids()) == {*SUFFIXES, *CONTAINERS}
    assert set(rows.texts()) == {f"text of {name}" for name in (*SUFFIXES, *CONTAINERS)}
    found = problems(tmp_path, WITH_ID)
    assert found.keys() == CONTAINERS.keys()
    assert {reason for reason, _ in found.values()} == {"unreadable audio"}
    assert all(detail.endswith("which libsndfile does not read; convert it to FLAC") for _, detail in found.values())
    assert {Path(file).name.partition(".")[0] for file in audio_paths(str(tmp_path))} == {*SUFFIXES, *CONTAINERS}


def test_what_was_converted_stands_beside_its_origin(tmp_path):
    save(tmp_path / "a.wav", speech(0))
    (tmp_path / "a.m4a").write_bytes(CONTAINERS["m4a"])
    (tmp_path / "film.mp4").write_bytes(CONTAINERS["mp4"])
    (tmp_path / "a.txt").write_text("one")
    assert_same(read(tmp_path, WITH_ID), {"a": ("one", speech(0))})


def test_members_of_a_tar_that_cannot_be_read_are_left_out_by_name(tmp_path):
    tar(tmp_path / "train.tar", {"a.m4a": CONTAINERS["m4a"], "a.txt": b"one", "b.wav": wav(speech(0)), "b.txt": b"two"})
    assert problems(tmp_path, WITH_ID) == {
        "train/a": ("unreadable audio", "MP4 or M4A, which libsndfile does not read; convert it to FLAC")
    }


@pytest.mark.parametrize("table", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_one_metadata_file_may_stand_above_the_folders_of_the_splits(tmp_path, table):
    """As datasets' AudioFolder reads it; a name of another split is no row of this one."""
    rows = [
        {"file_name": f"{split}/deep/{i}.wav", "text": f"{split} {i}"} for split in ("train", "test") for i in range(2)
    ]
    for number, row in enumerate(rows):
        save(tmp_path / row["file_name"], speech(number))
    if table.endswith("csv"):
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows), tmp_path / table)
    elif table.endswith("jsonl"):
        (tmp_path / table).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / table)
    for first, split in ((0, "train"), (2, "test")):
        expected = {rows[first + i]["file_name"]: (f"{split} {i}", speech(first + i)) for i in range(2)}
        assert_same(read(tmp_path, WITH_ID, split), expected)


def test_metadata_files_may_stand_in_folders_below(tmp_path):
    for number, name in enumerate(["a", "b"]):
        save(tmp_path / f"train/{name}/x.wav", speech(number))
        (tmp_path / f"train/{name}/metadata.csv").write_text(f"id,file_name,text\n{name},x.wav,text of {name}\n")
    assert_same(read(tmp_path, WITH_ID), {"a": ("text of a", speech(0)), "b": ("text of b", speech(1))})


def test_ljspeech_as_unpacked_is_told_its_separator(tmp_path):
    save(tmp_path / "wavs/LJ001-0001.wav", speech(0))
    (tmp_path / "metadata.csv").write_text("LJ001-0001|Printing, in 1850|Printing, in eighteen fifty\n")
    told = refused(load_rows, str(tmp_path), "train[:90%]")
    assert f"{tmp_path}/metadata.csv: its columns are separated by |, not by commas\n    write .csv with commas" in told
    (tmp_path / "metadata.csv").write_text("name,text\na.wav,one,two\n")
    assert "has no column 'file_name', it has name, text\n" in refused(load_rows, str(tmp_path), "train")


def test_librispeech_as_unpacked_is_read(tmp_path):
    folder = tmp_path / "train-clean-100/19/198"
    for i in range(2):
        save(folder / f"19-198-000{i}.flac", speech(i))
    (folder / "19-198.trans.txt").write_text(
        "19-198-0000 NORTHANGER ABBEY\n19-198-0001 THIS LITTLE WORK\n19-198-0002 GONE\n"
    )
    for path, split in [(tmp_path, "train-clean-100"), (tmp_path / "train-clean-100", "train")]:
        rows = rows_of(path, WITH_ID, split)
        assert rows.texts() == ["NORTHANGER ABBEY", "THIS LITTLE WORK", "GONE"]
        for i in range(2):
            assert np.array_equal(rows.utterance(rows.index_of(f"19-198-000{i}"), RATE).audio, speech(i))
        assert problems(path, WITH_ID, split) == {"19-198-0002": ("missing file", "the audio of 19-198-0002")}


def test_a_folder_of_folders_for_other_splits_does_not_stand_for_a_missing_one(tmp_path):
    for split in ("train", "test_clean"):
        save(tmp_path / split / "a.wav", speech(0))
        (tmp_path / split / "a.txt").write_text("one")
    option, value, wrong, _ = mistake(load_rows, str(tmp_path), "validation")
    assert (option, value) == ("data.path", str(tmp_path))
    assert wrong == "there is no split 'validation', there are test_clean, train"


def test_any_local_split_can_be_cut(tmp_path):
    for i in range(10):
        save(tmp_path / f"{i}.wav", speech(i))
        (tmp_path / f"{i}.txt").write_text(str(i))
    assert load_rows(str(tmp_path), "train[:80%]")["text"][:] == list("01234567")
    assert load_rows(str(tmp_path), "train[80%:]")["text"][:] == list("89")


def test_a_folder_without_transcripts_is_told(tmp_path):
    save(tmp_path / "a.wav", speech(0))
    wrong = "there is no transcript of its 1 audio files"
    write = (
        "write metadata.csv or metadata.jsonl with file_name and text, a .txt beside each audio file, or *.trans.txt"
    )
    assert mistake(load_rows, str(tmp_path), "train") == ("data.path", str(tmp_path), wrong, write)


def test_a_format_that_is_not_known_is_told(tmp_path):
    (tmp_path / "x.docx").write_text("hello")
    wrong = ".docx is no format that can be read"
    write = "write data.path=FILE, unpacked, one of .parquet, .jsonl, .json, .csv, .tsv, .tar, or data.path=FOLDER"
    assert mistake(load_rows, str(tmp_path / "x.docx"), "train") == ("data.path", f"{tmp_path}/x.docx", wrong, write)


def test_parquet_under_another_suffix_is_read(tmp_path):
    pyarrow.parquet.write_table(pa.table({"audio": [wav(speech(0))], "text": ["a"]}), tmp_path / "x.pq")
    assert_same(read(tmp_path / "x.pq"), {"train-0": ("a", speech(0))})


def test_a_format_that_is_listed_is_read_wherever_a_file_is(tmp_path, monkeypatch):
    def read_lines(path):
        yield pa.table({"audio": ["a.wav"] * 2, "text": path.read_text().split()})

    monkeypatch.setitem(READERS, ".lines", read_lines)
    save(tmp_path / "a.wav", speech(0))
    for number in range(2):
        (tmp_path / f"train-{number}.lines").write_text(f"{number}a {number}b")
    for path in (tmp_path, tmp_path / "train-*.lines", tmp_path / "train-{0..1}.lines"):
        assert rows_of(path).texts() == ["0a", "0b", "1a", "1b"]
    assert [part.name for part in parts_of(Source(str(tmp_path), PLAIN, {"train": "train"}), "train", tmp_path)] == [
        "train-0",
        "train-1",
    ]


# --- manifests


def test_nemo_manifests_are_read_with_or_without_offsets(tmp_path):
    save(tmp_path / "long.wav", speech(0, 2.0))
    lines = [
        {"audio_filepath": "long.wav", "duration": 2.0, "text": "all"},
        {"audio_filepath": "long.wav", "duration": 0.5, "offset": 1.25, "text": "part"},
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "test.json").write_text(json.dumps(lines[0]))
    whole = speech(0, 2.0)
    expected = {"train-0": ("all", whole), "train-1": ("part", whole[20_000:28_000])}
    assert_same(read(tmp_path, NEMO), expected)
    assert_same(read(tmp_path, NEMO, "test"), {"test-0": ("all", whole)})
    assert known(rows_of(tmp_path, NEMO).seconds()) == [2.0, 0.5]


def test_a_broken_line_is_a_problem_of_its_own_with_its_number(tmp_path):
    lines = [b'{"id": "a", "audio": "a.wav", "text": "x"}', b'{"id": "b", "audio": ', b"", b"[1]", b'{"text": "\xff"}']
    (tmp_path / "m.jsonl").write_bytes(b"\n".join([*lines, b'{"id": "c", "audio": "a.wav", "text": "z"}']))
    save(tmp_path / "a.wav", speech(0))
    assert problems(tmp_path / "m.jsonl", WITH_ID) == {
        "train-1": ("broken JSON", "line 2, Expecting value"),
        "train-2": ("broken JSON", "line 4 is no object"),
        "train-3": ("text that is not UTF-8", "line 5"),
    }
    rows = rows_of(tmp_path / "m.jsonl", WITH_ID)
    assert rows.texts() == ["x", "", "", "", "z"]
    assert rows.utterance(rows.index_of("c"), RATE).text == "z"


def test_text_of_a_manifest_stays_as_it_was_written(tmp_path):
    texts = ["2020-01-01", "null", "NA", "1.50", "007", "true", "\ud83d"]
    lines = [json.dumps({"audio": "a.wav", "text": text}) for text in texts]
    (tmp_path / "m.jsonl").write_text("\n".join([*lines, '{"text": 3}', '{"text": NaN}']))
    assert rows_of(tmp_path / "m.jsonl").texts() == [*texts[:-1], "?", "3", ""]
    (tmp_path / "m.csv").write_text("audio,text\n" + "".join(f"a.wav,{text}\n" for text in texts[:-1]))
    assert rows_of(tmp_path / "m.csv").texts() == texts[:-1]
    (tmp_path / "n.csv").write_text("audio,text\na.wav,007\na.wav,008\n")
    assert rows_of(tmp_path / "n.csv").texts() == ["007", "008"]


def test_numbers_for_texts_are_text_and_nan_is_none(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav", "text": 6.5}\n{"audio": "a.wav", "text": NaN}\n')
    assert rows_of(tmp_path / "m.jsonl").texts() == ["6.5", ""]


def test_common_voice_as_unpacked_is_read(tmp_path):
    save(tmp_path / "clips/a.mp3", speech(0, 0.5))
    (tmp_path / "train.tsv").write_text('client_id\tpath\tsentence\nx\ta.mp3\tHe said "no", and left\n')
    columns = Columns(audio="path", text="sentence", speaker="client_id")
    rows = rows_of(tmp_path, columns, folder=tmp_path / "clips")
    assert rows.utterance(0, RATE).text == 'He said "no", and left'


def test_a_line_with_other_cells_than_the_header_is_a_problem(tmp_path):
    (tmp_path / "m.csv").write_bytes(b"audio,text,length\na.wav,x,1.5\na.wav,y,z,1\n\na.wav,caf\xe9,2\n")
    save(tmp_path / "a.wav", speech(0))
    columns = Columns(audio="audio", text="text", seconds="length")
    assert problems(tmp_path / "m.csv", columns) == {
        "train-1": ("broken CSV", "line 3 has 4 cells, the header 3"),
        "train-2": ("text that is not UTF-8", "line 5"),
    }
    assert rows_of(tmp_path / "m.csv", columns).seconds()[0] == 1.5


# --- paths that leave the folder


@pytest.mark.parametrize("name", ["../secret.wav", "clips/../../secret.wav", "./../secret.wav", "a\0.wav"])
def test_a_relative_path_that_leaves_the_folder_is_refused(tmp_path, name):
    save(tmp_path / "secret.wav", speech(0))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/m.jsonl").write_text(json.dumps({"audio": name, "text": "x", "seconds": 0.2}))
    shown = name.replace("\0", "\\0")
    assert problems(tmp_path / "corpus/m.jsonl") == {"train-0": ("path outside the dataset's folder", shown)}
    with pytest.raises(OSError, match=r"secret|a.0"):
        rows_of(tmp_path / "corpus/m.jsonl").utterance(0, RATE)


def test_a_metadata_file_cannot_name_files_outside_its_folder(tmp_path):
    save(tmp_path / "secret.wav", speech(0))
    save(tmp_path / "train/a.wav", speech(0))
    (tmp_path / "train/metadata.csv").write_text("file_name,text\n../secret.wav,x\na.wav,y\n")
    assert problems(tmp_path, WITH_ID) == {"../secret.wav": ("path outside the dataset's folder", "../secret.wav")}


def test_paths_may_climb_within_the_folder_be_absolute_or_start_elsewhere(tmp_path):
    save(tmp_path / "a.wav", speech(0))
    assert path_in(tmp_path, "b/../a.wav") == f"{tmp_path}/b/../a.wav"
    assert path_in(tmp_path / "b", f"{tmp_path}/a.wav") == f"{tmp_path}/a.wav"
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/m.jsonl").write_text('{"audio": "a.wav", "text": "x"}')
    rows = rows_of(tmp_path / "lists/m.jsonl", folder=tmp_path)
    assert np.array_equal(rows.utterance(0, RATE).audio, speech(0))


# --- tar shards


def tar(path, members, **options):
    with tarfile.open(path, "w", **options) as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def shard(path, numbers):
    members = {}
    for i in numbers:
        fields = json.dumps({"translation": f"wort {i}", "speaker": 7}).encode()
        members |= {f"d/{i:03}.wav": wav(speech(i)), f"d/{i:03}.txt": f"word {i}".encode(), f"d/{i:03}.json": fields}
    return tar(path, members)


@pytest.fixture
def shards(tmp_path):
    for number in range(3):
        shard(tmp_path / f"train-{number:02}.tar", range(number * 4, number * 4 + 4))
    shard(tmp_path / "test-00.tar", [100])
    return tmp_path


PATTERNS = ["", "train-*.tar", "train-{00..02}.tar", "{split}-*.tar", "train-0{0,1,2}.tar"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_shards_are_named_by_folder_glob_or_braces(shards, pattern):
    expected = {f"train-{i // 4:02}/d/{i:03}": (f"word {i}", speech(i)) for i in range(12)}
    assert_same(read(f"{shards}/{pattern}", WITH_ID), expected)


def test_fields_of_a_json_are_columns(shards):
    rows = rows_of(shards, Columns(audio="audio", text="translation", id="id", speaker="speaker"), "test")
    utterance = rows.utterance(0, RATE)
    assert (utterance.text, rows.row(0)["speaker"], known(rows.seconds())) == ("wort 100", "7", [0.2])


def test_a_clip_is_read_without_the_rest_of_its_shard(tmp_path, monkeypatch):
    shard(tmp_path / "train-0.tar", range(50))
    rows = rows_of(tmp_path, WITH_ID)
    number_read = []
    readinto = ByteRange.readinto
    monkeypatch.setattr(ByteRange, "readinto", lambda *given: number_read.append(readinto(*given)) or number_read[-1])
    rows.utterance(49, RATE)
    assert len(wav(speech(49))) <= sum(number_read) < 2 * len(wav(speech(49)))


def test_shards_are_indexed_once_and_again_after_a_change(shards, monkeypatch):
    assert len(load_rows(str(shards), "test")) == 1
    read_tar, calls = READERS[".tar"], []
    monkeypatch.setitem(READERS, ".tar", lambda file: calls.append(file) or read_tar(file))
    assert len(load_rows(str(shards), "test")) == 1
    assert calls == []
    shard(shards / "test-00.tar", [100, 101])
    assert len(load_rows(str(shards), "test")) == 2
    assert len(calls) == 1


def test_members_that_point_outside_are_never_followed(tmp_path):
    save(tmp_path / "secret.wav", speech(0))
    members = {"../secret.wav": wav(speech(1)), "/etc/x.wav": wav(speech(1)), "fine.wav": wav(speech(2))}
    tar(tmp_path / "train.tar", {**members, "fine.txt": b"ok"})
    with tarfile.open(tmp_path / "train.tar", "a") as file:
        link = tarfile.TarInfo("link.wav")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.wav")
        file.addfile(link)
    assert problems(tmp_path / "train.tar", WITH_ID) == {
        "train/../secret": ("path outside the dataset's folder", "../secret"),
        "train//etc/x": ("path outside the dataset's folder", "/etc/x"),
    }
    assert len(load_rows(str(tmp_path / "train.tar"), "train")) == 3


def test_a_truncated_shard_gives_what_is_left_of_it(tmp_path):
    path = shard(tmp_path / "train.tar", range(4))
    os.truncate(path, path.stat().st_size * 6 // 10)
    found = problems(path, WITH_ID)
    assert [reason for reason, _ in found.values()] == ["truncated tar"]
    rows = rows_of(path, WITH_ID)
    assert np.array_equal(rows.utterance(0, RATE).audio, speech(0))


def test_dirty_samples_of_a_shard_are_problems_of_their_own(tmp_path):
    members = {"a.wav": wav(speech(0)), "a.json": b"{", "b.wav": wav(speech(0)), "b.txt": b"\xff", "c.txt": b"no audio"}
    tar(tmp_path / "x.tar", members)
    found = problems(tmp_path / "x.tar", WITH_ID)
    reasons = {"x/a": "broken JSON", "x/b": "text that is not UTF-8", "x/c": "no audio"}
    assert {id: reason for id, (reason, _) in found.items()} == reasons
    rows = rows_of(tmp_path / "x.tar", WITH_ID)
    with pytest.raises(RefusedAudio):
        rows.utterance(rows.index_of("x/c"), RATE)


def test_two_texts_or_recordings_of_one_sample_are_a_problem_and_not_the_last_of_them(tmp_path):
    a, b = wav(speech(0)), wav(speech(1))
    members = {
        "a.wav": a,
        "a.txt": b"one",
        "a.json": b'{"text": "two"}',
        "b.wav": a,
        "b.flac": b,
        "c.wav": a,
        "c.txt": b"x",
    }
    tar(tmp_path / "x.tar", {**members, "c.json": b'{"text": "x"}'})
    assert problems(tmp_path / "x.tar", WITH_ID) == {
        "x/a": ("two values of one name", "text in a.json"),
        "x/b": ("two values of one name", "audio in b.flac"),
    }


def test_shards_that_are_missing_or_compressed_are_told(tmp_path):
    path = f"{tmp_path}/train-*.tar"
    write = "write 'data.path=\"SHARDS-{000..127}.tar\"', or a glob, of files that are there"
    assert mistake(load_rows, path, "train") == ("data.path", path, "there is no such file", write)
    for name in ("x.tar.gz", "x.tgz", "y.tar"):
        with tarfile.open(tmp_path / name, "w:gz") as file:
            file.addfile(tarfile.TarInfo("a.wav"), io.BytesIO())
    for name in ("x.tar.gz", "x.tgz", "x*gz"):
        option, _, wrong, write = mistake(load_rows, f"{tmp_path}/{name}", "train")
        assert (option, wrong.partition(" is ")[2]) == ("data.path", "no format that can be read")
        assert write.startswith("write data.path=FILE, unpacked, one of .parquet, ")
    _, _, wrong, _ = mistake(load_rows, f"{tmp_path}/y.tar", "train")
    assert wrong.startswith(f"split 'train': {tmp_path}/y.tar: ReadError: ")


# --- parts of long recordings

SEGMENTS = Columns(audio="audio", text="text", start="from", end="to")


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_segment_is_exactly_its_samples(tmp_path, suffix):
    whole = speech(0, 3.0)
    save(tmp_path / f"a.{suffix}", whole)
    rows = [{"audio": f"a.{suffix}", "text": "x", "from": start, "to": end} for start, end in SPANS]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = list(read(tmp_path / "m.jsonl", SEGMENTS).values())
    for (start, end), (_, samples) in zip(SPANS, found, strict=True):
        first, last = int((start or 0) * RATE), int((3 if end is None else end) * RATE)
        np.testing.assert_array_equal(samples, whole[first:last])
    seconds = [(3 if end is None else end) - (start or 0) for start, end in SPANS]
    assert known(rows_of(tmp_path / "m.jsonl", SEGMENTS).seconds()) == seconds


SPANS = [(0.5, 1.25), (2.0, None), (None, 0.25), (None, None), (2.5, 3.0)]


def test_of_a_long_recording_only_the_segment_is_decoded(tmp_path):
    samples = speech(0, 60.0)
    save(tmp_path / "a.flac", samples)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)  # what lies behind is destroyed
    np.testing.assert_array_equal(read_audio(bytes(content), RATE, None, 10.0, 11.0), samples[160_000:176_000])
    with pytest.raises(RefusedAudio):
        read_audio(bytes(content), RATE, None, 50.0, 51.0)


@pytest.mark.parametrize(("container", "subtype"), [("MP3", "MPEG_LAYER_III"), ("OGG", "OPUS")])
@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_a_segment_of_compressed_audio_is_that_of_the_whole(container, subtype, rate):
    ramp = np.linspace(0, 0.5, 4 * rate) * np.sin(2 * np.pi * 440 / rate * np.arange(4 * rate))
    file = io.BytesIO()
    soundfile.write(file, ramp, rate, format=container, subtype=subtype)
    whole = read_audio(file.getvalue(), rate).numpy()
    for start, end in [(0.1, 0.3), (2.0, 3.5), (3.0, None)]:
        part = read_audio(file.getvalue(), rate, None, start, end).numpy()
        last = None if end is None else round(end * rate)
        np.testing.assert_allclose(part, whole[round(start * rate) : last], atol=1e-6)


def test_a_segment_of_another_rate_is_resampled():
    audio = read_audio(wav(speech(0, 2.0)), 8_000, None, 0.5, 1.5)
    assert len(audio) == 8_000


IMPOSSIBLE = [(2.0, 1.0), (5.0, None), (-1.0, 1.0), (1.0, 1.0), (float("nan"), 1.0), (0.0, float("nan"))]


@pytest.mark.parametrize(("start", "end"), IMPOSSIBLE)
def test_a_segment_that_cannot_be_is_a_reason_to_skip(start, end):
    with pytest.raises(OSError, match=r"of 3\.00 s") as raised:
        read_audio(wav(speech(0, 3.0)), RATE, None, start, end)
    assert raised.value.reason == "no such segment"


def test_an_end_behind_the_recording_is_its_end():
    assert len(read_audio(wav(speech(0, 3.0)), RATE, None, 2.5, 3.5)) == 8_000


# --- Parquet with rows that cannot be decoded


@pytest.mark.parametrize("kind", [(pa.binary(), pa.string()), (pa.large_binary(), pa.large_string())])
def test_texts_of_a_parquet_that_are_not_utf8_are_problems_of_their_rows(tmp_path, kind):
    texts = pa.array([b"fine", b"caf\xe9", None, b""], kind[0]).view(kind[1])
    pyarrow.parquet.write_table(
        pa.table({"audio": [wav(speech(0))] * 4, "text": texts, "other": texts}), tmp_path / "x.parquet"
    )
    assert problems(tmp_path / "x.parquet") == {"train-1": ("text that is not UTF-8", "column text")}
    rows = rows_of(tmp_path / "x.parquet")
    assert rows.texts() == ["fine", "", "", ""]
    assert np.array_equal(rows.utterance(0, RATE).audio, speech(0))


def test_a_row_group_of_a_parquet_that_is_destroyed_costs_its_rows_alone(tmp_path):
    path = tmp_path / "x.parquet"
    table = pa.table({"audio": [wav(speech(i)) for i in range(6)], "text": list("abcdef")})
    pyarrow.parquet.write_table(table, path, row_group_size=2, compression="zstd")
    group = pyarrow.parquet.read_metadata(path).row_group(1).column(0)
    content = bytearray(path.read_bytes())
    first = group.dictionary_page_offset or group.data_page_offset
    content[first : first + group.total_compressed_size] = bytes(group.total_compressed_size)
    path.write_bytes(content)
    found = problems(path)
    assert {id: reason for id, (reason, _) in found.items()} == dict.fromkeys(["train-2", "train-3"], "broken Parquet")
    rows = rows_of(path)
    assert rows.texts() == ["a", "b", "", "", "e", "f"]
    assert PROBLEM not in refused(
        utterance_rows, load_rows(str(path), "train"), Columns("sound", "text"), str(path), "train"
    )
    assert np.array_equal(rows.utterance(5, RATE).audio, speech(5))


@pytest.mark.parametrize("first", [1, "1", None])
def test_whole_numbers_in_one_manifest_and_fractions_in_the_next_stay_as_written(tmp_path, first):
    (tmp_path / "train-0.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "one", "n": first}))
    (tmp_path / "train-1.jsonl").write_text('{"audio": "b.wav", "text": "two", "n": 2.5}')
    rows = load_rows(str(tmp_path), "train")
    assert rows["n"][:] == [None if first is None else "1", "2.5"]
    columns = Columns(audio="audio", text="text", seconds="n")
    assert known(utterance_rows(rows, columns, str(tmp_path), "train").declared()) == [first and 1.0, 2.5]


def test_lists_and_objects_may_differ_from_tar_to_tar(tmp_path):
    for number, value in enumerate([{"a": 1}, {"b": [2]}, ["c"], "d", 5]):
        tar(tmp_path / f"train-{number}.tar", {"x.wav": wav(speech(0)), "x.json": json.dumps({"text": value}).encode()})
    rows = rows_of(tmp_path, WITH_ID)
    assert [text.removeprefix(NOT_TEXT) for text in rows.texts()] == ['{"a": 1}', '{"b": [2]}', '["c"]', "d", "5"]
    assert [text.startswith(NOT_TEXT) for text in rows.texts()] == [True, True, True, False, False]
    assert np.array_equal(rows.utterance(0, RATE).audio, speech(0))


@pytest.mark.parametrize("closing", ["c.wav,good", 'c.wav,"good"', 'c.wav,so he said "', 'c.wav,a 5" pipe'])
def test_a_quote_that_is_never_closed_costs_its_own_row(tmp_path, closing):
    lines = ["audio,text", "a.wav,fine", 'b.wav,"open', closing, *["c.wav,used"] * 20_000]
    (tmp_path / "m.csv").write_text("\n".join(lines))
    rows = rows_of(tmp_path / "m.csv")
    assert rows.problems == {1: "broken CSV: line 3, a quotation mark that is never closed"}
    assert rows.texts()[:2] + rows.texts()[3:] == ["fine", "", *["used"] * 20_000]


def test_numbers_in_one_manifest_and_words_in_the_next_are_text(tmp_path):
    (tmp_path / "train-0.jsonl").write_text('{"audio": "a.wav", "text": "one", "n": 1}\n')
    (tmp_path / "train-1.jsonl").write_text('{"audio": "b.wav", "text": 2, "n": 2}\n{"audio": "c.wav", "text": null}\n')
    rows = load_rows(str(tmp_path), "train")
    assert (rows["text"][:], rows["n"][:]) == (["one", "2", None], ["1", "2", None])


# --- what becomes of problems


def test_problems_are_counted_listed_and_skipped(tmp_path):
    save(tmp_path / "data/a.wav", speech(0))
    rows = [{"audio_filepath": "a.wav", "text": "fine"}, {"audio_filepath": "../b.wav", "text": "x"}]
    rows.append({"audio_filepath": "../b.wav", "text": "its length is given", "duration": 1.0})
    (tmp_path / "data/train.jsonl").write_text("\n".join([*map(json.dumps, rows), '{"audio_filepath": "a.wav"']))
    columns = {"audio": "audio_filepath", "transcription": "text", "seconds": "duration", "start": "offset"}
    module = SpeechTextDataModule(str(tmp_path / "data"), columns, folder=str(tmp_path))
    assert module.corpus.kept("train")[["part", "row"]].tolist() == [(0, 0), (0, 2)]
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    outside, manifest = f"{tmp_path}/data/../b.wav", f"{tmp_path}/data/train.jsonl"
    assert listed == [
        {"id": "train-1", "path": outside, "reason": "path outside the dataset's folder", "detail": "../b.wav"},
        {"id": "train-3", "path": manifest, "reason": "broken JSON", "detail": "line 4, Expecting ',' delimiter"},
    ]
    split = SplitDataset(module.corpus.parts("train"), None, SimpleNamespace(sampling_rate=RATE), 0)
    assert split.decode((0, 2)) == Skipped("train-2", "path outside the dataset's folder", "../b.wav", outside)


# --- the Hub


def test_a_branch_of_the_hub_is_named_behind_the_id(monkeypatch):
    asked = []
    rows = datasets.Dataset.from_dict({"text": ["one"]})
    builder = SimpleNamespace(
        config=SimpleNamespace(data_files=None), download_and_prepare=lambda: None, as_dataset=lambda split: rows
    )
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda *given, **named: asked.append((given, named)) or builder
    )
    load_rows("some/corpus@refs/pr/20", "train[:5]", "xl")
    load_rows("some/corpus", "train")
    assert asked == [
        (("some/corpus", "xl"), {"revision": "refs/pr/20", "cache_dir": None}),
        (("some/corpus", None), {"revision": None, "cache_dir": None}),
    ]


def test_a_dataset_that_is_a_script_is_told(monkeypatch):
    def load_dataset_builder(*_, **__):
        raise RuntimeError("Dataset scripts are no longer supported, but found fleurs.py")

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    wrong = "RuntimeError: Dataset scripts are no longer supported, but found fleurs.py"
    write = (
        "write data.path=HUB_ID of a copy as Parquet, or data.path=HUB_ID@REVISION where the branch REVISION is Parquet"
    )
    assert mistake(load_rows, "google/fleurs", "train", "en_us") == ("data.path", "google/fleurs", wrong, write)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data/train-0.csv", "audio,text,id\na.wav,007,1\nb.wav,NA,2\n"),
        ("data/train-0.tsv", "audio\ttext\tid\na.wav\t007\t1\nb.wav\tNA\t2\n"),
        (
            "data/train-0.jsonl",
            '{"audio": "a.wav", "text": "007", "id": "1"}\n{"audio": "b.wav", "text": "NA", "id": "2"}\n',
        ),
    ],
)
def test_where_datasets_finds_the_files_their_texts_stay_as_they_are_written(tmp_path, name, content):
    """Its own readers of CSV and JSON guess numbers, dates and empty cells."""
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / name.replace("train", split)).write_text(content)
    for split, texts in (
        ("train", ["007", "NA"]),
        ("train[:50%]", ["007"]),
        ("train+test", ["007", "NA"] * 2),
        ("train+test[1:]", ["007", "NA", "NA"]),
    ):
        rows = load_rows(str(tmp_path), split)
        assert (rows["text"][:], rows["id"][0]) == (texts, "1")
