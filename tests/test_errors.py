"""One kind of error: how it reads, alone and with others."""

import pickle

import pytest

from sedtrain.errors import UserError


def test_a_single_mistake_tells_option_value_what_is_wrong_and_what_to_write():
    error = UserError("seed", True, "expected int", "write seed=1")
    assert str(error) == "1 problem:\n\n  seed = true\n    expected int\n    write seed=1"
    assert error.errors == (error,)


def test_several_are_printed_as_one():
    errors = [
        UserError("encoder.widht", 144, "load has no option 'widht'", "did you mean 'width'?"),
        UserError("trainer.max_steps", "many", "expected int", "write a whole number"),
        UserError("data.folder", "???", "no value is given", "write data.folder=VALUE"),
        UserError("adapter", None, "two lines\nof text", "write adapter=VALUE"),
    ]
    assert str(UserError.all_of(errors)) == (
        "4 problems:\n"
        "\n"
        "  encoder.widht = 144\n"
        "    load has no option 'widht'\n"
        "    did you mean 'width'?\n"
        "\n"
        "  trainer.max_steps = 'many'\n"
        "    expected int\n"
        "    write a whole number\n"
        "\n"
        "  data.folder = ???\n"
        "    no value is given\n"
        "    write data.folder=VALUE\n"
        "\n"
        "  adapter = null\n"
        "    two lines\n"
        "    of text\n"
        "    write adapter=VALUE"
    )


def test_errors_of_several_are_joined_and_equal_ones_reported_once():
    first, again, other = (UserError("seed", value, "wrong", "write seed=1") for value in ("a", "a", "b"))
    joined = UserError.all_of([UserError.all_of([first, other]), again])
    assert [each.value for each in joined.errors] == ["a", "b"]


def test_a_long_value_is_cut_to_one_line():
    line = UserError("audio", ["a.wav"] * 100, "", "").entry().splitlines()[0]
    assert line.endswith("...")
    assert len(line) < 120


def test_it_travels_between_processes():
    joined = UserError.all_of([UserError("seed", value, "wrong", "write seed=1") for value in (-1, -2)])
    with pytest.raises(UserError, match="2 problems"):
        raise pickle.loads(pickle.dumps(joined))
