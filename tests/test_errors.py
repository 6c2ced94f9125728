"""One kind of error: how it reads, alone and with others."""

import pickle
import subprocess
import sys

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


@pytest.mark.parametrize(
    ("option", "write", "in_python"),
    [
        ("encoder.options.layerdrop", "write encoder.options.layerdrop=0",
         "encoder_layerdrop = 3\n    write encoder_layerdrop=0"),
        ("decoder.options", "write decoder.options.NAME=VALUE", "options = 3\n    write decoder_NAME=VALUE"),
        ("encoder.attention", "write encoder.attention=sdpa, or attention=auto, the best",
         "encoder_attn_implementation = 3\n    write encoder_attn_implementation='sdpa', or attention='auto', the best"),
        ("adapter.stride", "write adapter.stride=2, and adapter.num_layers for a lower rate",
         "stride = 3\n    write stride=2, and num_layers for a lower rate"),
        ("checkpoint", "write checkpoint=model.base() of a model, or checkpoint=runs/a.",
         "checkpoint = 3\n    write checkpoint=model.base() of a model, or checkpoint='runs/a'."),
        ("data.path", "write data.path=FILE, data.streaming=false or data.target=translation, not '/tmp/data.csv'",
         "path = 3\n    write path=FILE, streaming=False or target='translation', not '/tmp/data.csv'"),
    ],
)  # fmt: skip
def test_python_is_told_its_own_names_and_the_command_line_the_options(monkeypatch, option, write, in_python):
    error = UserError(option, 3, "", write)
    assert str(error) == f"1 problem:\n\n  {option} = 3\n    {write}"
    monkeypatch.setattr(UserError, "on_command_line", False)
    assert str(error) == f"1 problem:\n\n  {in_python}"


def test_messages_speak_python_until_the_command_line_says_otherwise():
    program = "from sedtrain.errors import UserError; print(UserError('data.path', None, 'wrong', 'write data.path=A'))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout == "1 problem:\n\n  path = None\n    wrong\n    write path=A\n"
