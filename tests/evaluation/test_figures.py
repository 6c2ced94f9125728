import re

import matplotlib
import numpy as np
import pytest

from sedtrain.evaluation.html import INK, attention_figure, bars_figure, curves_figure, read_curves
from sedtrain.evaluation.statistics import Interval


def test_blank_cells_are_passed_over(tmp_path):
    log = tmp_path / "metrics.csv"
    log.write_text("epoch,step,val/wer,train/loss\n0,49,,2.5\n0,99,0.9,\n1,149,,nan\n")
    curves = read_curves(log)
    assert list(curves) == ["train/loss", "val/wer"]
    assert curves["val/wer"] == ([99], [0.9])
    assert curves["train/loss"][0] == [49, 149]


def test_a_line_cut_short_gives_what_it_holds(tmp_path):
    log = tmp_path / "metrics.csv"
    log.write_text("epoch,step,train/loss,val/wer\n0,49,2.5,0.9\n0,99,2.25")
    assert read_curves(log) == {"train/loss": ([49, 99], [2.5, 2.25]), "val/wer": ([49], [0.9])}


@pytest.mark.parametrize("number", [1, 5])
def test_every_curve_is_named_and_drawn(number):
    curves = {f"train/loss{each}": ([1, 2, 3], [3.0, 2.0, each]) for each in range(number)}
    svg = curves_figure("Loss", curves)
    assert all(name in svg for name in curves)
    assert len(re.findall(r"stroke-width: 1.5", svg)) >= number


def test_a_picture_of_long_audio_is_small_and_names_every_second_of_many_tokens():
    attention = np.random.default_rng(0).random((60, 1500), dtype=np.float32)
    svg = attention_figure("noise", [f"t{number}$" for number in range(60)], 30.0, attention, [(1.0, 2.0)] * 60)
    assert len(svg) < 60_000
    assert re.findall(r">(t\d+\$)<", svg) == [f"t{number}$" for number in range(0, 60, 2)]


def test_figures_take_the_ink_of_the_page_and_a_name_that_is_escaped():
    svg = bars_figure("<b>", ["1", "2–3"], [Interval(0.1, 0.05, 0.2), Interval(0.3, 0.2, 0.5)], "words")
    assert INK not in svg
    assert "currentColor" in svg
    assert "&lt;b&gt;" in svg
    assert "2–3" in svg


def test_the_same_numbers_give_the_same_figure():
    first, second = (curves_figure("Loss", {"train/loss": ([1, 2], [3.0, 2.0])}) for _ in range(2))
    assert first == second


def test_drawing_leaves_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    curves_figure("Loss", {"train/loss": ([1, 2], [3.0, 2.0])})
    assert dict(matplotlib.rcParams) == before
