"""Any table that is written as separated values is read back as it was written, or refused by name."""

import csv
import io
import json

import pandas
import pyarrow.parquet
import pytest
from corpora import COLUMNS, data_module, known, refused, utterance_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from sedtrain.data.load_rows import load_rows
from sedtrain.data.readers import read_rows
from sedtrain.data.separated import read_separated
from sedtrain.data.source import Columns
from sedtrain.data.tables import PROBLEM, BrokenFile

NAMES = ["audio", "text", "id"]
CHARACTERS = st.sampled_from([*"ab0 .,;|'\"-é€", "\t", "\n", "\u2028", "\x85", "\x0b", "\ufeff", "字"])
CELLS = st.one_of(
    st.sampled_from(["007", "1e5", "NA", "null", "None", "true", "nan", "-0", "1,5", '"', '""', 'say "no"', '"no," he said']),
    st.text(CHARACTERS, min_size=1, max_size=12),
)  # fmt: skip
TABLES = st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=5)
QUOTING = st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])


def by_csv(rows, delimiter, quoting, end):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writerows([NAMES, *rows])
    return file.getvalue()


def by_pandas(rows, delimiter, quoting, end):
    frame = pandas.DataFrame(rows, columns=NAMES)
    return frame.to_csv(index=False, sep=delimiter, quoting=quoting, lineterminator=end)


def by_office(rows, delimiter, quoting, end):
    """LibreOffice quotes every text where asked to, else those that need it, and writes a mark of byte order."""
    return "\ufeff" + by_csv(rows, delimiter, quoting, end)


WRITERS = st.sampled_from([by_csv, by_pandas, by_office])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


@settings(max_examples=400)
@given(rows=TABLES, write=WRITERS, quoting=QUOTING, end=st.sampled_from(["\n", "\r\n"]))
def test_a_csv_is_read_as_it_was_written_or_refused(folder, rows, write, quoting, end):
    file = folder / "x.csv"
    file.write_bytes(write(rows, ",", quoting, end).encode())
    found = next(read_separated(file, ",")).to_pylist()
    assert [tuple(row.values()) for row in found] == rows or any(row.get(PROBLEM) for row in found)
    if not any("\n" in cell for row in rows for cell in row):
        assert [tuple(row.values()) for row in found] == rows


@settings(max_examples=400)
@given(rows=TABLES, write=WRITERS, quoting=QUOTING, end=st.sampled_from(["\n", "\r\n"]))
def test_a_tsv_with_quotes_is_read_as_it_was_written(folder, rows, write, quoting, end):
    """Where a text breaks lines and has tabs too, the two ways of writing it cannot be told apart."""
    rows = [tuple(cell.replace("\n", " ") for cell in row) for row in rows]
    file = folder / "x.tsv"
    file.write_bytes(write(rows, "\t", quoting, end).encode())
    assert [tuple(row.values()) for row in next(read_separated(file, "\t")).to_pylist()] == rows


@settings(max_examples=200)
@given(st.lists(st.tuples(*[st.text(st.characters(exclude_characters='\t\r\n"'), min_size=1)] * 3), min_size=1))
def test_a_tsv_without_quotes_is_read_as_it_was_written(folder, rows):
    rows = [tuple(cell.encode("utf-8", "replace").decode() for cell in row) for row in rows]
    file = folder / "plain.tsv"
    file.write_bytes("\n".join(map("\t".join, [NAMES, *rows])).encode())
    assert [tuple(row.values()) for row in next(read_separated(file, "\t")).to_pylist()] == rows


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ('"""Good-bye,"" said the boy."', '"Good-bye," said the boy.'),
        ('He said "no", and left', 'He said "no", and left'),
        ('"Yes," he said, "no"', '"Yes," he said, "no"'),
        ('"open', '"open'),
        ('"', '"'),
        ('"two\nlines"', "two\nlines"),
        ('"a\ttab"', "a\ttab"),
        ("'single'", "'single'"),
    ],
)
def test_both_ways_of_writing_tsv_are_told_apart_by_cell(tmp_path, written, text):
    (tmp_path / "x.tsv").write_text(f"audio\ttext\na\t{written}\nb\tplain words\n")
    rows = next(read_separated(tmp_path / "x.tsv", "\t")).to_pylist()
    assert [row["text"] for row in rows] == [text, "plain words"]


def test_lines_that_break_a_cell_are_rows_where_they_look_like_rows(tmp_path):
    (tmp_path / "x.csv").write_text('audio,text,n\na,"one\ntwo",1\nb,"open,2\nc,three,3\nd,"four",4\n')
    *rows, last = next(read_separated(tmp_path / "x.csv", ",")).to_pylist()
    assert [(row["text"], row[PROBLEM]) for row in rows] == [
        ("one\ntwo", None),
        (None, "broken CSV: line 4, a quotation mark that is never closed"),
        ("three", None),
    ]
    assert last["text"] == "four"


def test_what_is_wrong_with_a_line_is_told_with_its_number(tmp_path):
    (tmp_path / "x.csv").write_text('a,b\n1,"x" y\n\n1,2,3\n"1\n')
    rows = next(read_separated(tmp_path / "x.csv", ",")).to_pylist()
    assert [row[PROBLEM].removeprefix("broken CSV: ") for row in rows] == [
        "line 2, text behind a closing quotation mark",
        "line 4 has 3 cells, the header 2",
        "line 5, a quotation mark that is never closed",
    ]


OTHER = {
    "semicolons.csv": ("audio;text\na;b\n", "its columns are separated by semicolons, not by commas"),
    "decimals.csv": ("audio;text;n\na;b;1,5\n", "its columns are separated by semicolons, not by commas"),
    "tabs.csv": ("audio\ttext\na\tb\n", "its columns are separated by tabs, not by commas"),
    "lj.csv": ("LJ001-0001|Printing, in 1850|Printing\n", "its columns are separated by |, not by commas"),
    "commas.tsv": ("audio,text\na,b\n", "its columns are separated by commas, not by tabs"),
    "excel.csv": ("sep=;\naudio;text\n", "its columns are separated by semicolons, not by commas"),
    "twice.csv": ("audio,text,text\na,b,c\n", "two columns are called 'text'"),
    "twice.tsv": ("text\taudio\ttext\na\tb\tc\n", "two columns are called 'text'"),
    "utf16.csv": ("audio,text\na,b\n".encode("utf-16"), "its text is UTF-16 or UTF-32, not UTF-8"),
    "utf16.tsv": ("audio\ttext\na\tb\n".encode("utf-16-be"), "its text is UTF-16 or UTF-32, not UTF-8"),
    "utf32.csv": ("audio,text\na,b\n".encode("utf-32"), "its text is UTF-16 or UTF-32, not UTF-8"),
    "utf16.jsonl": ('{"audio": "a", "text": "b"}'.encode("utf-16"), "its text is UTF-16 or UTF-32, not UTF-8"),
    "utf16.json": ('[{"audio": "a", "text": "b"}]'.encode("utf-16-le"), "its text is UTF-16 or UTF-32, not UTF-8"),
}


@pytest.mark.parametrize("name", OTHER)
def test_what_is_no_such_file_is_named_for_what_it_is(tmp_path, name):
    content, wrong = OTHER[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BrokenFile) as raised:
        read_rows(tmp_path / name)
    assert str(raised.value) == wrong
    told = refused(load_rows, str(tmp_path / name), "train")
    assert f"split 'train': {tmp_path / name}: {wrong}\n    write " in told
    assert PROBLEM not in told


def test_two_columns_of_one_name_in_parquet_are_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["audio", "text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    told = refused(load_rows, str(tmp_path / "x.parquet"), "train")
    assert f"{tmp_path}/x.parquet: two columns are called 'text'\n    write columns of different names" in told


def test_a_space_in_the_name_of_a_column_is_shown(tmp_path):
    (tmp_path / "x.csv").write_text("audio, text\na.wav, one\n")
    told = refused(utterance_rows, read_rows(tmp_path / "x.csv"), Columns("audio", "text"), "x.csv", "train")
    assert "x.csv (train) has no column 'text' for the text, it has audio, ' text'\n" in told


def test_columns_without_a_name_are_left_out(tmp_path):
    (tmp_path / "x.csv").write_text(",audio,text,,\n0,a,b,,\n")
    assert read_rows(tmp_path / "x.csv").column_names == ["audio", "text"]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("train.csv", "audio,text\na\nb\n", "2 broken CSV"),
        ("train.json", '{"audio": "a",\n"text": "one"}\n', "2 broken JSON"),
        ("train.jsonl", "[1]\n2\n", "2 broken JSON"),
        ("train.csv", b"audio,text\na,caf\xe9\nb,\xe9\n", "2 text that is not UTF-8"),
    ],
)
def test_a_file_without_a_line_that_can_be_read_is_told_the_reason_and_no_missing_column(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    told = refused(data_module(tmp_path, columns={**COLUMNS, "translation": None}).corpus.kept, "train")
    assert f"none of the 2 utterances of 'train' can be used ({what})" in told


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.jsonl", "x.json"])
def test_text_and_ids_that_look_like_something_else_are_text(tmp_path, name):
    texts = ["007", "1e5", "NA", "null", "None", "true", "nan", "2020-01-01", "1.50", "0x1F", "-", "1_000"]
    for cells in ([text] for text in texts):
        rows = [{"audio": "a.wav", "text": cell, "id": cell} for cell in cells]
        if "json" in name:
            (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        else:
            pandas.DataFrame(rows).to_csv(tmp_path / name, index=False, sep="\t" if "tsv" in name else ",")
        found = utterance_rows(read_rows(tmp_path / name), Columns("audio", "text", id="id"), str(tmp_path), "train")
        assert (found.texts(), list(found.ids())) == (cells, cells)


def test_numbers_and_truth_in_json_are_text_as_json_writes_them(tmp_path):
    cells = [7, 2.5, True, False, -3, 12345678901234567890, None]
    for several in (cells, cells[:2], cells[:1], cells[2:4]):
        (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"audio": "a", "text": cell}) for cell in several))
        found = utterance_rows(read_rows(tmp_path / "x.jsonl"), Columns("audio", "text"), str(tmp_path), "train")
        assert found.texts() == ["" if cell is None else json.dumps(cell) for cell in several]


def test_two_values_of_one_name_in_json_are_a_problem_of_their_row(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"audio": "a", "text": "one", "text": 0.9}\n{"audio": "b", "text": "two"}\n')
    first, second = read_rows(tmp_path / "x.jsonl")[PROBLEM]
    assert (first, second) == ("broken JSON: line 1, two values are called 'text'", None)


@pytest.mark.parametrize(
    ("cell", "seconds"), [("1.5", 1.5), ("1e1", 10.0), ("", None), ("NaN", None), ("2", 2.0), ("1e9", 1e9)]
)
def test_seconds_of_a_csv_are_read_as_numbers(tmp_path, cell, seconds):
    (tmp_path / "x.csv").write_text(f"audio,text,n\na,one,{cell}\nb,two,1\n")
    columns = Columns("audio", "text", seconds="n")
    assert known(utterance_rows(read_rows(tmp_path / "x.csv"), columns, str(tmp_path), "train").declared()) == [
        seconds,
        1.0,
    ]


@pytest.mark.parametrize("cell", ["long", "1,5", "inf", "-1", "1e308", "1e999", "1_000"])
def test_what_is_no_time_is_a_fault_of_its_row(tmp_path, cell):
    (tmp_path / "x.csv").write_text(f'audio,text,n\na,one,"{cell}"\nb,two,1\n')
    columns = Columns("audio", "text", seconds="n")
    rows = utterance_rows(read_rows(tmp_path / "x.csv"), columns, str(tmp_path), "train")
    assert rows.problem(0, None) == ("impossible time", f"n = {cell}")
    assert known(rows.declared()) == [None, 1.0]


@pytest.mark.parametrize("cells", ["\n", "1,\n2,\n", ",\n,\n"])
def test_a_column_of_seconds_may_be_empty(tmp_path, cells):
    (tmp_path / "x.csv").write_text(f"text,n\n{cells}")
    rows = read_rows(tmp_path / "x.csv").add_column("audio", ["a.wav"] * cells.count(","))
    found = utterance_rows(rows, Columns("audio", "text", seconds="n"), str(tmp_path), "train")
    assert known(found.declared()) == [None] * cells.count(",")
