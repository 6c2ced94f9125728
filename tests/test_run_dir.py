"""A file is written whole or not at all."""

import pytest

from sedtrain.run_dir import write_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", ["new, ü\n", lambda file: file.write("new, ü\n".encode())])
def test_text_or_what_a_function_writes_takes_the_place_of_the_file(tmp_path, content):
    (tmp_path / "file.unfinished").write_text("much longer, from a run that was killed")
    (tmp_path / "file").write_text("old")
    write_whole(tmp_path / "file", content, keep=tmp_path / "before")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "new, ü\n"
    assert (tmp_path / "before").read_text() == "old"
    assert names(tmp_path) == ["before", "file"]


def test_where_writing_raises_the_old_file_stays_and_no_other(tmp_path):
    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", interrupted, keep=tmp_path / "before")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"
