"""Lengths come from columns, else from headers, which are read once for as long as nothing changes."""

import json
import logging
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
from corpora import known

from sedtrain.data import durations as durations_module
from sedtrain.data.durations import cache_file, durations
from sedtrain.data.parts import Part
from sedtrain.data.readers import read_rows
from sedtrain.data.source import Columns, Source
from sedtrain.data.utterances import ROWS_AT_ONCE, UtteranceRows

RATE = 8000
PLAIN = Columns("audio", "text")
LENGTHS = [0.1 + 0.01 * i for i in range(2 * ROWS_AT_ONCE + 5)]


def save(path, seconds):
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, round(seconds * RATE)), RATE)


def manifest(folder, rows):
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": "one", **row}) for row in rows))


@pytest.fixture
def folder(tmp_path):
    """A manifest of more files than a thread reads at once."""
    for number, seconds in enumerate(LENGTHS):
        save(tmp_path / f"{number}.flac", seconds)
    manifest(tmp_path, [{"audio": f"{number}.flac"} for number in range(len(LENGTHS))])
    return tmp_path


def rows_of(folder, columns=PLAIN, split="train"):
    return Part(Source(str(folder), columns, {"train": split}), split).open()


@pytest.fixture
def read(monkeypatch):
    """The rows whose headers are read, in all."""
    seen = []
    of_row = UtteranceRows.length_or_reason

    def counted(self, row):
        seen.append(row["audio"])
        return of_row(self, row)

    monkeypatch.setattr(UtteranceRows, "length_or_reason", counted)
    return seen


def test_headers_are_read_once_and_in_order(folder, read):
    assert known(durations(rows_of(folder))) == pytest.approx(LENGTHS, abs=1e-3)
    assert len(read) == len(LENGTHS)
    assert known(durations(rows_of(folder))) == pytest.approx(LENGTHS, abs=1e-3)
    assert len(read) == len(LENGTHS)


def test_what_columns_say_is_not_read(tmp_path, read):
    save(tmp_path / "a.wav", 0.5)
    manifest(tmp_path, [{"audio": "a.wav", "length": 0.25}, {"audio": "a.wav", "length": None}])
    columns = Columns("audio", "text", seconds="length")
    assert known(durations(rows_of(tmp_path, columns))) == [0.25, 0.5]
    assert len(read) == 1
    manifest(tmp_path, [{"audio": "none.wav", "length": 0.25}])
    rows = rows_of(tmp_path, columns)
    assert known(durations(rows)) == [0.25]
    assert not cache_file(rows).exists()


def test_a_file_that_changes_is_read_again(folder):
    before = known(durations(rows_of(folder)))
    save(folder / "3.flac", 2.0)
    assert known(durations(rows_of(folder))) == pytest.approx([*LENGTHS[:3], 2.0, *LENGTHS[4:]], abs=1e-3)
    assert before[3] == pytest.approx(LENGTHS[3], abs=1e-3)


def test_rows_that_change_have_another_index(folder):
    durations(rows_of(folder))
    manifest(folder, [{"audio": f"{number}.flac"} for number in (7, 5)])
    assert known(durations(rows_of(folder))) == pytest.approx([LENGTHS[7], LENGTHS[5]], abs=1e-3)
    save(folder / "7.flac", 1.0)
    assert known(durations(rows_of(folder))) == pytest.approx([1.0, LENGTHS[5]], abs=1e-3)


def test_parts_of_a_split_and_segments_have_their_own_lengths(folder):
    assert known(durations(rows_of(folder, split="train[2:4]"))) == pytest.approx(LENGTHS[2:4], abs=1e-3)
    assert known(durations(rows_of(folder, split="train[4:5]"))) == pytest.approx(LENGTHS[4:5], abs=1e-3)
    save(folder / "a.wav", 1.0)
    manifest(folder, [{"audio": "a.wav", "from": 0.2}, {"audio": "a.wav", "from": 0.7}])
    assert known(durations(rows_of(folder, Columns("audio", "text", start="from")))) == pytest.approx([0.8, 0.3])


def test_rows_without_a_readable_header_are_tried_again_alone(tmp_path, read):
    save(tmp_path / "a.wav", 0.5)
    (tmp_path / "b.wav").write_text("no audio")
    manifest(tmp_path, [{"audio": name} for name in ("a.wav", "b.wav", "c.wav", None)])
    assert known(durations(rows_of(tmp_path))) == [0.5, None, None, None]
    assert len(read) == 4
    assert known(durations(rows_of(tmp_path))) == [0.5, None, None, None]
    assert read[4:] == ["b.wav", "c.wav", None]
    save(tmp_path / "c.wav", 0.25)
    assert known(durations(rows_of(tmp_path))) == [0.5, None, 0.25, None]


def test_bytes_in_parquet_and_members_of_a_tar_are_read_once(tmp_path, read):
    save(tmp_path / "a.wav", 0.5)
    content = (tmp_path / "a.wav").read_bytes()
    cells = [{"bytes": content, "path": "a.wav"}] * 3
    datasets.Dataset.from_dict({"audio": cells, "text": ["one"] * 3}).to_parquet(tmp_path / "train.parquet")
    for _ in range(2):
        assert known(durations(rows_of(tmp_path))) == [0.5] * 3
    assert len(read) == 3
    (tmp_path / "tar").mkdir()
    pack(tmp_path / "tar/train.tar", {"x.wav": content, "x.txt": b"one"})
    for _ in range(2):
        assert known(durations(rows_of(tmp_path / "tar"))) == [0.5]
    assert len(read) == 4
    assert len(read_rows(tmp_path / "tar/train.tar")) == 1


def pack(path, members):
    import io
    import tarfile

    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def test_ranks_that_ask_at_once_read_the_headers_once(folder, read):
    found = []
    threads = [threading.Thread(target=lambda: found.append(known(durations(rows_of(folder))))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2]
    assert len(read) == len(LENGTHS)
    assert not [each for each in cache_file(rows_of(folder)).parent.iterdir() if each.suffix not in (".npy", ".lock")]


class Terminal:
    """What is written to a console that may be a terminal."""

    def __init__(self, monkeypatch, is_terminal):
        self.shown = []
        monkeypatch.setattr(durations_module, "SHOWN_AFTER_SECONDS", -1.0)
        console = durations_module.Console

        def made(**options):
            return console(**options, force_terminal=is_terminal, width=200)

        monkeypatch.setattr(durations_module, "Console", made)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_lasts_longer_than_a_moment_is_shown(folder, monkeypatch, capsys, caplog, is_terminal):
    Terminal(monkeypatch, is_terminal)
    with caplog.at_level(logging.INFO):
        durations(rows_of(folder))
    words = f"train: reading how long each of {len(LENGTHS)} utterances is"
    assert (words in capsys.readouterr().err) == is_terminal
    assert caplog.messages == ([] if is_terminal else [f"{words}, from the headers"])


def test_what_is_there_at_once_is_not_shown(folder, capsys, caplog):
    durations(rows_of(folder))
    assert capsys.readouterr().err == ""
    assert caplog.messages == []


def test_the_index_lies_in_the_cache_of_datasets(folder):
    durations(rows_of(folder))
    assert cache_file(rows_of(folder)).parent == Path(datasets.config.HF_DATASETS_CACHE) / "sedtrain/durations"
