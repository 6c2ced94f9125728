"""What `data.batches` may be, and what is said where it is something else."""

import pytest

from sedtrain.data.buckets import Bucket, buckets_of
from sedtrain.errors import UserError

WRITE = (
    "write data.batches=FILE of task=fit_batches, or a list of {seconds: NUMBER, tokens: NUMBER, utterances: NUMBER} with "
    "rising seconds and tokens"
)
SHORT = {"seconds": 2, "tokens": 10, "utterances": 40}
LONG = {"seconds": 4.5, "tokens": 10, "utterances": 16}


def refusal(batches):
    with pytest.raises(UserError) as raised:
        buckets_of(batches)
    assert raised.value.write == WRITE
    return raised.value.option, raised.value.value, raised.value.wrong


def test_buckets_are_rows_of_a_list():
    assert buckets_of([SHORT, LONG]) == [Bucket(2, 10, 40), Bucket(4.5, 10, 16)]


@pytest.mark.parametrize("batches", [[], {}, "", "a text", 3])
def test_what_is_no_list_is_refused(tmp_path, batches):
    file = tmp_path / "batches.yaml"
    file.write_text(str(batches))
    assert refusal(str(file)) == ("data.batches", str(file), "this is no list of buckets")


@pytest.mark.parametrize(
    "row",
    [
        {**SHORT, "seconds": 0},
        {**SHORT, "seconds": float("inf")},
        {**SHORT, "tokens": 1.5},
        {**SHORT, "utterances": True},
        {"seconds": 2, "tokens": 10},
        {**SHORT, "texts": 3},
        [2, 10, 40],
        None,
    ],
)
def test_what_is_no_bucket_is_named(row):
    assert refusal([SHORT, row]) == ("data.batches[1]", row, "this is no bucket")


def test_seconds_rise_and_tokens_do_not_fall():
    fewer = {**LONG, "tokens": 9}
    assert refusal([LONG, SHORT]) == ("data.batches[1]", SHORT, "the bucket before it holds 4.5 s and 10 tokens")
    for row in (SHORT, fewer):
        assert refusal([SHORT, row]) == ("data.batches[1]", row, "the bucket before it holds 2 s and 10 tokens")


def test_a_file_that_is_not_there_or_no_yaml_is_named(tmp_path):
    gone, broken = tmp_path / "gone.yaml", tmp_path / "broken.yaml"
    broken.write_text("- {seconds: 1")
    missing = f"this file cannot be read: [Errno 2] No such file or directory: '{gone}'"
    assert refusal(str(gone)) == ("data.batches", str(gone), missing)
    option, value, wrong = refusal(str(broken))
    assert (option, value) == ("data.batches", str(broken))
    assert wrong.startswith("broken.yaml is no YAML of plain values: while parsing a flow mapping")
