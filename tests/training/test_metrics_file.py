"""metrics.csv over restarts."""

import csv

import pytest

from sedtrain.errors import UserError
from sedtrain.evaluation.report import learning_curves
from sedtrain.training.loggers import MetricsFile
from sedtrain.training.tracking import Tracker


def metrics_file(folder):
    return MetricsFile(folder)


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def test_a_run_that_goes_on_keeps_the_rows_before_its_checkpoint_and_adds_to_them(tmp_path):
    first = metrics_file(tmp_path)
    for step in range(3):
        first.log_metrics({"loss": step / 2}, step)
    first.log_metrics({"wer": 0.5}, 2)
    first.save()
    again = metrics_file(tmp_path)
    again.keep_before(2)
    again.log_metrics({"loss": 7.0, "norm": 1.0}, 2)
    again.save()
    assert rows(tmp_path) == [
        {"step": "0", "loss": "0.0"}, {"step": "1", "loss": "0.5"}, {"step": "2", "loss": "7.0", "norm": "1.0"}
    ]  # fmt: skip


def test_a_line_that_was_cut_is_dropped(tmp_path):
    first = metrics_file(tmp_path)
    for step in (1, 12):
        first.log_metrics({"loss": 0.5}, step)
    first.save()
    file = tmp_path / "metrics.csv"
    file.write_text(file.read_text().removesuffix("2\n"))  # step 12 has become 1
    metrics_file(tmp_path).keep_before(5)
    assert rows(tmp_path) == [{"step": "1", "loss": "0.5"}]


def test_nothing_is_kept_where_nothing_was(tmp_path):
    metrics_file(tmp_path).keep_before(5)
    assert not (tmp_path / "metrics.csv").exists()


NO_TABLES = {
    "no UTF-8": b"loss,step\n\xff,1\n\n",
    "no number": b"loss,step\nmuch,1\n\n",
    "no step": b"loss,step\n1,one\n\n",
    "no column of steps": b"loss\n1\n\n",
    "NUL": b"a\0\n1\n\n",
}


@pytest.mark.parametrize("content", NO_TABLES.values(), ids=NO_TABLES)
def test_a_file_that_is_no_table_is_refused_before_training_and_left_out_of_the_page(tmp_path, content):
    file = tmp_path / "metrics.csv"
    file.write_bytes(content)
    with pytest.raises(UserError, match="in this folder is no table of metrics: ") as caught:
        Tracker("csv", lambda: metrics_file(tmp_path))
    assert (caught.value.option, caught.value.value) == ("run_dir", str(tmp_path))
    assert caught.value.write == "remove that file, or write run_dir=ANOTHER_FOLDER"
    assert file.read_bytes() == content
    assert learning_curves(file) == ""
