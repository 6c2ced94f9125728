"""What every test stands on: one thread, no network, a cache of its own, a small corpus and runs on it."""

# ruff: noqa: E402, F401 - the environment is set before torch and datasets read it; an import changes Hydra

import contextlib
import gc
import importlib
import io
import logging
import os
import signal
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

gc.disable()  # until all is imported, which stays for good and need not be searched again and again
CACHE = tempfile.mkdtemp(prefix="sedtrain-tests-")
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_CACHE": CACHE,
    "HF_MODULES_CACHE": CACHE,
    "MPLBACKEND": "Agg",
}

import composed
import pyarrow.parquet
import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from sedtrain.data import memory
from sedtrain.errors import UserError

torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # nobody cuts the power here
memory.return_freed_memory = lambda: None  # takes the longer the larger a process is, and this one is large
sys.modules["silero_vad"] = None  # pauses are found by energy, whatever is installed
UserError.on_command_line = True  # most tests read the messages of the command line
settings.register_profile("sedtrain", deadline=None, derandomize=True)
settings.load_profile("sedtrain")

EMBEDDED = Path(__file__).parents[1] / "sedtrain/data/spoken_digits"
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared():
    """The folder of real recordings and real weights, which not every machine has."""
    if not SHARED.is_dir():
        pytest.skip("needs the shared recordings and weights")
    return SHARED


def cut_corpus(source, folder, **num_rows):
    """Parquet files of the first rows of each split of a corpus."""
    folder.mkdir(exist_ok=True)
    for split, number in num_rows.items():
        rows = pyarrow.parquet.read_table(source / f"{split}.parquet").slice(0, number)
        pyarrow.parquet.write_table(rows, folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of 24 + 6 + 6 spoken digit strings."""
    return cut_corpus(EMBEDDED, tmp_path_factory.mktemp("data") / "digits", train=24, validation=6, test=6)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


def end_of_process(environment):
    """Undoes what a command leaves to the end of its process: variables, and the group of its ranks."""
    os.environ.clear()
    os.environ.update(environment)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def sedtrain():
    """The command `sedtrain ARGUMENTS` in this process; returns how it ended. Its problems raise, as in the shell.

    Only with `draws` do its pages have drawings, which take a fifth of a short run.
    """
    from forked import undrawn

    from sedtrain.__main__ import main
    from sedtrain.evaluation import html

    def command(*arguments, draws=False):
        with pytest.MonkeyPatch.context() as patch:
            if not draws:
                patch.setattr(html, "figure", undrawn)
            return ended(arguments)

    def ended(arguments):
        out, err, status = io.StringIO(), io.StringIO(), 0
        argv, path = sys.argv, list(sys.path)
        before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGUSR1)}
        environment = dict(os.environ)
        logger = logging.getLogger("sedtrain")
        handlers, logger.handlers = logger.handlers, []
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                sys.argv = ["sedtrain", *map(str, arguments)]
                main()
            except SystemExit as end:
                status = end.code or 0
            finally:
                sys.argv, sys.path[:] = argv, path
                for each, handler in before.items():
                    signal.signal(each, handler)
                for handler in logger.handlers:
                    handler.close()
                logger.handlers = handlers
                end_of_process(environment)
        return Ended(status, out.getvalue(), err.getvalue())

    return command


@pytest.fixture(scope="session")
def train(sedtrain, corpus):
    """Trains for a few steps on the small corpus, with overrides; returns the run's folder."""

    def run(folder, *overrides, steps=3, draws=False):
        short = [f"trainer.max_steps={steps}", "trainer.log_every_n_steps=1", "decoding.max_new_tokens=12"]
        ended = sedtrain(*overrides, "data=parquet", f"data.path={corpus}", f"run_dir={folder}", *short, draws=draws)
        assert ended.status == 0, ended.err
        return folder

    return run


@pytest.fixture(scope="session")
def wav(tmp_path_factory):
    """A spoken digit string of the embedded corpus as a wav of 16 kHz."""
    import soundfile

    from sedtrain.data.audio import read_audio

    row = pyarrow.parquet.read_table(EMBEDDED / "test.parquet").slice(0, 1).to_pylist()[0]
    path = tmp_path_factory.mktemp("audio") / "digits.wav"
    soundfile.write(path, read_audio(row["audio"], 16000).numpy(), 16000, subtype="FLOAT")
    return path


@pytest.fixture(scope="session")
def trained(train, tmp_path_factory):
    """The folder of a run with the defaults, encoder=hubert decoder=bert."""
    return train(tmp_path_factory.mktemp("runs") / "trained", draws=True)


@pytest.fixture(scope="session")
def two_ranks(sedtrain, tmp_path_factory):
    """The folder that two_ranks.py filled, once for all workers, and before it a run in one process that it resumes."""
    worker = "PYTEST_XDIST_WORKER" in os.environ
    shared_folder = tmp_path_factory.getbasetemp().parent if worker else tmp_path_factory.getbasetemp()
    folder = shared_folder / "two ranks"
    with FileLock(f"{folder}.lock"):
        if not (folder / "ended").exists():
            launch_two_ranks(sedtrain, folder)
    assert (folder / "ended").read_text() == "0", (folder / "ended").read_text()
    return folder


def launch_two_ranks(sedtrain, folder):
    """Runs two_ranks.py in two processes, as torchrun would launch them; test_launch.py has torchrun itself."""
    from forked import Forked
    from sharded import STARTS_LATE, arguments
    from whispers import whisper_folder

    folder.mkdir()
    whisper_folder(folder / "whisper", languages=())
    corpus = cut_corpus(EMBEDDED, folder / "corpus", train=21, validation=5, test=5)
    in_one = ["trainer.devices=1", "trainer.accumulate_grad_batches=2"]
    ended = sedtrain(*arguments(folder, corpus, "single_late", *STARTS_LATE), *in_one)
    assert ended.status == 0, ended.err
    ranks = [Forked(folder, folder, module="two_ranks", **each) for each in launched(2)]
    statuses = [rank.wait(280) for rank in ranks]
    (folder / "ended").write_text("0" if statuses == [0, 0] else "\n".join(rank.err for rank in ranks))


def launched(number):
    """The variables that torchrun sets, of each of so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        of_all = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "WORLD_SIZE": number}
    of_all |= {"LOCAL_WORLD_SIZE": number, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "tests"}
    for rank in range(number):
        yield {name: str(value) for name, value in (of_all | {"RANK": rank, "LOCAL_RANK": rank}).items()}


@pytest.fixture
def good(tmp_path):
    """Twelve utterances of 0.3 to 1.4 s in each split."""
    from corpora import write

    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.parquet", [0.3 + 0.1 * i for i in range(12)])
    return tmp_path


@pytest.fixture
def shards(tmp_path):
    """Eleven utterances of 0.3 to 1.3 s in three shards, and three to validate on."""
    from corpora import write

    for number in range(3):
        write(tmp_path / f"train-{number}.parquet", [0.3 + 0.1 * i for i in range(number, 11, 3)])
    write(tmp_path / "validation.parquet", [0.5] * 3)
    return tmp_path


@pytest.fixture
def datasets_of(tmp_path):
    """The options of three datasets, by name, each stored in another way."""
    from corpora import write_mix

    return write_mix(tmp_path)


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    import shutil

    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A working folder for a user's own package `mine`, which no other test's can be taken for."""

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
            del sys.modules[name]
        importlib.invalidate_caches()

    forget()
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    forget()
