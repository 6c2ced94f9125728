"""A file is written whole or not at all."""

import errno
import subprocess
import sys

import filelock
import pytest

from sedtrain import run_dir
from sedtrain.errors import UserError
from sedtrain.run_dir import claim, write_whole

HOLDS = "import sys, time; from sedtrain.run_dir import *; lock = claim(Path(sys.argv[1])); print(flush=True); time.sleep(60)"


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


def test_a_folder_belongs_to_one_process_until_that_process_is_killed(tmp_path, monkeypatch):
    with subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        monkeypatch.setattr(run_dir, "LOCK_SECONDS", 0)
        with pytest.raises(UserError) as caught:
            claim(tmp_path)
        assert (caught.value.option, caught.value.value) == ("run_dir", str(tmp_path))
        assert caught.value.wrong == "another process is at work in this folder"
        assert caught.value.write == "write run_dir=ANOTHER_FOLDER, or wait until that process has ended"
        holder.kill()
    claim(tmp_path).release()


def test_a_disk_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def acquire(self):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    claim(tmp_path).release()
    assert f"run_dir={tmp_path}: this disk has no locks" in caplog.text
