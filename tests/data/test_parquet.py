"""Small files that unfold to gigabytes, by compression, repetition or claims: refused in bounded memory."""

import bz2
import gc
import gzip
import json
import lzma
import tarfile
import time
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet
import pytest
from corpora import wav

from sedtrain.data import parquet, tables
from sedtrain.data.folders import read_folder
from sedtrain.data.load_rows import load_rows
from sedtrain.data.parts import Part
from sedtrain.data.readers import read_rows
from sedtrain.data.source import Columns, Source
from sedtrain.data.tables import PROBLEM
from sedtrain.errors import UserError

SOURCE = Source("data", Columns("audio", "text"), {})

FIRST = "this file would fill memory and disk: of "


def repeated(cell, times):
    """A column that stores a cell once."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), pa.array([cell]))


def bomb(path, column, **options):
    table = pa.table({"audio": pa.nulls(len(column), pa.string()), "text": column})
    pyarrow.parquet.write_table(table, path, compression="zstd", store_schema=False, **options)
    return path


@contextmanager
def within(num_bytes):
    """Arrow holds no more than so many bytes beside those that it holds already."""
    gc.collect()
    pool = pa.default_memory_pool()
    limit = max(pool.max_memory(), pool.bytes_allocated() + num_bytes)
    yield
    assert pool.max_memory() <= limit


def refusal(path, call, *arguments):
    with within(400_000_000), pytest.raises(UserError) as caught:
        call(*arguments)
    assert (caught.value.option, caught.value.value) == ("data.path", str(path))
    assert caught.value.write == "write data.path=FILE from a source that you trust"
    return caught.value.wrong


@pytest.mark.parametrize(
    ("cell", "times", "options", "of"),
    [
        ("x" * 3_000_000, 1000, {}, "its rows, "),
        ("x" * 3_000_000, 1000, {"row_group_size": 10}, "its rows, "),
        ("x" * 20_000, 200_000, {}, "its rows, "),
        ("x" * 100_000_000, 1, {"use_dictionary": False}, "row group 0, column text, "),
        ("x", 5_000_000, {}, "its rows, "),
        (b"x" * 3_000_000, 1000, {}, "its rows, "),
    ],
)
def test_a_few_bytes_that_stand_for_gigabytes_are_refused(tmp_path, cell, times, options, of):
    path = bomb(tmp_path / "train.parquet", repeated(cell, times), **options)
    assert path.stat().st_size < 100_000
    assert refusal(path, load_rows, str(path), "train").startswith(FIRST + of)
    refusal(path, read_rows, path, tmp_path / "cache")
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] in ([".lock"], [])


def test_a_folder_with_a_card_like_one_of_the_hub_is_within_the_same_limits(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - {split: train, path: 0.parquet}\n---\n"
    )
    path = bomb(tmp_path / "0.parquet", repeated("x" * 3_000_000, 1000))
    assert refusal(path, load_rows, str(tmp_path), "train", "en").startswith(FIRST + "its rows, ")


def test_lists_and_shared_beginnings_unfold_too(tmp_path):
    lists = pa.ListArray.from_arrays(pa.array([0, 50_000_000]), pa.nulls(50_000_000, pa.int8()))
    path = bomb(tmp_path / "lists.parquet", lists)
    assert refusal(path, load_rows, str(path), "train").startswith(FIRST + "row group 0, column text.list.")
    texts = pa.array(["x" * 3_000_000] * 150)
    path = bomb(tmp_path / "delta.parquet", texts, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"})
    assert path.stat().st_size < 100_000
    assert refusal(path, load_rows, str(path), "train").startswith(FIRST + "its rows, ")


def varint(number, num_bytes=0):
    """The zigzag integer of Thrift, filled up with zeros to so many bytes."""
    number, groups = 2 * number, []
    while number or len(groups) < max(1, num_bytes):
        groups.append(number & 127)
        number >>= 7
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


def claim(path, facts):
    """Changes the metadata of a file, which say {true number: claim}; its pages stay as they are."""
    content = path.read_bytes()
    begin = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    footer = content[begin:]
    for fact, claimed in facts.items():
        assert varint(fact) in footer
        footer = footer.replace(varint(fact), varint(claimed, len(varint(fact))))
    path.write_bytes(content[:begin] + footer)
    pyarrow.parquet.read_metadata(path)


def sizes(path):
    group = pyarrow.parquet.read_metadata(path).row_group(0)
    return {group.column(1).total_uncompressed_size: 1000, group.total_byte_size: 1000}


def test_metadata_that_claim_less_than_the_pages_hold_are_not_believed(tmp_path):
    path = bomb(tmp_path / "text.parquet", pa.array(["x" * 100_000_000]), use_dictionary=False)
    claim(path, sizes(path))
    assert pyarrow.parquet.read_metadata(path).row_group(0).column(1).total_uncompressed_size == 1000
    assert refusal(path, load_rows, str(path), "train").startswith(FIRST + "row group 0, column text, ")
    lists = pa.ListArray.from_arrays(pa.array([0, 50_000_000]), pa.nulls(50_000_000, pa.int8()))
    path = bomb(tmp_path / "lists.parquet", lists)
    claim(path, {50_000_000: 1})
    assert refusal(path, load_rows, str(path), "train").startswith(FIRST + "row group 0, column text.list.")
    path = bomb(tmp_path / "repeated.parquet", repeated("x" * 3_000_000, 200))
    encodings, plain = (bytes([0, 6, last, 0x19, 0x18, 4]) + b"text" for last in (2 * 8, 0))
    path.write_bytes(path.read_bytes().replace(encodings, plain))
    assert set(pyarrow.parquet.read_metadata(path).row_group(0).column(1).encodings) <= {"PLAIN", "RLE"}
    assert refusal(path, load_rows, str(path), "train").startswith(FIRST + "its rows, ")


def test_many_columns_that_unfold_are_refused_together(tmp_path):
    path = tmp_path / "train.parquet"
    table = pa.table({"text": ["x" * 20_000_000]} | {f"c{n}": ["y" * 20_000_000] for n in range(8)})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    assert refusal(path, load_rows, str(path), "train").startswith(FIRST + "row group 0, ")


HEADERS = [b"", b"\x15\x00", b"\x15\x00\x15\x00\x15\x01\x00", b"\x1c" * 100, b"\x19\x00", b"\xff" * 100]


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_a_page_with_a_header_that_no_writer_makes_breaks_its_row_group(tmp_path, header):
    path = bomb(tmp_path / "train.parquet", pa.array([f"text {number}" for number in range(100)]))
    chunk = pyarrow.parquet.read_metadata(path).row_group(0).column(1)
    content = bytearray(path.read_bytes())
    content[chunk.dictionary_page_offset : chunk.dictionary_page_offset + 100] = header.ljust(100, b"\x15")
    path.write_bytes(content)
    [wrong] = set(read_rows(path)[PROBLEM])
    assert wrong.startswith("broken Parquet: row group 0, a page has ")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_packed_manifest_that_unfolds_to_far_more_than_texts_do_is_refused(tmp_path, monkeypatch, compress):
    suffix = {"gzip": "gz", "bz2": "bz2", "lzma": "xz"}[compress.__module__]
    monkeypatch.setattr(parquet, "MEMORY", 2**20)
    line = json.dumps({"audio": "a.wav", "text": "one"}) + "\n"
    path = tmp_path / f"train.jsonl.{suffix}"
    path.write_bytes(compress(line.encode() * 2000))
    assert len(load_rows(str(tmp_path), "train")) == 2000
    path.write_bytes(compress((line + " " * 5_000_000).encode()))
    with pytest.raises(UserError) as caught:
        load_rows(str(tmp_path), "train")
    assert caught.value.wrong.startswith(FIRST + "all of it, ")


def test_a_saved_dataset_of_endless_lists_is_refused(tmp_path):
    (tmp_path / "state.json").write_text("[" * 100_000)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="maximum recursion depth"):
        load_rows(str(tmp_path), "train")


@pytest.mark.parametrize("lines", [["a"] * 3000, ["".join(map(chr, range(97, 123)))]], ids=["in many rows", "in one"])
def test_a_manifest_of_thousands_of_columns_is_refused(tmp_path, lines):
    names = iter(range(99_999))
    rows = [{f"{letter}{next(names)}": 1 for letter in line * (1 if len(lines) > 1 else 100)} for line in lines]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="it has more than 1,000 columns"):
        load_rows(str(tmp_path), "train")


def test_texts_of_a_stream_are_read_a_few_at_a_time(tmp_path):
    path = bomb(tmp_path / "train.parquet", repeated("x" * 3_000_000, 150))
    texts = Part(SOURCE, "train", str(path), tmp_path / "copies").texts("text")
    with within(400_000_000):
        assert sum(map(len, texts)) == 450_000_000
    giant = bomb(tmp_path / "giant.parquet", pa.array(["x" * 100_000_000]), use_dictionary=False)
    stream = Part(SOURCE, "giant", str(giant), tmp_path / "copies").texts("text")
    assert refusal(giant, list, stream).startswith(FIRST + "row group 0, column text, ")


def test_what_is_truly_large_or_the_same_in_each_row_is_read(tmp_path):
    path = tmp_path / "train.parquet"
    noise = [wav(2.0, seed) for seed in range(30)]
    pyarrow.parquet.write_table(pa.table({"audio": noise, "text": ["yes"] * 30, "n": [[1, 2]] * 30}), path)
    assert read_rows(path)["audio"][:] == noise
    bomb(path, repeated("yes", 1_000_000))
    assert len(read_rows(path)) == 1_000_000


def test_rows_that_a_broken_group_only_claims_fill_no_memory(tmp_path, monkeypatch):
    path = bomb(tmp_path / "train.parquet", repeated("yes", 100))
    schema = pyarrow.parquet.read_schema(path)

    class Claims:
        __enter__, __exit__ = lambda self: self, lambda *_: None
        num_row_groups, schema_arrow = 1, schema
        metadata = property(lambda self: self)
        row_group = property(lambda self: lambda number: self)
        num_rows, num_columns = 10**13, 0

        def iter_batches(self, *_, **__):
            raise OSError("torn")

    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", lambda path: Claims())
    begin = time.monotonic()
    assert refusal(path, read_rows, path).startswith(FIRST + "its rows, ")
    assert time.monotonic() - begin < 60


@pytest.fixture
def small_texts(monkeypatch):
    """A limit of 1,000 bytes in place of megabytes."""
    for module in ("tables", "folders", "readers"):
        monkeypatch.setattr(f"sedtrain.data.{module}.MAX_TEXT_BYTES", 1000)


def problems(rows):
    return [each[:40] if each else each for each in rows[PROBLEM][:]]


def test_a_giant_line_or_text_costs_its_own_row_alone(tmp_path, small_texts):
    giant = "x" * 2500
    (tmp_path / "a.jsonl").write_text(f'{{"text": "one"}}\n{{"text": "{giant}"}}\n{{"text": "three"}}\n')
    rows = read_rows(tmp_path / "a.jsonl")
    assert (rows["text"][:], problems(rows)) == (["one", None, "three"], [None, "text too large: line 2", None])
    (tmp_path / "a.csv").write_text("audio,text\na.wav,one\n" + "b.wav,x\u00e9," * 400 + "\nc.wav,three\n")
    assert read_rows(tmp_path / "a.csv")["text"][:][:1] == ["one"]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in {
            "a.txt": b"one",
            "b.txt": giant.encode(),
            "c.json": b'{"n": "' + giant.encode() + b'"}',
        }.items():
            (tmp_path / name).write_bytes(content)
            tar.add(tmp_path / name, name)
    assert problems(read_rows(tmp_path / "a.tar")) == [None, "text too large: b.txt", "text too large: c.json"]


def test_a_giant_transcript_costs_its_own_row_alone(tmp_path, small_texts):
    for name, text in {"a": "one", "b": "x" * 2500}.items():
        (tmp_path / f"{name}.wav").write_bytes(wav(0.3))
        (tmp_path / f"{name}.txt").write_text(text)
    rows = read_folder(tmp_path)
    assert (rows["text"][:], problems(rows)) == (["one", None], [None, "text too large: b.txt"])
    (tmp_path / "x.trans.txt").write_text("a one\r\nb " + "x" * 2500 + "\nb two\n")
    rows = read_folder(tmp_path)
    assert (rows["text"][:], problems(rows)) == (
        ["one", None, "two"],
        [None, "text too large: x.trans.txt, line 2", None],
    )


def test_lines_are_those_of_the_file_as_long_as_they_are_small(tmp_path, small_texts):
    path = tmp_path / "lines"
    path.write_bytes(b"a\n\n" + b"b" * 999 + b"\n" + b"c" * 1000 + b"\nd")
    with path.open("rb") as file:
        assert list(tables.lines_of(file)) == [b"a\n", b"\n", b"b" * 999 + b"\n", None, b"d"]
