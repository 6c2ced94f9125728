"""What a stream is read from: files of every format, here, on a server, as `datasets` finds them."""

import atexit
import functools
import http.server
import json
import re
import shutil
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import datasets
import pyarrow.parquet
import pytest
from corpora import COLUMNS, data_module, listed, refused, wav, write
from test_formats import shard

from sedtrain.data import paths
from sedtrain.data.parts import Part, parts_of
from sedtrain.data.source import Columns, Source
from sedtrain.errors import UserError


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(paths, "FIRST_PAUSE", 0.01)


@pytest.fixture
def numbered(tmp_path):
    """Eleven utterances in three Parquet files."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        write(folder / f"train-{number:05}-of-00003.parquet", [0.3 + 0.1 * i for i in range(number, 11, 3)])
    write(folder / "validation-00000-of-00001.parquet", [0.5] * 3)
    return folder


PLAIN = Columns("audio", "text")
EVERYTHING = {f"train-0000{number}-of-00003-{row}" for number, size in ((0, 4), (1, 4), (2, 3)) for row in range(size)}


def streamed(path, tmp_path, **options):
    options = {"streaming": True, "block_utterances": 5, "batch_seconds": 2, **options}
    return data_module(path, folder=tmp_path, **options)


def seen(data):
    return sorted(id for batch in data.train_dataloader() for id in batch.ids)


def names(path, split, tmp_path, name=None):
    found = parts_of(Source(str(path), PLAIN, {"train": split}, name), "train", tmp_path)
    return [part.name for part in found if part.place]


# --- which files


def test_a_folder_of_numbered_files_is_streamed_file_by_file(numbered, tmp_path):
    data = streamed(numbered, tmp_path)
    assert data.corpus.training_audio() == "streamed, 3 files"
    assert seen(data) == sorted(EVERYTHING)
    assert len(list(data.batches("validation"))) == 1


def test_a_clone_of_a_hub_dataset_is_streamed_file_by_file(numbered, tmp_path):
    assert names(numbered.parent, "train", tmp_path) == [f"train-0000{number}-of-00003" for number in range(3)]
    assert seen(streamed(numbered.parent, tmp_path)) == sorted(EVERYTHING)


def test_tars_are_streamed_and_never_copied(tmp_path):
    for number in range(2):
        shard(tmp_path / f"train-{number}.tar", range(number * 4, number * 4 + 4))
    columns = {**COLUMNS, "translation": None, "id": "id"}
    data = streamed(tmp_path / "{split}-{0..1}.tar", tmp_path, columns=columns)
    assert len(seen(data)) == 8
    assert not data.corpus.copies.exists()


def test_what_has_no_files_of_its_own_is_one_shard(tmp_path):
    write(tmp_path / "train.parquet", [0.5] * 4)
    rows = datasets.Dataset.from_parquet(str(tmp_path / "train.parquet"))
    datasets.DatasetDict({"train": rows.rename_column("text", "said")}).save_to_disk(tmp_path / "saved")
    assert names(tmp_path / "saved", "train", tmp_path) == []
    data = streamed(tmp_path / "saved", tmp_path, columns={**COLUMNS, "transcription": "said"})
    assert seen(data) == [f"train-{i}" for i in range(4)]
    assert list(data.texts("train")) == rows["text"][:]


def test_splits_joined_by_plus_are_the_files_of_each(numbered, tmp_path):
    joined = names(numbered.parent, "validation+train", tmp_path)
    assert joined == ["validation-00000-of-00001", *(f"train-0000{number}-of-00003" for number in range(3))]


def test_a_part_of_a_split_cannot_be_streamed(numbered, tmp_path):
    with pytest.raises(UserError) as raised:
        names(numbered, "train[:90%]", tmp_path)
    assert (raised.value.option, raised.value.value) == ("data.path", str(numbered))
    assert raised.value.wrong == "'train[:90%]' is a slice of a split, which neither a stream nor a URL has"
    assert raised.value.write == "write data.streaming=false for what is not on a server, or a split of its own"


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(UserError, match="there is no such file or folder"):
        names(tmp_path / "none", "train", tmp_path)


# --- copies


@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_the_first_process_of_a_machine_removes_what_was_converted_when_it_ends(numbered, tmp_path, monkeypatch, rank):
    at_exit = []
    monkeypatch.setattr(
        atexit, "register", lambda *call, **options: at_exit.append(functools.partial(*call, **options))
    )
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    data = streamed(numbered, tmp_path)
    seen(data)
    assert any(data.corpus.copies.iterdir())
    for each in at_exit:
        each()
    assert data.corpus.copies.exists() == (rank == "1")


def test_two_runs_have_copies_of_their_own(numbered, tmp_path):
    one, other = streamed(numbered, tmp_path / "one"), streamed(numbered, tmp_path / "other")
    assert one.corpus.copies != other.corpus.copies


# --- shards that cannot be read


def test_a_shard_that_is_broken_is_left_out_and_noted(numbered, tmp_path):
    (numbered / "train-00001-of-00003.parquet").write_bytes(b"PAR1 and nothing else")
    data = streamed(numbered, tmp_path, max_bad_fraction=0.34)
    assert seen(data) == sorted(id for id in EVERYTHING if "00001" not in id.partition("-of-")[0])
    assert data.skipped.counts == {"unreadable shard": 1}
    [line] = listed(tmp_path)
    assert (line["id"], line["path"]) == ("train-00001-of-00003", f"{numbered}/train-00001-of-00003.parquet")


def test_more_broken_shards_than_allowed_are_an_error(numbered, tmp_path):
    (numbered / "train-00001-of-00003.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError) as raised:
        seen(streamed(numbered, tmp_path, max_bad_fraction=0.33))
    assert (raised.value.option, raised.value.value) == ("data.max_bad_fraction", 0.33)
    assert raised.value.wrong.startswith(
        "1 of 3 files cannot be read, which is more "
        f"(the last: {numbered}/train-00001-of-00003.parquet: ArrowInvalid: Parquet magic bytes not found in footer"
    )


def test_a_stream_of_broken_shards_is_told_before_training(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match="none of the 1 shards of 'train' can be read"):
        streamed(tmp_path, tmp_path, max_bad_fraction=1).corpus.refuse_unusable(["train"])


@pytest.mark.parametrize(
    "lines", ["", "no JSON\n{broken\n"], ids=["a file without a line", "a file of nothing but broken lines"]
)
def test_a_shard_of_which_nothing_is_known_is_no_end_of_a_stream(tmp_path, lines):
    rows = [{"audio_filepath": "a.wav", "text": "one"}, {"audio_filepath": "b.wav", "text": "two"}]
    for name in "ab":
        (tmp_path / f"{name}.wav").write_bytes(wav(0.5))
    (tmp_path / "train-0.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "train-1.jsonl").write_text(lines)
    columns = {"audio": "audio_filepath", "transcription": "text", "start": "offset"}
    data = streamed(tmp_path, tmp_path / "run", columns=columns, max_bad_fraction=1.0)
    assert list(data.texts("train")) == ["one", "two"]
    assert seen(data) == ["train-0-0", "train-0-1"]
    assert data.skipped.counts == ({"broken JSON": 2} if lines else {})


def test_a_parquet_file_without_a_row_is_no_end_of_a_stream(numbered, tmp_path):
    write(numbered / "train-00001-of-00003.parquet", [0.5])
    whole = pyarrow.parquet.read_table(numbered / "train-00001-of-00003.parquet")
    pyarrow.parquet.write_table(whole.slice(0, 0), numbered / "train-00001-of-00003.parquet")
    data = streamed(numbered, tmp_path)
    assert len(list(data.texts("train"))) == len(seen(data)) == 7


def test_a_later_file_with_other_columns_is_told_by_its_name(numbered, tmp_path):
    place = numbered / "train-00001-of-00003.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(place).rename_columns({"text": "words"}), place)
    with pytest.raises(UserError) as raised:
        list(streamed(numbered, tmp_path).texts("train"))
    assert raised.value.wrong == (f"{place} has no column 'text' for the text, it has audio, words, translation")


def test_files_of_one_name_in_two_folders_have_rows_of_different_ids(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "train.000.parquet", [0.5] * 2)
    assert seen(streamed(f"{tmp_path}/*/train.*.parquet", tmp_path)) == [
        "one/train.000-0", "one/train.000-1", "two/train.000-0", "two/train.000-1",
    ]  # fmt: skip


def test_a_file_that_is_gone_when_its_audio_is_to_be_read_costs_its_rows_alone(numbered, tmp_path):
    data = streamed(numbered, tmp_path, max_bad_fraction=1.0)
    loader = data.train_dataloader()
    plan = list(loader.sampler)
    loader.dataset.parts.opened.clear()
    shutil.rmtree(data.corpus.copies)
    gone = numbered / "train-00001-of-00003.parquet"
    gone.unlink()
    batches = [loader.dataset[drawn] for drawn in plan]
    skipped = [each for batch in batches for each in batch.skipped]
    assert sorted(id for batch in batches for id in batch.ids) == sorted(id for id in EVERYTHING if "-00001-" not in id)
    assert {(each.reason, each.path) for each in skipped} == {("unreadable shard", str(gone))}
    assert sorted(each.id for each in skipped) == sorted(id for id in EVERYTHING if "-00001-" in id)


# --- a server


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; every file fails as often as `failures` says."""

    failures: ClassVar[Counter] = Counter()
    asked: ClassVar[Counter] = Counter()

    def do_GET(self):
        Handler.asked[self.path] += 1
        if Handler.failures[self.path] > 0:
            Handler.failures[self.path] -= 1
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@contextmanager
def serving(folder, handler):
    for counts in (Handler.failures, Handler.asked, Ranges.sent):
        counts.clear()
    handler = functools.partial(handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def server(numbered):
    with serving(numbered, Handler) as url:
        yield url


def test_the_texts_of_parquet_are_read_without_its_audio(tmp_path):
    lengths = [30.0] * 12
    write(tmp_path / "train-00000-of-00001.parquet", lengths)
    with serving(tmp_path, Ranges) as url:
        data = streamed(f"{url}/{{split}}-00000-of-00001.parquet", tmp_path)
        assert list(data.texts("train")) == (["one", "two", "three", "four"] * 3)
    [sent] = Ranges.sent.values()
    assert sent < 0.6 * (tmp_path / "train-00000-of-00001.parquet").stat().st_size


def test_the_texts_of_a_server_that_gives_no_parts_are_read_from_the_whole_file(server, tmp_path):
    texts = list(streamed(f"{server}/{PATTERN}", tmp_path).texts("train"))
    assert Counter(texts) == {"one": 3, "two": 3, "three": 3, "four": 2}


class Ranges(Handler):
    """Gives parts of files too, and counts the bytes that it sends."""

    sent: ClassVar[Counter] = Counter()

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(self.content())))
        self.end_headers()

    def content(self):
        return Path(self.translate_path(self.path)).read_bytes()

    def do_GET(self):
        first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups()
        part = self.content()[int(first) : int(last) + 1]
        self.sent[self.path] += len(part)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(self.content())}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


PATTERN = "{split}-{00000..00002}-of-00003.parquet"


def test_files_of_a_server_are_fetched_once_when_they_are_needed(server, tmp_path):
    data = streamed(f"{server}/{PATTERN}", tmp_path, block_utterances=4)
    assert sum(Handler.asked.values()) == 0
    assert seen(data) == sorted(EVERYTHING)
    assert set(Handler.asked.values()) == {1}
    assert len(Handler.asked) == 3


def test_a_run_on_the_tars_of_a_server_goes_to_its_end(tmp_path, sedtrain):
    for split in ("train", "validation", "test"):
        shard(tmp_path / f"{split}-0.tar", range(6))
    with serving(tmp_path, Handler) as url:
        done = sedtrain(
            "data=webdataset", f'data.path="{url}/{{split}}-0.tar"', "data.streaming=true", "data.block_utterances=3",
            "data.columns.translation=null", "trainer.max_steps=2", "trainer.val_check_interval=2",
            "decoding.max_new_tokens=3", f"run_dir={tmp_path}/run",
        )  # fmt: skip
    assert done.status == 0, done.err
    assert json.loads((tmp_path / "run/results.json").read_text())["num_utterances"] == 6


def test_a_server_that_fails_now_and_then_is_asked_again(server, tmp_path):
    Handler.failures["/train-00001-of-00003.parquet"] = 3
    assert seen(streamed(f"{server}/{PATTERN}", tmp_path)) == sorted(EVERYTHING)


def test_a_file_that_is_not_there_is_told_by_its_url(server, tmp_path):
    url = f"{server}/none.parquet"
    with pytest.raises(UserError) as raised:
        Part(Source(url, PLAIN, {}), "none", url, tmp_path / "copies").rows()
    assert (raised.value.option, raised.value.value) == ("data.path", url)
    assert raised.value.wrong.startswith(f"{url} cannot be fetched (FileNotFoundError: ")
    assert list((tmp_path / "copies").rglob("*.parquet*")) == []


@pytest.mark.parametrize(
    "pattern", ["{split}-*.parquet", "{split}-0000[0-2]-of-00003.parquet", f"{PATTERN}?download=true"]
)
@pytest.mark.parametrize("streaming", [True, False])
def test_files_of_a_server_are_named_by_globs_with_or_without_streaming(server, tmp_path, pattern, streaming):
    data = streamed(f"{server}/{pattern}", tmp_path, streaming=streaming)
    assert Counter(data.corpus.texts("train")) == {"one": 3, "two": 3, "three": 3, "four": 2}


@pytest.mark.parametrize("streaming", [True, False])
def test_a_url_that_names_no_file_is_told(server, tmp_path, streaming):
    write = "write a URL of files of one of .parquet, .jsonl, .json, .csv, .tsv, .tar"
    told = refused(streamed(server, tmp_path, streaming=streaming).corpus.texts("train").__next__)
    assert f"data.path = '{server}'\n    this URL names no file of a format that can be read\n    {write}" in told
    told = refused(streamed(f"{server}/none*.parquet", tmp_path, streaming=streaming).corpus.texts("train").__next__)
    assert f"data.path = '{server}/none*.parquet'\n    there is no such file\n    write a glob of files" in told
    told = refused(
        streamed("hf://datasets/some/corpus/*.tar", tmp_path, streaming=streaming).corpus.texts("train").__next__
    )
    assert "hf://datasets/some/corpus/*.tar cannot be fetched (OfflineModeIsEnabled" in told
