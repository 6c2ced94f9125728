"""Bars for people."""

import io

import pytest

from sedtrain.terminal import with_progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "names", "is_shown", "bar"),
    [
        (Terminal(), "abc", True, True),
        (Terminal(), "a", True, False),
        (Terminal(), "abc", False, False),
        (io.StringIO(), "abc", True, False),
    ],
)
def test_a_bar_of_several_recordings_is_shown_on_a_terminal_in_standard_error_alone(
    monkeypatch, capsys, stream, names, is_shown, bar
):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", stream)
    assert list(with_progress(list(names), is_shown)) == list(names)
    assert ("transcribing" in stream.getvalue()) == bar
    assert capsys.readouterr().out == ""
