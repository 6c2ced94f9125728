import csv
import io
import json
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile
import torch
from corpora import known, mistake, refused, utterance_rows

from sedtrain.data.audio import read_audio
from sedtrain.data.audio_paths import audio_paths
from sedtrain.data.headers import RefusedAudio
from sedtrain.data.load_rows import load_rows
from sedtrain.data.paths import absolute_path
from sedtrain.data.readers import READERS
from sedtrain.data.source import Columns

PLAIN = Columns(audio="audio", text="text")


def tone(seconds=0.5, rate=16_000, hertz=440.0):
    """(S,) float32 sine."""
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def encoded(samples, rate=16_000, container="WAV", subtype="FLOAT"):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=subtype)
    return file.getvalue()


def parquet(path, **columns):
    pyarrow.parquet.write_table(pa.table(columns), path)
    return str(path)


def utterances(path, columns=PLAIN, split="train", rate=16_000):
    rows = utterance_rows(load_rows(str(path), split), columns, str(path), split)
    return [rows.utterance(index, rate) for index in range(len(rows))]


# --- where rows come from


def test_a_parquet_file_gives_its_rows_as_utterances(tmp_path):
    samples = tone()
    path = parquet(
        tmp_path / "x.parquet",
        audio=[{"bytes": encoded(samples), "path": None}],
        text=["four four nought"],
        name=["a-17"],
        who=["Ann"],
        lang=["en"],
    )
    columns = Columns(audio="audio", text="text", id="name", speaker="who", language="lang")
    [utterance] = utterances(path, columns)
    assert (utterance.id, utterance.text, utterance.speaker) == ("a-17", "four four nought", "Ann")
    assert (utterance.language, utterance.sampling_rate, utterance.seconds) == ("en", 16_000, 0.5)
    assert utterance.audio.dtype == torch.float32
    assert np.array_equal(utterance.audio.numpy(), samples)


@pytest.mark.parametrize(
    ("cells", "names"),
    [
        ([7, 12, None], ["7", "12", None]),
        (["Ann", "", "  "], ["Ann", None, None]),
        ([1.5, float("nan")], ["1.5", None]),
    ],
)
def test_a_speaker_is_a_text_or_unknown(tmp_path, cells, names):
    count = len(cells)
    path = parquet(tmp_path / "x.parquet", audio=[encoded(tone())] * count, text=["one"] * count, who=cells)
    columns = Columns(audio="audio", text="text", speaker="who")
    assert [each.speaker for each in utterances(path, columns)] == names


def test_a_file_is_whatever_split_is_asked_for(tmp_path):
    path = parquet(tmp_path / "x.parquet", audio=[encoded(tone())], text=["one"])
    for split in ("train", "test", "train.100"):
        assert load_rows(path, split)["text"][:] == ["one"]


def test_a_folder_has_a_file_for_each_split(tmp_path):
    for split in ("train", "validation", "test.other"):
        parquet(tmp_path / f"{split}.parquet", audio=[encoded(tone())], text=[split])
    for split in ("train", "validation", "test.other"):
        assert [each.text for each in utterances(tmp_path, split=split)] == [split]


def test_a_slice_of_a_split_can_be_asked_for(tmp_path):
    parquet(tmp_path / "train.parquet", audio=[b""] * 10, text=[str(i) for i in range(10)])
    assert load_rows(str(tmp_path), "train[:20%]")["text"][:] == ["0", "1"]


def test_a_folder_with_a_card_is_read_as_it_is_now_and_not_as_one_of_its_name(tmp_path):
    card = "---\nconfigs:\n- config_name: en\n  data_files:\n  - {split: train, path: data/0.parquet}\n---\n"
    for text, name in [("one", "a"), ("two", "b"), ("two and three", "b")]:
        folder = tmp_path / name / "same"
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(card)
        parquet(folder / "data/0.parquet", audio=[encoded(tone())], text=[text])
        assert load_rows(str(folder), "train", "en")["text"][:] == [text]


def test_the_embedded_corpus_needs_no_path():
    columns = Columns(audio="audio", text="text", id="id", speaker="speaker", seconds="seconds")
    rows = utterance_rows(load_rows("spoken_digits", "validation"), columns, "spoken_digits", "validation")
    first = rows.utterance(0, 16_000)
    assert first.seconds == pytest.approx(rows.seconds()[0], abs=0.01)
    assert set(first.text.split()) <= {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_a_manifest_names_audio_files_relative_to_its_own_folder(tmp_path, name, as_folder):
    (tmp_path / "clips").mkdir()
    rows = [{"audio": f"clips/{i}.wav", "text": f"number {i}"} for i in range(2)]
    for i, row in enumerate(rows):
        soundfile.write(tmp_path / row["audio"], tone(0.1 * (i + 1)), 16_000)
    rows[1]["audio"] = str(tmp_path / "clips/1.wav")
    with (tmp_path / name).open("w") as file:
        if name.endswith("csv"):
            writer = csv.DictWriter(file, ["audio", "text"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    read = utterances(tmp_path if as_folder else tmp_path / name)
    assert [(each.text, round(each.seconds, 3)) for each in read] == [("number 0", 0.1), ("number 1", 0.2)]


def test_recordings_of_the_shared_data_can_be_read(shared):
    columns = Columns(audio="audio", text="translation", id="utt_id", seconds="duration")
    path = str(shared / "data/artikulate-st")
    rows = utterance_rows(load_rows(path, "test"), columns, path, "test")
    first = rows.utterance(0, 16_000)
    assert first.seconds == pytest.approx(rows.seconds()[0], abs=0.02)
    assert first.text == rows.texts()[0] != ""
    assert rows.index_of(first.id) == 0


# --- audio


@pytest.mark.parametrize("wrap", [lambda it: it, lambda it: {"bytes": it, "path": "x.wav"}, lambda it: {"bytes": it}])
def test_audio_is_bytes_plain_or_beside_a_path(wrap):
    samples = tone()
    assert np.array_equal(read_audio(wrap(encoded(samples)), 16_000).numpy(), samples)


def test_audio_is_a_path_plain_or_beside_no_bytes(tmp_path):
    path = str(tmp_path / "a.wav")
    soundfile.write(path, tone(), 16_000, subtype="FLOAT")
    for cell in (path, {"bytes": None, "path": path}, {"path": path}):
        assert np.array_equal(read_audio(cell, 16_000).numpy(), tone())
    assert np.array_equal(read_audio("a.wav", 16_000, tmp_path).numpy(), tone())


def test_channels_are_averaged_and_other_rates_resampled():
    at_8_khz = np.stack([tone(1.0, 8000), np.zeros(8000, np.float32)], axis=1)
    audio = read_audio(encoded(at_8_khz, 8000), 16_000).numpy()
    assert audio.shape == (16_000,)
    middle = slice(500, -500)  # the resampling filter rings at the ends
    np.testing.assert_allclose(audio[middle], tone(1.0)[middle] / 2, atol=2e-3)


@pytest.mark.parametrize(("container", "subtype"), [("FLAC", "PCM_16"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")])
def test_compressed_audio_is_decoded(container, subtype):
    audio = read_audio(encoded(tone(1.0), 16_000, container, subtype), 16_000).numpy()
    spectrum = np.abs(np.fft.rfft(audio[2000:14_000]))
    assert np.argmax(spectrum) * 16_000 / 12_000 == pytest.approx(440, abs=2)


UNDECODABLE = {
    "nothing": None,
    "no bytes": b"",
    "other bytes": b"this is no audio",
    "no file": "nowhere.wav",
    "neither": {"bytes": None, "path": None},
    "no samples": encoded(tone(0)),
    "no numbers": encoded(np.array([0.1, np.nan, 0.1], np.float32)),
}


@pytest.mark.parametrize("cell", UNDECODABLE.values(), ids=UNDECODABLE)
def test_audio_that_cannot_be_decoded_is_an_error_that_the_policy_knows(cell):
    with pytest.raises(RefusedAudio):
        read_audio(cell, 16_000)


# --- columns


def test_lengths_come_from_the_column_else_from_the_header(tmp_path):
    audio = [encoded(tone(0.25)), b"junk", encoded(tone(0.75))]
    path = parquet(tmp_path / "x.parquet", audio=audio, text=["a", "b", "c"], length=[1.5, 2.5, None])
    rows = load_rows(path, "train")
    with_column = Columns(audio="audio", text="text", seconds="length")
    assert known(utterance_rows(rows, with_column, path, "train").seconds()) == [1.5, 2.5, 0.75]
    assert known(utterance_rows(rows, PLAIN, path, "train").seconds()) == [0.25, None, 0.75]


@pytest.mark.parametrize("impossible", [float("nan"), float("inf"), -1.0, 1e308])
def test_a_length_that_cannot_be_is_read_from_the_header(tmp_path, impossible):
    path = parquet(tmp_path / "x.parquet", audio=[encoded(tone(0.25))], text=["a"], length=[impossible])
    with_column = Columns(audio="audio", text="text", seconds="length")
    rows = utterance_rows(load_rows(path, "train"), with_column, path, "train")
    assert known(rows.seconds()) == [0.25]
    wrong = ("impossible time", f"length = {impossible}")
    assert rows.problem(0, 0.25) == (None if impossible != impossible else wrong)  # NaN is an empty cell


WRONG_TYPES = {
    "seconds": ([[1.5]], "List(Value('float64')) in the column 'x' for the seconds, expected numbers", "numbers"),
    "text": ([["a", "b"]], "List(Value('string')) in the column 'x' for the text, expected text", "text"),
    "audio": (
        [[0.1, 0.2]],
        "List(Value('float64')) in the column 'x' for the audio, expected bytes or the path of a file",
        "bytes or the path of a file",
    ),
    "id": (
        [{"a": 1}],
        "{'a': Value('int64')} in the column 'x' for the id, expected text or numbers",
        "text or numbers",
    ),
}


@pytest.mark.parametrize("role", WRONG_TYPES)
def test_a_column_that_holds_something_else_is_told(tmp_path, role):
    cells, wrong, wanted = WRONG_TYPES[role]
    path = parquet(tmp_path / "x.parquet", audio=[b""], text=["a"], x=cells)
    columns = Columns(**{"audio": "audio", "text": "text", role: "x"})
    assert refused(utterance_rows, load_rows(path, "train"), columns, path, "train") == (
        f"1 problem:\n\n  data.columns = 'x'\n    {path} (train) has {wrong}\n"
        f"    write data.columns.NAME=COLUMN that holds {wanted}"
    )


def test_names_of_classes_are_no_text(tmp_path):
    classes = datasets.Features({"audio": datasets.Value("binary"), "text": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"audio": [b""], "text": [1]}, classes)
    assert "ClassLabel(names=['no', 'yes']) in the column 'text'" in refused(utterance_rows, rows, PLAIN, "x", "train")


def test_an_id_of_two_rows_is_told(tmp_path):
    path = parquet(tmp_path / "x.parquet", audio=[b""] * 3, text=["a"] * 3, name=["p", "q", "p"])
    columns = Columns(audio="audio", text="text", id="name")
    assert refused(utterance_rows, load_rows(path, "train"), columns, path, "train") == (
        "1 problem:\n\n  data.columns.id = 'name'\n    rows 0 and 2 of 'train' have the same id, 'p'\n"
        "    write data.columns.id=COLUMN of ids that differ, or data.columns.id=null to name rows by their number"
    )


def test_rows_without_an_id_are_named_after_split_and_row(tmp_path):
    path = parquet(tmp_path / "x.parquet", audio=[encoded(tone())] * 2, text=["a", "b"], name=[7, 8])
    rows = utterance_rows(load_rows(path, "test"), PLAIN, path, "test")
    assert [rows.id(0), rows.id(1)] == ["test-0", "test-1"]
    assert list(rows.ids()) == ["test-0", "test-1"]
    named = utterance_rows(load_rows(path, "test"), Columns(audio="audio", text="text", id="name"), path, "test")
    assert (list(named.ids()), named.index_of("8")) == (["7", "8"], 1)


def test_text_that_a_manifest_wrote_as_numbers_is_text(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"audio": "a.wav", "text": 65}\n{"audio": "a.wav", "text": null}\n')
    path = str(tmp_path / "x.jsonl")
    assert utterance_rows(load_rows(path, "train"), PLAIN, path, "train").texts() == ["65", ""]


def test_a_missing_column_is_told_with_those_that_are_there(tmp_path):
    path = parquet(tmp_path / "x.parquet", speech=[encoded(tone())], text=["a"])
    assert refused(utterance_rows, load_rows(path, "train"), PLAIN, path, "train") == (
        f"1 problem:\n\n  data.columns = 'audio'\n    {path} (train) has no column 'audio' for the audio, it has speech, text\n"
        "    write data.columns.NAME=ONE_OF_THESE, where NAME is audio, transcription, translation, id, "
        "speaker, language, seconds, start or end"
    )


def test_columns_are_given_by_role_and_the_target_is_the_text():
    roles = {"audio": "speech", "transcription": "said", "translation": "meant", "id": None}
    assert Columns.of(roles, "transcription") == Columns(audio="speech", text="said")
    assert Columns.of({**roles, "language": "l"}, "translation") == Columns("speech", "meant", language="l")


def test_a_role_that_is_missing_or_unknown_is_told():
    assert refused(Columns.of, {"audio": "a", "transcription": "t", "translation": None}, "translation") == (
        "1 problem:\n\n  data.columns.translation = null\n    target=translation needs this column\n"
        "    write data.columns.translation=COLUMN"
    )
    assert refused(Columns.of, {"audio": None, "transcription": "t"}, "transcription") == (
        "1 problem:\n\n  data.columns.audio = null\n    target=transcription needs this column\n"
        "    write data.columns.audio=COLUMN"
    )
    assert refused(Columns.of, {"audio": "a", "transcription": "t", "speeker": "s"}, "transcription") == (
        "1 problem:\n\n  data.columns.speeker = 's'\n    there is no such role\n"
        "    write data.columns.NAME, NAME one of audio, transcription, translation, id, speaker, language, "
        "seconds, start, end"
    )


def test_a_path_is_found_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("mine", "./mine", "~/mine", f"{tmp_path}/mine"):
        assert absolute_path(path) == f"{tmp_path}/mine"
    for path in ("spoken_digits", "some/corpus"):
        assert absolute_path(path) == path


# --- what is not there


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "nowhere.parquet", "nowhere.jsonl", "my/data/train"])
def test_a_path_to_nothing_is_no_such_file(path):
    write = "write data.path=FOLDER_OR_FILE_OR_HUB_ID"
    assert mistake(load_rows, path, "train") == ("data.path", path, "there is no such file or folder", write)


def test_a_reader_of_ones_own_also_reads_files_that_a_card_names(tmp_path, monkeypatch):
    def read_lines(file):
        yield pa.table({"text": [f"own {line}" for line in file.read_text().splitlines()]})

    monkeypatch.setitem(READERS, ".ndjson", read_lines)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/all.ndjson").write_text('{"text": "one"}\n{"text": "two"}\n')
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: rows/all.ndjson}\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert load_rows(str(tmp_path), "train")["text"][:] == ['own {"text": "one"}', 'own {"text": "two"}']


def test_a_hub_id_without_network_is_told_the_offline_ways():
    option, value, wrong, write = mistake(load_rows, "some/corpus", "train")
    assert (option, value) == ("data.path", "some/corpus")
    assert wrong.startswith("neither a folder here nor a dataset that can be read (ConnectionError")
    assert write == "write data.path=FOLDER with Parquet files, or data=spoken_digits, which needs no network"


def test_a_folder_without_data_is_told(tmp_path):
    option, value, wrong, _ = mistake(load_rows, str(tmp_path), "train")
    assert (option, value) == ("data.path", str(tmp_path))
    assert wrong.startswith("this folder holds no dataset that can be read (EmptyDatasetError")


def test_a_split_that_is_missing_is_told(tmp_path):
    parquet(tmp_path / "train.parquet", audio=[b""], text=["a"])
    option, value, wrong, write = mistake(load_rows, str(tmp_path), "validation")
    assert (option, value) == ("data.path", str(tmp_path))
    assert wrong.startswith("split 'validation': ValueError: Unknown split")
    assert write.endswith("data.validation_split, data.test_split that the dataset has, in files that can be read")


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl", "x.csv"])
def test_an_empty_dataset_is_told(tmp_path, name):
    (tmp_path / name).touch()
    path = parquet(tmp_path / "y.parquet", audio=pa.array([], pa.binary()), text=pa.array([], pa.string()))
    for empty in (str(tmp_path / name), path):
        told = ("data.path", empty, "the split 'train' is empty", "write a split with at least one row")
        assert mistake(load_rows, empty, "train") == told


def test_a_file_that_is_no_parquet_is_told(tmp_path):
    parquet(tmp_path / "train-0.parquet", audio=[b""], text=["a"])
    (tmp_path / "train-1.parquet").write_text("this is not a table")
    option, value, wrong, _ = mistake(load_rows, str(tmp_path), "train")
    assert (option, value) == ("data.path", str(tmp_path))
    assert wrong.startswith(f"split 'train': {tmp_path}/train-1.parquet: ArrowInvalid: Parquet magic bytes not found")
    assert "\n" not in wrong


def test_a_column_of_numbers_in_one_parquet_file_and_of_text_in_the_next_is_told_by_its_name(tmp_path):
    for number, ids in enumerate(([1], ["b"])):
        parquet(tmp_path / f"train-{number}.parquet", audio=[b""], text=["a"], id=ids)
    _, value, wrong, _ = mistake(load_rows, str(tmp_path), "train")
    assert value == str(tmp_path)
    assert wrong.endswith("Unable to merge: Field id has incompatible types: int64 vs string")
    parquet(tmp_path / "train-1.parquet", audio=[b""], text=["a"], id=[2.5])
    assert load_rows(str(tmp_path), "train")["id"][:] == [1.0, 2.5]


# --- audio files by name


@pytest.fixture
def clips(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.wav", "a.flac", "deep/c.wav"):
        soundfile.write(tmp_path / name, tone(0.1), 16_000)
    (tmp_path / "notes.txt").write_text("no audio")
    return tmp_path


def names(folder, audio):
    return [path.removeprefix(f"{folder}/") for path in audio_paths(audio)]


def test_audio_files_are_named_by_file_glob_folder_or_list(clips):
    assert names(clips, f"{clips}/b.wav") == ["b.wav"]
    assert names(clips, f"{clips}/*.wav") == ["b.wav"]
    assert names(clips, f"{clips}/**/*.wav") == ["b.wav", "deep/c.wav"]
    assert names(clips, str(clips)) == ["a.flac", "b.wav", "deep/c.wav"]
    assert names(clips, [f"{clips}/b.wav", f"{clips}/deep"]) == ["b.wav", "deep/c.wav"]


def test_a_link_to_a_folder_is_followed_but_not_in_circles(clips, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    soundfile.write(elsewhere / "d.wav", tone(0.1), 16_000)
    (clips / "deep/linked").symlink_to(elsewhere)
    (clips / "deep/around").symlink_to(clips)
    assert names(clips, str(clips)) == ["a.flac", "b.wav", "deep/c.wav", "deep/linked/d.wav"]


def test_a_file_name_that_looks_like_a_glob_is_that_file(clips):
    (clips / "b.wav").rename(clips / "b[1].wav")
    assert names(clips, f"{clips}/b[1].wav") == ["b[1].wav"]


@pytest.mark.parametrize("missing", ["nowhere.wav", "*.mp3", "empty"])
def test_audio_that_is_not_there_is_told(clips, missing):
    (clips / "empty").mkdir()
    name = f"{clips}/{missing}"
    write = "write audio=FILE, a glob that matches or a folder"
    wrong = "this folder holds no audio" if missing == "empty" else "there is no such audio file"
    assert mistake(audio_paths, [f"{clips}/b.wav", name]) == ("audio", name, wrong, write)


def test_a_pipe_is_not_waited_for(clips):
    os.mkfifo(clips / "pipe.wav")
    write = "write audio=FILE, a glob that matches or a folder"
    for pipe in (f"{clips}/pipe.wav", "/dev/null"):
        assert mistake(audio_paths, pipe) == ("audio", pipe, "this is a pipe or a device", write)
        of_data = "write data.path=FOLDER_OR_FILE_OR_HUB_ID"
        assert mistake(load_rows, pipe, "train") == ("data.path", pipe, "this is a pipe or a device", of_data)
    assert names(clips, f"{clips}/*.wav") == ["b.wav"]


def test_among_others_a_file_that_is_no_audio_is_left_to_the_reader(clips):
    assert names(clips, [f"{clips}/b.wav", f"{clips}/notes.txt"]) == ["b.wav", "notes.txt"]


def test_a_file_that_is_no_audio_is_told(clips):
    option, value, wrong, write = mistake(audio_paths, f"{clips}/notes.txt")
    assert (option, value, write) == ("audio", f"{clips}/notes.txt", "write audio=FILE that libsndfile can read")
    assert wrong == "unreadable audio: Format not recognised."
    (clips / "empty.wav").touch()
    assert mistake(audio_paths, f"{clips}/empty.wav")[2] == f"empty file: {clips}/empty.wav"


@pytest.mark.parametrize("audio", [None, "", []])
def test_no_audio_at_all_is_told(audio):
    write = "write audio=FILE, audio='FOLDER/*.wav' or 'audio=[a.wav,b.flac]'"
    assert mistake(audio_paths, audio) == ("audio", audio, "task=transcribe needs audio", write)
