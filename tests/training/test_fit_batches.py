"""The batches that are found are as large as memory allows, and training on them takes no more."""

import mmap
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import EMBEDDED, cut_corpus
from corpora import data_module, write
from hypothesis import given
from hypothesis import strategies as st

from sedtrain.data.augment import Augment
from sedtrain.data.augmentations import Speed
from sedtrain.data.buckets import Bucket, groups_by_buckets
from sedtrain.errors import UserError
from sedtrain.training import memory as meters
from sedtrain.training.fit_batches import (
    TOLERANCE,
    Budget,
    budget_of,
    kept_audio,
    largest,
    largest_batch,
    lengths,
    nonempty_buckets,
)
from sedtrain.training.memory import OutOfMemory, ProcessMemory
from sedtrain.training.memory_trials import Trial, noise

REPOSITORY = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is counted on Linux alone")


def taking(at_rest, peak_of, most=None):
    """A measurement that takes what it is told to, and runs out of memory above `most` bytes; remembers what it was asked."""
    asked = []

    def measure(number):
        asked.append(number)
        peak = peak_of(number)
        return Trial(number, None if most and peak > most else peak, at_rest, 1.0)

    return measure, asked


@given(
    st.integers(0, 500),
    st.integers(1, 300),
    st.floats(0.5, 1.5),
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.booleans(),
)
def test_the_largest_batch_is_found_in_few_trials(at_rest, each, power, most, guess, runs_out):
    """Against a count, for memory that grows with the batch more or less fast than in proportion."""

    def peak_of(number):
        return at_rest + int(each * number**power)

    measure, asked = taking(at_rest, peak_of, 10_000 if runs_out else None)
    best = largest(measure, 10_000, most, guess)
    true = max((n for n in range(1, most + 1) if peak_of(n) <= 10_000), default=1)
    room = 10_000 - at_rest
    assert best.utterances <= true
    assert true <= best.utterances * (1 + TOLERANCE) or peak_of(best.utterances) - at_rest >= (1 - TOLERANCE) * room
    assert len(asked) == len(set(asked)) <= 20 and all(1 <= number <= most for number in asked)


def test_steps_double_until_a_batch_does_not_fit_and_are_halved_from_there():
    measure, asked = taking(100, lambda number: 100 + 10 * number)
    assert largest(measure, 1000, 10**6, 1).utterances == 88
    assert asked == [1, 2, 4, 8, 16, 32, 64, 128, 96, 80, 88]
    measure, asked = taking(100, lambda number: 100 + 10 * number)
    assert largest(measure, 1000, 10**6, 100).utterances == 90
    assert asked == [100, 95, 85, 90]


def test_a_batch_that_fills_the_memory_is_taken_at_once():
    measure, asked = taking(100, lambda number: 100 + 10 * number)
    assert largest(measure, 1000, 10**6, 86).utterances == 86
    assert asked == [86]


def steps_of(measure):
    return SimpleNamespace(
        trial=lambda seconds, tokens, number: measure(number), memory=SimpleNamespace(used=lambda: 3e9)
    )


TEXT = "2 GB on the CPU (10 % kept free)"


def refused(peak_of, at_rest=0, **options):
    budget = Budget(1.8e9, 2.0, TEXT)
    with pytest.raises(UserError) as raised:
        largest_batch(steps_of(taking(at_rest, peak_of, **options)[0]), Bucket(30.0, 120, 50), budget, guess=1)
    assert (raised.value.option, raised.value.value) == ("memory_gb", 2.0)
    return raised.value.wrong, raised.value.write


def test_where_not_one_utterance_fits_the_bucket_is_named():
    wrong = f"not even one utterance of 30 s and 120 target tokens fits into {TEXT}: its step takes "
    write = "write data.max_seconds=LESS, activation_checkpointing=true, trainer.precision=bf16-mixed, "
    write += "or memory_gb=MORE, if the machine has more"
    assert refused(lambda number: int(1.9e9)) == (wrong + "1.90 GB", write)
    assert refused(lambda number: int(1.9e9), most=1.8e9) == (wrong + "more", write)


def test_where_the_model_alone_is_too_large_it_is_said():
    wrong = f"the model with its gradients, the optimizer's state and the libraries takes {{}} GB, of {TEXT}"
    write = (
        "write a smaller model, finetune=lora, data.keep_decoded_hours=0, or memory_gb=MORE, if the machine has more"
    )
    assert refused(lambda number: int(1.95e9), at_rest=int(1.9e9)) == (wrong.format("1.90"), write)

    def out_of_memory(number):
        raise OutOfMemory("data.batch_seconds", 24, "out of memory", "less")

    assert refused(out_of_memory) == (wrong.format("3.00"), write)


def memory(available):
    return SimpleNamespace(available=lambda: available)


def test_a_budget_is_asked_for_on_a_cpu_and_never_more_than_there_is():
    assert budget_of(None, memory(80e9), "cuda", 0) == (72e9, None, "80 GB on the CUDA (10 % kept free)")
    text = "2 GB on the CPU (10 % kept free, 0.30 GB for audio that is kept decoded)"
    assert budget_of(2.0, memory(80e9), "cpu", 0.3e9) == (1.5e9, 2.0, text)
    for gb, wrong, instead in [
        (None, "on a CPU the search needs a memory limit",
         "write memory_gb=NUMBER, for the whole process; 9 are free"),
        (10.0, "only 9.0 GB are free", "write memory_gb=8"),
    ]:  # fmt: skip
        with pytest.raises(UserError) as raised:
            budget_of(gb, memory(9e9), "cpu", 0)
        error = raised.value
        assert (error.option, error.value, error.wrong, error.write) == ("memory_gb", gb, wrong, instead)


def test_memory_that_cannot_be_measured_is_named(monkeypatch, tmp_path):
    with pytest.raises(UserError) as raised:
        meters.memory_meter(torch.device("mps"))
    assert str(raised.value).endswith(
        "trainer.accelerator = 'mps'\n    its memory cannot be measured\n"
        "    write trainer.accelerator=cuda or trainer.accelerator=cpu"
    )
    monkeypatch.setattr(meters, "CLEAR", tmp_path / "proc" / "clear_refs")
    with pytest.raises(UserError, match="this system does not count the peak of a process's memory"):
        meters.memory_meter(torch.device("cpu"))


@linux
def test_the_peak_of_a_process_is_forgotten_and_counted_anew():
    measured = ProcessMemory()
    measured.reset()
    before = measured.used()
    large = mmap.mmap(-1, 60_000_000)  # an allocator could take it from what earlier tests have left, and keep it
    for page in range(0, len(large), mmap.PAGESIZE):
        large[page] = 1
    assert measured.used() >= before + 55e6
    large.close()
    assert measured.used() <= before + 20e6 and measured.peak() >= before + 55e6
    measured.reset()
    assert measured.peak() <= before + 20e6


corpora = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 60)), min_size=1, max_size=60)


@given(corpora, st.integers(1, 4), st.integers(1, 3))
def test_the_buckets_of_a_corpus_hold_all_of_it(corpus, num_buckets, num_ranks):
    seconds, tokens = (np.array(each) for each in zip(*corpus, strict=True))
    edges = np.unique(np.quantile(seconds, np.linspace(0, 1, num_buckets + 1)[1:], method="higher")).astype(float)
    buckets = nonempty_buckets(edges, seconds.astype(float), tokens, num_ranks)
    assert [list(each) == sorted(each) for each in zip(*[bucket[:2] for bucket in buckets], strict=True)] == [
        True,
        True,
    ]
    groups, _ = groups_by_buckets(seconds.astype(float), tokens, [bucket._replace(utterances=1) for bucket in buckets])
    held = np.bincount(groups)
    assert [bucket.utterances for bucket in buckets] == [-(-number // num_ranks) for number in held]
    assert sum(held) == len(corpus) and buckets[-1][:2] == (seconds.max(), tokens.max())


def test_few_long_texts_do_not_decide_what_a_bucket_is_measured_with():
    seconds, tokens = np.array([2.0] * 200 + [9.0] * 10), np.array([8] * 199 + [50] + [60] * 10)
    assert nonempty_buckets(np.array([2.0, 9.0]), seconds, tokens, 1) == [(2.0, 8, 199), (9.0, 60, 11)]


def test_lengths_are_those_that_training_batches(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.parquet", [0.3, 0.504, 1.2])
    data = data_module(tmp_path)
    seconds, tokens = lengths(data, None)
    assert seconds.tolist() == [0.3, 0.51, 1.2] and tokens.tolist() == [4, 4, 6]  # one, two, three
    data.augment = Augment({"speed": Speed([0.5])}, 0, max_seconds=30)
    data.kept_split.cache_clear()
    assert lengths(data, None)[0].tolist() == pytest.approx([0.6, 1.01, 2.4])
    assert kept_audio(data) == pytest.approx(2 * 4 * 16_000 * 2.004)


def test_a_stream_may_have_what_its_first_blocks_have_not(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.parquet", [0.3, 0.5, 1.2, 0.4])
    data = data_module(tmp_path, streaming=True, block_utterances=2, max_seconds=12.5)
    assert sorted(lengths(data, None)[0]) == [0.3, 0.4, 0.5, 1.2, 12.5]
    assert sorted(lengths(data, 1)[0])[-1] == 12.5 and len(lengths(data, 1)[0]) == 3


def test_noise_has_the_shape_that_it_is_asked_for(tmp_path):
    batch = noise(data_module(tmp_path).collator, 1.5, 7, 3)
    assert batch.inputs.shape == batch.attention_mask.shape == (3, 24_000) and batch.labels.shape == (3, 7)
    assert batch.attention_mask.all() and (batch.labels[:, 1:] != batch.labels[:, :-1]).all() and batch.seconds == 4.5


# --- the command, three times in one process


BUDGET = 1.3 if torch.version.cuda else 0.95
"""GB of a search: torch for GPUs takes 0.35 more at rest."""
COMMANDS = """
import os, re, signal, sys, threading, time
from pathlib import Path
import lightning
from sedtrain.__main__ import main
from sedtrain.training.memory import ProcessMemory

class Sizes(lightning.Callback):
    def on_train_batch_start(self, trainer, module, batch, index):
        longest, tokens = batch.attention_mask.sum(1).max() / 16_000, batch.labels.shape[1]
        with open("sizes.txt", "a") as file:
            file.write(f"{longest} {tokens} {len(batch)}\\n")

def sedtrain(*arguments):
    sys.argv = ["sedtrain", "data.path=data", "data.num_buckets=2", *arguments]
    main()
    Path("peaks.txt").open("a").write(f"{ProcessMemory().peak() / 1e9}\\n")

def interrupt():
    while not Path("again/sedtrain.log").is_file() or "measuring" not in Path("again/sedtrain.log").read_text():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)

if __name__ == "__main__":
    sedtrain("task=fit_batches", "memory_gb=BUDGET", "run_dir=fit", "callbacks=[default]")
    ProcessMemory().reset()
    sedtrain("data.batches=fit/batches.yaml", "trainer.max_steps=8", "run_dir=run", "+callbacks.sizes._target_=commands.Sizes")
    threading.Thread(target=interrupt).start()
    sedtrain("task=fit_batches", "memory_gb=2", "run_dir=again")
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A folder in which batches were looked for, trained on, and looked for again until Ctrl-C; and how that ended."""
    if sys.platform != "linux":
        pytest.skip("the peak of a process's memory is counted on Linux alone")
    folder = tmp_path_factory.mktemp("commands")
    cut_corpus(EMBEDDED, folder / "data", train=64, validation=4, test=4)
    (folder / "commands.py").write_text(COMMANDS.replace("BUDGET", str(BUDGET)))
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{folder}"}
    return folder, subprocess.run(
        [sys.executable, "commands.py"], cwd=folder, env=environment, capture_output=True, text=True
    )


def buckets_in(folder):
    return [Bucket(**each) for each in yaml.safe_load((folder / "fit/batches.yaml").read_text())]


def test_what_is_found_fills_the_budget_and_is_written_with_the_command_to_use_it(ended):
    folder, run = ended
    peaks = [float(peak) for peak in re.findall(r"# (\S+) GB", (folder / "fit/batches.yaml").read_text())]
    assert len(peaks) == len(buckets_in(folder)) == 2, run
    assert all(0.9 * BUDGET - 0.11 < peak <= 0.9 * BUDGET for peak in peaks)
    command = "python -m sedtrain data.path=data data.num_buckets=2 'callbacks=[default]' data.batches=fit/batches.yaml"
    assert f"to train with them:\n  {command}\n" in run.stdout


def test_training_stays_in_the_budget_with_batches_as_large_as_written(ended):
    folder, _ = ended
    steps = [line.split() for line in (folder / "sizes.txt").read_text().splitlines()]
    largest_of = {}
    for seconds, tokens, size in steps:
        held = (each for each in buckets_in(folder) if float(seconds) <= each.seconds and int(tokens) <= each.tokens)
        bucket = next(held)
        largest_of[bucket] = max(largest_of.get(bucket, 0), int(size))
    assert largest_of == {bucket: bucket.utterances for bucket in buckets_in(folder)}
    searched, trained = map(float, (folder / "peaks.txt").read_text().split())
    assert 0.5 < trained <= BUDGET and searched <= BUDGET + 0.05


def test_the_buckets_themselves_are_kept_with_the_run(ended):
    folder, _ = ended
    kept = yaml.safe_load((folder / "run/config.yaml").read_text())
    assert [Bucket(**each) for each in kept["data"]["batches"]] == buckets_in(folder)


def test_ctrl_c_ends_the_search_without_a_traceback(ended):
    folder, run = ended
    assert run.returncode == 130 and run.stderr.endswith("interrupted\n") and "Traceback" not in run.stderr
    assert not (folder / "again/batches.yaml").exists()
