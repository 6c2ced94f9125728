"""Folders and manifests of other toolkits: each is written here as its toolkit writes it."""

import gzip
import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from sedtrain.data.folders import kaldi_rows
from sedtrain.data.parts import parts_of
from sedtrain.data.source import sources_of
from sedtrain.data.tables import PROBLEM
from sedtrain.data.toolkits import rows_of_cut
from sedtrain.errors import UserError

RATE = 16_000
SPLITS = {"train_split": "train", "validation_split": "validation", "test_split": "test"}
COLUMNS = {"audio": "audio_filepath", "transcription": "text", "translation": "translation"}


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def source(path, format=None, **options):
    common = {"path": str(path), "name": None, "format": format, "columns": COLUMNS, "audio_folder": None}
    [found] = sources_of(None, {**common, **SPLITS, "target": "transcription", "language": None, **options})
    return found


def rows(path, format=None, split="train", **options):
    [part] = parts_of(replace(source(path, format, **options), splits={"train": split}), "train")
    return part.open()


def save(path, seconds=2.0, seed=0):
    """(S,) samples that are saved as FLAC of 16 bits, which holds them exactly."""
    samples = np.random.default_rng(seed).integers(-(2**14), 2**14, int(seconds * RATE)).astype(np.float32) / 2**15
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, RATE)
    return samples


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def heard(found, id):
    return found.utterance(found.index_of(id), RATE).audio.numpy()


def problems(found):
    reasons = {found.id(index): found.problem(index, seconds) for index, seconds in enumerate(found.seconds())}
    return {id: reason for id, reason in reasons.items() if reason}


def refused(call, *arguments, **options):
    with pytest.raises(UserError) as raised:
        call(*arguments, **options)
    error = raised.value
    return error.option, error.wrong, error.write


# --- Kaldi


def kaldi(folder):
    """Two recordings, the first of them with two segments, in folder/train; and its samples."""
    samples = save(folder / "wav/a.flac")
    save(folder / "wav/b.flac", seed=1)
    train = folder / "train"
    write(train / "wav.scp", f"a {folder}/wav/a.flac", f"b\t{folder}/wav/b.flac")
    write(train / "segments", "a-1 a 0.25 1.0", "a-2 a 1.0 -1", "b-1 b 0 2")
    write(train / "text", "a-1 hello  there", "a-2 näher", "b-1")
    write(train / "utt2spk", "a-1 anna", "a-2 anna", "b-1 ben")
    return samples


def test_a_kaldi_folder_is_known_by_wav_scp_and_cut_at_its_segments(tmp_path):
    samples = kaldi(tmp_path)
    assert source(tmp_path).format == "kaldi"
    found = rows(tmp_path)
    assert list(found.ids()) == ["a-1", "a-2", "b-1"]
    assert found.texts() == ["hello  there", "näher", ""]
    assert found.cells("speaker") == ["anna", "anna", "ben"]
    np.testing.assert_array_equal(heard(found, "a-1"), samples[4_000:16_000])
    np.testing.assert_array_equal(heard(found, "a-2"), samples[16_000:])
    assert problems(found) == {}


def test_without_segments_each_recording_of_a_kaldi_folder_is_an_utterance(tmp_path):
    samples = kaldi(tmp_path)
    (tmp_path / "train/segments").unlink()
    write(tmp_path / "train/text", "a hello", "b there")
    write(tmp_path / "train/utt2dur", "a 2.0", "b 2.0")
    found = rows(tmp_path / "train", split="train[:50%]")
    assert (found.texts(), list(found.seconds())) == (["hello"], [2.0])
    np.testing.assert_array_equal(heard(found, "a"), samples)


@pytest.mark.parametrize("command", ["touch RAN; cat a.wav |", "| cat", "-"])
def test_a_command_in_wav_scp_is_refused_and_never_run(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    kaldi(tmp_path)
    write(tmp_path / "train/wav.scp", f"a {tmp_path}/wav/a.flac", f"b {command}")
    option, wrong, instead = refused(rows, tmp_path)
    assert (option, wrong) == ("data.path", f"wav.scp, line 2 is a command ({command}), which is never run")
    assert instead == "write wav.scp with the paths of audio files, converted once by you"
    assert not (tmp_path / "RAN").exists()


def test_a_place_in_an_archive_is_refused(tmp_path):
    kaldi(tmp_path)
    write(tmp_path / "train/wav.scp", "a data/raw.ark:1234")
    assert refused(rows, tmp_path)[1] == "wav.scp, line 1 is an offset in an archive (data/raw.ark:1234)"


def test_broken_lines_of_a_kaldi_folder_are_told_with_file_and_line(tmp_path):
    kaldi(tmp_path)
    train = tmp_path / "train"
    with (train / "segments").open("a") as file:
        file.write("c-1 c 0 1\nd-1 a 1 0.5\ne-1 a\na-1 a 0 1\nf-1 b 0 1\n")
    with (train / "text").open("ab") as file:
        file.write(b"c-1 x\nd-1 x\ne-1 x\ng-1 x\n\xff\xff x\n")
    found = [row[PROBLEM] for row in kaldi_rows(train) if PROBLEM in row]
    assert found == [
        "no recording: wav.scp has no recording c",
        "no such segment: segments, line 5, d-1: 1 to 0.5 s",
        "broken line: segments, line 6, e-1: it is not UTTERANCE RECORDING START END",
        "no transcript: text has no line for f-1",
        "no segment: text, line 7, g-1",
        "two lines of one name: segments, line 7, a-1 as in line 1",
        "text that is not UTF-8: text, line 8",
    ]


def test_a_kaldi_folder_without_text_or_the_split_is_told(tmp_path):
    kaldi(tmp_path)
    assert refused(rows, tmp_path, split="other")[1] == "there is no split 'other', there are train"
    (tmp_path / "train/text").unlink()
    assert refused(rows, tmp_path / "train")[1] == "this is no folder of Kaldi: it has no file 'text'"


names = st.text("abcdef0123-", min_size=1, max_size=5)
words = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zs", "Zl", "Zp"]), min_size=1, max_size=9)


@given(st.dictionaries(names, st.tuples(words, words), min_size=1, max_size=6), st.sampled_from([" ", "\t", " \t "]))
def test_what_kaldi_writes_is_read_again(tmp_path_factory, utterances, between):
    folder = tmp_path_factory.mktemp("kaldi")
    for name, of_utterance in {
        "wav.scp": lambda id, words: f"{id}.wav",
        "text": lambda id, words: " ".join(words),
        "segments": lambda id, words: f"{id} 0.5 1.5",
    }.items():
        write(folder / name, *(f"{id}{between}{of_utterance(id, words)}" for id, words in utterances.items()))
    found = {row["id"]: (row["audio"], row["text"], row["start"], row["end"]) for row in kaldi_rows(folder)}
    assert found == {id: (f"{id}.wav", " ".join(both), 0.5, 1.5) for id, both in utterances.items()}


# --- LibriSpeech


def librispeech(folder, split="dev-clean"):
    samples = save(folder / split / "19/198/19-198-0000.flac", 0.5)
    write(folder / split / "19/198/19-198.trans.txt", "19-198-0000 NORTHANGER ABBEY", "19-198-0001 GONE")
    return samples


def test_librispeech_has_its_speakers_and_splits_that_add_up(tmp_path):
    samples = librispeech(tmp_path)
    save(tmp_path / "train/26/495/26-495-0000.flac", 0.5)
    write(tmp_path / "train/26/495/26-495.trans.txt", "26-495-0000 WORDS")
    found = rows(tmp_path, "librispeech", "dev-clean+train")
    assert found.texts() == ["NORTHANGER ABBEY", "GONE", "WORDS"]
    assert found.cells("speaker") == ["19", "19", "26"]
    assert problems(found) == {"19-198-0001": ("missing file", "the audio of 19-198-0001")}
    np.testing.assert_array_equal(heard(found, "19-198-0000"), samples)
    assert rows(tmp_path, "librispeech", "train").texts() == ["WORDS"]
    assert refused(rows, tmp_path, "librispeech", "test")[1] == "there is no split 'test', there are dev-clean, train"


# --- Common Voice and CoVoST


def common_voice(folder, *lines):
    samples = save(folder / "clips/common_voice_de_1.mp3", 1.0)
    header = "client_id\tpath\tsentence\tup_votes\tlocale"
    write(folder / "dev.tsv", header, 'x\tcommon_voice_de_1.mp3\tEr sagt "nein".\t2\tde', *lines)
    write(folder / "clip_durations.tsv", "clip\tduration[ms]", "common_voice_de_1.mp3\t1000")
    return samples


def test_common_voice_is_read_with_its_speakers_lengths_and_languages(tmp_path):
    samples = common_voice(tmp_path)
    found = rows(tmp_path, "common_voice", "validation")
    assert (found.texts(), list(found.ids())) == (['Er sagt "nein".'], ["common_voice_de_1"])
    assert (found.cells("speaker"), found.cells("language"), list(found.seconds())) == (["x"], ["de"], [1.0])
    assert abs(len(heard(found, "common_voice_de_1")) - len(samples)) < RATE / 10  # MP3 pads


def test_a_broken_line_of_common_voice_is_told_with_file_and_line(tmp_path):
    common_voice(tmp_path, "x\ty.mp3", "x\t../y.mp3\tout\t0\tde")
    assert problems(rows(tmp_path, "common_voice", "dev")) == {
        "dev-1": ("broken CSV", "dev.tsv, line 3 has 2 cells, the header 5"),
        "../y": ("path outside the dataset's folder", "../y.mp3"),
    }


def test_a_missing_file_or_column_of_common_voice_is_told(tmp_path):
    common_voice(tmp_path)
    assert refused(rows, tmp_path, "common_voice")[1] == "there is no file train.tsv in this folder"
    write(tmp_path / "train.tsv", "path\ttext", "a.mp3\tx")
    assert refused(rows, tmp_path, "common_voice")[1] == "train.tsv has no column 'sentence', it has path, text"


def test_covost_has_translations_and_a_file_for_each_direction(tmp_path):
    for direction in ("en_de", "en_ca"):
        header = "path\tsentence\ttranslation\tclient_id"
        write(tmp_path / f"covost_v2.{direction}.train.tsv", header, f"a.mp3\tHello\tHallo {direction}\tx")
    save(tmp_path / "cv/clips/a.mp3", 0.5)
    options = {"target": "translation", "audio_folder": f"{tmp_path}/cv/clips"}
    found = rows(tmp_path, "covost", name="en_de", **options)
    assert found.texts() == ["Hallo en_de"]
    assert rows(tmp_path, "covost", name="en_de", audio_folder=options["audio_folder"]).texts() == ["Hello"]
    assert len(heard(found, "a")) > 0
    _, wrong, instead = refused(rows, tmp_path, "covost", **options)
    assert wrong.startswith("there are several files for 'train': covost_v2.en_ca.train.tsv, covost_v2.en_de")
    assert instead == "write data.name=DIRECTION, such as data.name=en_de"


def test_a_format_without_translations_says_so(tmp_path):
    kaldi(tmp_path)
    option, wrong, _ = refused(source, tmp_path, target="translation")
    assert (option, wrong) == ("data.format", "target=translation: this format has no translations")
    option, wrong, instead = refused(source, tmp_path, "espnet")
    assert (option, wrong) == ("data.format", "there is no such format")
    assert instead == "write data.format=ONE_OF kaldi, librispeech, common_voice, covost, nemo, lhotse"


def test_a_file_of_another_format_is_told_by_its_name(tmp_path):
    common_voice(tmp_path)
    (tmp_path / "dev.tsv").write_bytes("path\tsentence\n".encode("utf-16"))
    assert f"{tmp_path}/dev.tsv: its text is UTF-16" in refused(rows, tmp_path, "common_voice", "dev")[1]
    (tmp_path / "train.json").write_bytes('{"text": "a"}'.encode("utf-16"))
    assert f"{tmp_path}/train.json: its text is UTF-16" in refused(rows, tmp_path, "nemo")[1]
    assert refused(rows, tmp_path, "common_voice", "/etc")[1] == "there is no file /etc.tsv in this folder"


# --- NeMo


def test_a_nemo_manifest_has_offsets_speakers_and_answers(tmp_path):
    samples = save(tmp_path / "long.flac")
    lines = [
        {"audio_filepath": "long.flac", "duration": 0.5, "offset": 1.25, "text": "part", "speaker": "s", "lang": "en"},
        {"audio_filepath": "long.flac", "duration": 2, "answer": "all", "target_lang": "de", "taskname": "asr"},
    ]
    write(tmp_path / "train_manifest.json", *map(json.dumps, lines), '{"audio_filepath": ')
    found = rows(tmp_path, "nemo")
    assert found.texts()[:2] == ["part", "all"]
    assert (found.cells("speaker")[:2], found.cells("language")[:2]) == (["s", None], ["en", "de"])
    assert found.problem(2, 1.0) == ("broken JSON", "train_manifest.json, line 3, Expecting value")
    np.testing.assert_array_equal(found.utterance(0, RATE).audio, samples[20_000:28_000])
    np.testing.assert_array_equal(found.utterance(1, RATE).audio, samples)


# --- Lhotse


def cut(place, supervisions, start=0.0, **changes):
    recording = {
        "id": "rec", "sources": [{"type": "file", "channels": [0], "source": str(place)}],
        "sampling_rate": RATE, "num_samples": 2 * RATE, "duration": 2.0, "channel_ids": [0],
    }  # fmt: skip
    times = {"start": start, "duration": 2.0 - start, "channel": 0}
    return {"id": "cut", **times, "supervisions": supervisions, "recording": recording, "type": "MonoCut", **changes}


def supervision(id, start, duration, **said):
    return {"id": id, "recording_id": "rec", "start": start, "duration": duration, "channel": 0, **said}


@pytest.mark.parametrize("file", ["librispeech_cuts_train.jsonl", "cuts_train.jsonl.gz"])
def test_a_cut_of_lhotse_is_an_utterance_for_each_supervision(tmp_path, file):
    samples = save(tmp_path / "a.flac")
    two = [supervision("s1", 0, 0.5, text="one", speaker="x"), supervision("s2", 0.5, 0.25, text="two", language="en")]
    one = {**cut(tmp_path / "a.flac", [supervision("s3", 0, 2.0, text="all")]), "id": "other"}
    content = "".join(json.dumps(each) + "\n" for each in (cut(tmp_path / "a.flac", two, 1.0), one)).encode()
    (tmp_path / file).write_bytes(gzip.compress(content) if file.endswith("gz") else content)
    found = rows(tmp_path, "lhotse")
    assert (list(found.ids()), found.texts()) == (["cut-s1", "cut-s2", "other"], ["one", "two", "all"])
    assert (found.cells("speaker"), found.cells("language")) == (["x", None, None], [None, "en", None])
    np.testing.assert_array_equal(heard(found, "cut-s1"), samples[16_000:24_000])
    np.testing.assert_array_equal(heard(found, "cut-s2"), samples[24_000:28_000])
    np.testing.assert_array_equal(heard(found, "other"), samples)


def source_of_kind(kind):
    changed = cut("x", [supervision("s", 0, 1, text="a")])
    changed["recording"]["sources"][0]["type"] = kind
    return changed


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"id": "m", "type": "MixedCut", "tracks": []}, "cut of another kind: f, line 1: MixedCut, of which only"),
        (cut("x", [], recording=None), "no audio: f, line 1: the cut has no recording"),
        (cut("x", []), "no transcript: f, line 1: the cut has no supervision"),
        (source_of_kind("command"), "no file: f, line 1: the source of its recording is a command, which is never run"),
        (source_of_kind("url"), "no file: f, line 1: the source of its recording is a url"),
        (cut("x", [{}]), "broken cut: f, line 1: it has not the fields of a MonoCut"),
        ({}, "no audio: f, line 1: the cut has no recording"),
    ],
)
def test_a_cut_whose_audio_is_no_part_of_a_file_is_left_out_by_name(given, reason):
    [row] = rows_of_cut(given, "f, line 1")
    assert row[PROBLEM].startswith(reason)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = ["id", "type", "start", "supervisions", "recording"]


@given(st.dictionaries(st.sampled_from(KEYS), json_values, max_size=5), st.booleans())
def test_whatever_a_cut_holds_it_is_rows_or_one_problem(changes, is_partial):
    given = {**cut("x", [supervision("s", 0.0, 1.0, text="a")]), **changes} if is_partial else changes
    found = list(rows_of_cut(given, "f, line 1"))
    assert len(found) == 1 if any(PROBLEM in row for row in found) else all(row["audio"] == "x" for row in found)


def test_a_packed_file_that_ends_early_and_odd_numbers_are_told(tmp_path):
    save(tmp_path / "a.wav", seconds=0.3)
    packed = gzip.compress(b"{}\n" * 100)
    for broken in (packed[:-6], packed[:12] + b"\xff" * 20):
        (tmp_path / "cuts_train.jsonl.gz").write_bytes(broken)
        with pytest.raises(UserError, match=r"cuts_train\.jsonl\.gz"):
            rows(tmp_path, "lhotse")
    recording = {"sources": [{"type": "file", "channels": [0], "source": "a.wav"}]}
    cut = {"id": "a", "start": 0.0, "recording": recording, "supervisions": [{"start": 10**400, "duration": 1}]}
    assert [set(row) for row in rows_of_cut(cut, "cuts, line 1")] == [{PROBLEM}]
    write(tmp_path / "train.tsv", "path\tsentence", "a.wav\ta")
    write(tmp_path / "clip_durations.tsv", "clip\tduration[ms]", "a.wav\t\u00b2")
    assert len(rows(tmp_path, "common_voice")) == 1


def test_a_split_of_kaldi_that_lacks_a_file_is_told_its_name(tmp_path):
    write(tmp_path / "train/wav.scp", "a a.wav")
    with pytest.raises(UserError, match="it has no file 'text'"):
        rows(tmp_path, "kaldi")
