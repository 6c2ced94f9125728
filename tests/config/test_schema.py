"""Problems found in composed configurations, and how they read."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from told import Problem, told

from sedtrain.annotations import example
from sedtrain.config.check import find_problems
from sedtrain.config.schema import Config, conf_dir

MODULE = """
from typing import Literal
def load(size: str, width: int = 3, *, rate: float | None = None, kind: Literal["gelu", "relu"] = "gelu",
         layers: list[int] = (), masked: bool = True): ...
def open_ended(first, **options): ...
"""


@pytest.fixture(autouse=True)
def user_module(tmp_path, monkeypatch):
    (tmp_path / "user_config_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def problems(encoder, **root):
    return told(find_problems(OmegaConf.create({"encoder": encoder, **root})))


def target(name="load", **options):
    return {"_target_": f"user_config_module.{name}", **options}


def test_a_configuration_that_works_has_no_problem():
    node = target(size="tiny", width=4, rate=1, layers=[1, 2], _convert_="all")
    assert problems(node, task="transcribe", seed=0, size="tiny", checkpoint="a", audio=["a.wav"]) == []


def test_an_unknown_option_is_met_with_the_close_one_and_all_others():
    write = "did you mean 'width'? available: size, width, rate, kind, layers, masked"
    expected = Problem("encoder.widht", 4, "load has no option 'widht'", write)
    assert problems(target(size="tiny", widht=4)) == [expected]


def test_a_target_with_keyword_arguments_takes_any_option():
    assert problems(target("open_ended", first=1, anything=2)) == []


def test_a_missing_option_is_named_except_where_the_rest_comes_later():
    expected = Problem("encoder.size", "???", "load needs 'size'", "write encoder.size=VALUE")
    assert problems(target()) == [expected]
    assert problems(target(_partial_=True)) == []
    assert problems(target(_args_=["tiny"])) == []


@pytest.mark.parametrize(
    ("option", "value", "wrong", "write"),
    [
        ("width", "many", "expected int", "write a whole number, e.g. encoder.width=1000"),
        ("width", 2e4, "expected int", "write a whole number, e.g. encoder.width=20000"),
        ("rate", "fast", "expected float | None", "write a number, e.g. encoder.rate=0.1"),
        ("masked", 1, "expected bool", "write encoder.masked=true or encoder.masked=false"),
        ("layers", 3, "expected list[int]", "write a list, e.g. 'encoder.layers=[first,second]'"),
        ("kind", "rlu", "expected Literal['gelu', 'relu']", "did you mean 'relu'? available: gelu, relu"),
        ("size", 3, "expected str", "write it in quotes: 'encoder.size=\"3\"'"),
    ],
)
def test_a_value_that_does_not_fit_is_told_what_would(option, value, wrong, write):
    assert problems(target(**{"size": "tiny", option: value})) == [Problem(f"encoder.{option}", value, wrong, write)]


def test_every_node_is_checked_at_any_depth():
    deep = {"parts": [{"inner": target(size="tiny", widht=1)}]}
    assert [each.option for each in problems(deep)] == ["encoder.parts[0].inner.widht"]
    nested = target(size="tiny", rate=target("open_ended", first=target(siz=1)))
    assert [each.option for each in problems(nested)] == ["encoder.rate.first.siz", "encoder.rate.first.size"]


def test_a_target_that_does_not_exist_is_a_problem_at_its_node():
    expected = Problem(
        "encoder._target_",
        "user_config_module.laod",
        "user_config_module has no 'laod'",
        "did you mean 'load'? available: Literal, load, open_ended",
    )
    assert problems({"_target_": "user_config_module.laod"}) == [expected]
    assert problems({"_target_": 3})[0].wrong == "expected a dotted name, not 3"


def test_a_value_left_open_is_named_once():
    expected = Problem("encoder.size", "???", "no value is given", "write encoder.size=VALUE")
    assert problems(target(size="???", width="${width}"), width=3) == [expected]
    assert problems({"size": "${encoder.width}", "width": "???"}) == [
        Problem("encoder.width", "???", "no value is given", "write encoder.width=VALUE")
    ]


def test_a_reference_to_nothing_is_a_problem():
    write = "write a value, or refer to a key that has one"
    expected = Problem("encoder.size", "${sizee}", "this reference fails: Interpolation key 'sizee' not found", write)
    assert problems(target(size="${sizee}")) == [expected]
    circle = problems({"a": "${encoder.b}", "b": "${encoder.a}"})
    assert [each.wrong for each in circle] == ["this reference fails: Recursive interpolation detected"] * 2


def test_a_value_is_checked_through_its_reference():
    found = problems(target(size="tiny", width="${seed_text}"), seed_text="many")
    assert [(each.option, each.value) for each in found] == [("encoder.width", "many")]


def test_root_values_are_checked_by_type_and_by_choice():
    found = problems(None, task="evalute", size="huge", seed="abc", checkpoint=None, pretrained=True)
    assert found == [
        Problem(
            "task",
            "evalute",
            "task has no option 'evalute'",
            "did you mean 'evaluate'? available: train, evaluate, transcribe, serve, compare, export, inspect, fit_batches",
        ),
        Problem("seed", "abc", "expected a whole number from 0 to 4294967295", "write a whole number, e.g. seed=1"),
        Problem("size", "huge", "size has no option 'huge'", "available: tiny, base, large"),
    ]


def test_the_typed_root_needs_only_a_folder_to_run_in():
    assert [each.option for each in find_problems(OmegaConf.structured(Config))] == ["run_dir"]
    assert find_problems(OmegaConf.structured(Config(run_dir="runs/a"))) == []


def test_hydras_own_node_is_left_to_hydra():
    assert problems(None, hydra={"launcher": {"_target_": "no.such.Launcher"}}) == []


def test_an_example_for_an_unknown_annotation_promises_nothing():
    assert example("data.source", "") == "write data.source=VALUE"
    assert example("data.columns", "dict[str, int]") == "write named values, e.g. 'data.columns={first: 1}'"


def test_option_files_lie_in_the_package_or_beside_it(monkeypatch, tmp_path):
    package = tmp_path / "sedtrain"
    package.mkdir()
    monkeypatch.setattr("sedtrain.config.schema.__file__", str(package / "config/schema.py"))
    assert conf_dir() == tmp_path / "conf"
    (package / "conf").mkdir()
    assert conf_dir() == package / "conf"


def test_the_check_imports_neither_torch_nor_hydra():
    program = "import sys, sedtrain.config.schema; assert not {'torch', 'hydra', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
