"""metrics.csv over restarts."""

import csv

from sedtrain.training.loggers import MetricsFile


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
