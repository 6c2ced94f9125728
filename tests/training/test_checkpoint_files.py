"""Checkpoint files: whole or not there, verified, harmless."""

import errno
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sedtrain.errors import UserError
from sedtrain.training import checkpoint_files
from sedtrain.training.checkpoint_files import (
    CheckpointFiles,
    is_intact,
    newest_whole,
    read_checkpoint,
    set_aside_damaged,
    write_checkpoint,
)


def content(step):
    return {"global_step": step, "state_dict": {"weight": torch.full((1000,), float(step))}}


def step_of(path):
    return read_checkpoint(path)["global_step"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "best.ckpt"
    write_checkpoint(content(7), path)
    return path.read_bytes()


def test_what_is_written_is_read_again_by_us_and_by_torch_alone(tmp_path):
    path = tmp_path / "new" / "last.ckpt"
    write_checkpoint(content(7), path)
    for read in (read_checkpoint(path), torch.load(path, weights_only=True), torch.load(path, mmap=True)):
        assert read["global_step"] == 7
        assert torch.equal(read["state_dict"]["weight"], torch.full((1000,), 7.0))
    assert [each.name for each in path.parent.iterdir()] == ["last.ckpt"]


@given(place=st.integers(min_value=0), bit=st.integers(0, 7))
def test_any_bit_that_flips_is_found(tmp_path_factory, written, place, bit):
    damaged = bytearray(written)
    damaged[place % len(damaged)] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped.ckpt"
    path.write_bytes(damaged)
    assert not is_intact(path)


def test_a_whole_file_is_hashed_once_and_again_where_it_or_its_times_change(tmp_path, monkeypatch):
    hashed, path, has_digest = [], tmp_path / "last.ckpt", checkpoint_files.has_digest
    monkeypatch.setattr(checkpoint_files, "has_digest", lambda *given: hashed.append(1) or has_digest(*given))
    write_checkpoint(content(7), path)
    assert is_intact(path) and step_of(path) == 7 and read_checkpoint(path, mapped=True)["global_step"] == 7
    assert len(hashed) == 1
    facts, damaged = path.stat(), bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 10**6))
    assert path.stat().st_size == facts.st_size and not is_intact(path) and not is_intact(path)
    assert len(hashed) == 3  # a damaged file is not remembered
    write_checkpoint(content(8), path)
    assert is_intact(path) and step_of(path) == 8 and len(hashed) == 4


def test_a_mapped_checkpoint_holds_the_same_tensors(tmp_path):
    path = tmp_path / "best.ckpt"
    write_checkpoint(content(7), path)
    weight = read_checkpoint(path, mapped=True)["state_dict"]["weight"]
    path.unlink()  # the mapped file stays readable
    assert torch.equal(weight, content(7)["state_dict"]["weight"])


@given(length=st.integers(min_value=0))
def test_a_file_cut_anywhere_is_found(tmp_path_factory, written, length):
    path = tmp_path_factory.getbasetemp() / "cut.ckpt"
    path.write_bytes(written[: length % len(written)])
    assert not is_intact(path)


def test_the_one_before_stays_and_stands_in_where_the_last_is_damaged_or_missing(tmp_path, caplog):
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    for step in (1, 2, 3):
        write_checkpoint(content(step), last)
    assert (step_of(last), step_of(previous)) == (3, 2)
    assert newest_whole(tmp_path) == last
    last.write_bytes(last.read_bytes()[:-1])
    assert newest_whole(tmp_path) == previous
    assert f"{last} is missing or damaged; continuing from previous.ckpt" in caplog.text
    last.unlink()  # as between the two renames
    assert newest_whole(tmp_path) == previous


def test_a_damaged_last_one_takes_the_place_of_no_other_at_the_next_write(tmp_path):
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    for step in (1, 2):
        write_checkpoint({"global_step": step}, last)
    set_aside_damaged(tmp_path)
    assert (step_of(last), step_of(previous)) == (2, 1)
    last.write_bytes(last.read_bytes()[:-1])
    set_aside_damaged(tmp_path)
    write_checkpoint({"global_step": 3}, last)
    assert (step_of(last), step_of(previous)) == (3, 1)
    assert not is_intact(tmp_path / "last.ckpt.damaged")


def test_of_several_that_are_whole_the_newest_stands_in(tmp_path):
    for name, step in (("previous", 4), ("best", 5), ("last", 6)):
        write_checkpoint(content(step), tmp_path / f"{name}.ckpt")
    write_checkpoint({"state_dict": {}}, tmp_path / "average-9.ckpt")  # weights alone, nothing to go on from
    (tmp_path / "last.ckpt").write_bytes(b"x" * 1000)
    assert newest_whole(tmp_path).name == "best.ckpt"


def test_where_there_is_none_or_only_one_half_written_training_starts_anew(tmp_path):
    assert newest_whole(tmp_path / "nowhere") is None
    (tmp_path / "last.ckpt.unfinished").write_bytes(b"PK")
    assert newest_whole(tmp_path) is None


def test_where_all_are_damaged_they_are_named(tmp_path):
    for name in ("last", "previous"):
        (tmp_path / f"{name}.ckpt").write_bytes(b"")
    with pytest.raises(UserError) as error:
        newest_whole(tmp_path)
    assert (error.value.option, error.value.value) == ("run_dir", str(tmp_path.parent))
    assert error.value.wrong == "every checkpoint of this run is damaged: last.ckpt, previous.ckpt"
    assert error.value.write == "write run_dir=ANOTHER_FOLDER, to train anew"


def test_a_damaged_or_missing_checkpoint_is_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    with pytest.raises(UserError, match="there is no such checkpoint"):
        read_checkpoint(path)
    torch.save(content(1), path)  # without a digest
    with pytest.raises(UserError, match=r"this checkpoint is damaged: the digest in last\.ckpt does not match"):
        read_checkpoint(path)


class Code:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_checkpoint_runs_no_code_whatever_is_asked_for(tmp_path):
    write_checkpoint({"state_dict": Code(tmp_path / "ran")}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="could run code, since it holds more than numbers and plain values"):
        CheckpointFiles().load_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("room", [0, 100, 2000, 4000])
def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path, monkeypatch, room):
    last = tmp_path / "last.ckpt"
    write_checkpoint(content(1), last)

    class Full(checkpoint_files.Hashed):
        def write(self, data):
            if self.file.tell() + len(data) > room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_files, "Hashed", Full)
        with pytest.raises(OSError, match="No space left on device") as error:
            write_checkpoint(content(2), last)
    assert error.value.errno == errno.ENOSPC
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]
    assert step_of(last) == 1
    write_checkpoint(content(2), last)
    assert step_of(last) == 2


def test_the_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []

    def record(name, function):
        return lambda *arguments: (done.append(name), function(*arguments))[1]

    monkeypatch.setattr(os, "fsync", record("fsync", os.fsync))
    monkeypatch.setattr(type(tmp_path), "replace", record("rename", type(tmp_path).replace))
    write_checkpoint(content(1), tmp_path / "last.ckpt")
    write_checkpoint(content(2), tmp_path / "last.ckpt")
    assert done == ["fsync", "rename", "fsync", "fsync", "rename", "rename", "fsync"]
