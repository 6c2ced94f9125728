import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from corpora import data_module, wav, write
from test_report import Page

from sedtrain.inspection.summary import inspected
from sedtrain.inspection.tables import write_page


def inspect(sedtrain, folder, run_dir, *options):
    return sedtrain("task=inspect", "data=parquet", f"data.path={folder}", f"run_dir={run_dir}", *options)


@pytest.fixture(scope="module")
def inspected_corpus(sedtrain, corpus, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "inspect"
    columns = ("data.columns.id=id", "data.columns.speaker=speaker")
    return inspect(sedtrain, corpus, run_dir, *columns), run_dir


def test_an_inspection_says_where_its_page_is(inspected_corpus):
    ended, run_dir = inspected_corpus
    assert (ended.status, ended.err) == (0, "")
    assert "What to look at" in ended.out
    assert f"saved in {run_dir}: inspect.html, inspect.json, sedtrain.log" in ended.out


def test_its_figures_are_those_of_the_files(inspected_corpus, corpus):
    found = json.loads((inspected_corpus[1] / "inspect.json").read_text())
    assert [each["split"] for each in found["splits"]] == ["train", "validation", "test"]
    for split in found["splits"]:
        rows = pyarrow.parquet.read_table(corpus / f"{split['split']}.parquet").to_pydict()
        assert split["num_utterances"] == len(rows["id"])
        assert split["hours"] == pytest.approx(sum(rows["seconds"]) / 3600, rel=0.01)
        assert len(split["groups"]["speaker"]) == len(set(rows["speaker"]))
        assert split["spreads"]["characters"]["mean"] == pytest.approx(np.mean([len(text) for text in rows["text"]]))
        assert split["texts"]["num_distinct"] == len(set(rows["text"]))
        assert split["texts"]["num_characters"] == len(set("".join(rows["text"])))


def test_the_page_needs_nothing_else_and_plays_the_strangest(inspected_corpus):
    page = Page((inspected_corpus[1] / "inspect.html").read_text(encoding="utf-8"))
    assert page.crossed == []
    links = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")]
    sounds = [link for link in links if link.startswith("data:audio/flac")]
    assert len(sounds) == 10
    assert all(link.startswith("#") for link in links if link not in sounds)


def test_no_run_is_left_behind_that_would_be_in_the_way(inspected_corpus, sedtrain, corpus):
    assert inspect(sedtrain, corpus, inspected_corpus[1]).status == 0


def test_texts_and_names_are_escaped(tmp_path):
    write(tmp_path / "train.parquet", [1.0] * 12, speaker=["<b>"] * 12, id=[f"<i>{number}" for number in range(12)])
    columns = {"audio": "audio", "transcription": "text", "speaker": "speaker", "id": "id"}
    found, read = inspected(data_module(tmp_path, columns=columns), None)
    write_page(tmp_path / "inspect.html", found, read)
    html = (tmp_path / "inspect.html").read_text(encoding="utf-8")
    assert ("<b>" in html, "<i>" in html) == (False, False)
    assert "&lt;b&gt;" in html


def dirty(folder):
    """Every utterance but the last cannot be used: too short, without text, undecodable."""
    audio = [wav(0.01), wav(1.0), b"nothing", wav(1.0)]
    rows = {"audio": audio, "text": ["one", "", "two", "three\u200b"], "seconds": [0.01, 1.0, 1.0, 1.0]}
    pyarrow.parquet.write_table(pa.table(rows), folder / "train.parquet")
    return folder


def test_dirt_is_counted_and_stops_nothing(sedtrain, tmp_path):
    ended = inspect(
        sedtrain, dirty(tmp_path), tmp_path / "run", "data.columns.seconds=seconds", "data.on_bad_utterance=error"
    )
    assert ended.status == 0
    out = " ".join(ended.out.split())
    assert "train: 3 of 4 utterances would be skipped: " in out
    assert "1 of 2 drawn at random cannot be decoded, or are refused" in out
    assert "characters that nobody sees: U+200B zero width space (first in train-3)" in out
    assert "validation is not there: " in out
    assert len((tmp_path / "run/skipped.jsonl").read_text().splitlines()) == 3


def test_a_bound_on_tokens_is_told_not_to_be_counted(sedtrain, tmp_path):
    text = "Batches by data.batch_seconds=24, data.num_buckets=30"
    without = inspect(sedtrain, dirty(tmp_path), tmp_path / "without")
    assert text in " ".join(without.out.split())
    assert "data.batch_tokens" not in without.out + (tmp_path / "without/inspect.html").read_text(encoding="utf-8")
    ended = inspect(sedtrain, tmp_path, tmp_path / "run", "data.batch_tokens=500")
    page = (tmp_path / "run/inspect.html").read_text(encoding="utf-8")
    for shown in (ended.out, page):
        assert f"{text} (data.batch_tokens=500 is not counted)" in " ".join(shown.split())


def test_what_the_normalizer_empties_is_left_out(sedtrain, tmp_path):
    rows = {"audio": [wav(1.0)] * 2, "text": ["[noise]", "two"]}
    pyarrow.parquet.write_table(pa.table(rows), tmp_path / "train.parquet")
    ended = inspect(sedtrain, tmp_path, tmp_path / "run", "training_normalizer=whisper_english")
    assert "train: 1 of 2 utterances would be skipped: 1 text empty once normalized" in " ".join(ended.out.split())


def test_a_split_without_a_usable_utterance_is_told(sedtrain, tmp_path):
    pyarrow.parquet.write_table(pa.table({"audio": [b"", b""], "text": ["", ""]}), tmp_path / "train.parquet")
    ended = inspect(sedtrain, tmp_path, tmp_path / "run")
    assert ended.status == 0
    assert "train: there is no utterance that can be used" in " ".join(ended.out.split())
    assert (tmp_path / "run/inspect.html").is_file()


@pytest.mark.parametrize(
    "options, words",
    [
        (["data.columns.speaker=speakr"], "has no column 'speakr' for the speaker"),
        (["inspect_utterances=0"], "expected a whole number of 1 or more, or null"),
        (["data.path=/nowhere"], "there is no such file or folder"),
    ],
)
def test_what_cannot_be_inspected_ends_with_status_2(sedtrain, corpus, tmp_path, options, words):
    ended = inspect(sedtrain, corpus, tmp_path / "run", *options)
    assert ended.status == 2
    assert words in ended.err
    assert "Traceback" not in ended.err
