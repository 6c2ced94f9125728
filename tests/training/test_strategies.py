"""Runs over two ranks, their weights copied or sharded, against the same in one process."""

import csv

import pytest
import torch
import transformers
from safetensors.torch import load_file
from sharded import BF16, STARTS_LATE, WHOLE, arguments

from sedtrain.training.checkpoint_files import is_intact, read_checkpoint

LOGGED = ["train/loss", "train/ctc_loss", "val/loss", "val/wer", "val/cer", "val/mine", "val/audio_gain"]
FIRST, THEN = range(3), range(3, 6)


@pytest.fixture(scope="module")
def runs(sedtrain, two_ranks):
    """Runs over two ranks, and in one process with as many utterances a step."""

    def alone(name, *overrides):
        options = ["trainer.devices=1", "trainer.accumulate_grad_batches=2"]
        ended = sedtrain(*arguments(two_ranks, two_ranks / "corpus", name, *overrides), *options)
        assert ended.status == 0, ended.err

    alone("single_bf16", *BF16)
    alone("single_llama", *BF16[1:])
    alone("single_whole", *WHOLE, "trainer.max_steps=6")
    alone("single_late_on", *STARTS_LATE, "resume=single_late")
    alone("fsdp_single", *STARTS_LATE, "resume=fsdp_late")
    return two_ranks


def logged(folder, column, steps):
    """The values of a column of metrics.csv at these steps."""
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get(column) and int(row["step"]) in steps]
    return [float(row[column]) for row in rows]


@pytest.mark.parametrize("column", LOGGED)
@pytest.mark.parametrize(
    ("name", "reference", "steps"),
    [
        ("fsdp_late", "single_late", FIRST),
        ("ddp_late", "single_late", FIRST),
        ("fsdp_late_on", "single_late_on", THEN),
        ("single_fsdp", "single_late_on", THEN),
        ("fsdp_single", "single_late_on", THEN),
    ],
)
def test_two_ranks_log_what_one_process_logs(runs, name, reference, steps, column):
    expected = logged(runs / reference, column, steps)
    assert len(expected) == (len(steps) if column.startswith("train") else 1)
    assert logged(runs / name, column, steps) == pytest.approx(expected, rel=1e-4, abs=2e-6)


@pytest.mark.parametrize("column", ["train/loss", "val/loss", "val/wer"])
@pytest.mark.parametrize(("name", "steps"), [("fsdp_whole", FIRST), ("fsdp_whole_on", THEN)])
def test_a_whole_model_that_is_sharded_and_resumed_logs_what_one_process_logs_without_a_stop(runs, name, steps, column):
    expected = logged(runs / "single_whole", column, steps)
    assert len(expected) == (3 if column == "train/loss" else 1)
    assert logged(runs / name, column, steps) == pytest.approx(expected, rel=1e-4, abs=2e-6)


def test_the_folder_of_a_sharded_whole_model_is_stock(runs):
    folder = runs / "fsdp_whole_on" / "model"
    model, report = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(folder, output_loading_info=True)
    assert type(model) is transformers.WhisperForConditionalGeneration and not any(report.values())
    ended = (read_checkpoint(runs / name / "checkpoints/last.ckpt") for name in ("single_whole", "fsdp_whole_on"))
    expected, weights = (each["state_dict"] for each in ended)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("column", ["train/loss", "train/ctc_loss", "val/loss"])
def test_two_ranks_in_bf16_log_what_one_process_logs_within_its_rounding(runs, column):
    """bf16 has 8 bits: it rounds to 0.4 % of a value."""
    expected = logged(runs / "single_bf16", column, FIRST)
    assert logged(runs / "fsdp_bf16", column, FIRST) == pytest.approx(expected, rel=1e-3)


def test_a_run_in_bf16_is_no_run_in_float32(runs):
    """In the first step, before anything has moved."""
    [in_bf16], [in_float32] = (logged(runs / name, "train/loss", [0]) for name in ("single_bf16", "single_llama"))
    assert in_bf16 != in_float32
    assert in_bf16 == pytest.approx(in_float32, rel=0.01)


def test_a_rank_has_no_utterances_in_the_last_step_of_the_epoch(runs):
    """Otherwise no test here would show that such a rank keeps up with the other."""
    assert "10 s of audio, 7 in an epoch" in (runs / "fsdp_late_on" / "sedtrain.log").read_text()


def test_the_exported_folder_is_that_of_one_process(runs):
    single, sharded = runs / "single_late" / "model", runs / "fsdp_late" / "model"
    assert {path.name for path in single.iterdir()} == {path.name for path in sharded.iterdir()}
    assert (single / "config.json").read_text() == (sharded / "config.json").read_text()
    expected, weights = (load_file(folder / "model.safetensors") for folder in (single, sharded))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)
    transformers.SpeechEncoderDecoderModel.from_pretrained(sharded)


@pytest.mark.parametrize(("name", "reference"), [("ddp_late", "single_late"), ("fsdp_late_on", "single_late_on")])
def test_two_ranks_have_the_weights_of_one_process_and_their_average_when_a_part_has_thawed(runs, name, reference):
    single, of_two = (read_checkpoint(runs / each / "checkpoints/last.ckpt") for each in (reference, name))
    for part in ("state_dict", "current_model_state"):
        assert of_two[part].keys() == single[part].keys()
        for weight_name, weight in of_two[part].items():
            torch.testing.assert_close(weight, single[part][weight_name], rtol=1e-3, atol=1e-4)
    averaged, own = single["state_dict"], single["current_model_state"]
    moved = {weight_name for weight_name, weight in own.items() if not torch.equal(weight, averaged[weight_name])}
    assert any(".encoder.layers." in weight_name for weight_name in moved)


def test_a_checkpoint_of_two_ranks_is_one_whole_file_of_the_same_layout(runs):
    paths = [runs / name / "checkpoints" / "last.ckpt" for name in ("single_late", "fsdp_late")]
    assert is_intact(paths[1])
    single, sharded = map(read_checkpoint, paths)
    assert sharded["state_dict"].keys() == single["state_dict"].keys()
    expected, state = single["optimizer_states"][0], sharded["optimizer_states"][0]
    assert state["param_groups"] == expected["param_groups"]
    assert state["state"].keys() == expected["state"].keys()
    for number, entry in state["state"].items():
        for name, value in entry.items():
            torch.testing.assert_close(value, expected["state"][number][name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer=adafactor"], "optimizer = 'Adafactor'\n    its state cannot be sharded like the weights"),
        (["encoder.tiny.layerdrop=0.1"], "encoder.options.layerdrop = 0.1\n    one rank could skip a layer"),
        (["trainer.precision=16-mixed"], "does not support"),
    ],
)
def test_what_cannot_be_sharded_is_refused(sedtrain, corpus, tmp_path, overrides, message):
    ended = sedtrain(*arguments(tmp_path, corpus, "refused", "strategy=fsdp", *overrides), "trainer.devices=1")
    assert ended.status == 2
    assert message in ended.err
