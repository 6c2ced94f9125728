"""The speed of the data layer on one core, against `datasets` with the feature extractors of `transformers`.

    python benchmarks/data.py             # ten minutes; --hours 0.2 --rounds 1 for a first look
    python benchmarks/data.py --memory    # five minutes, Linux
    python benchmarks/data.py --plan 1000000    # a minute

The first writes a corpus of noise in the rhythm of syllables: FLAC and Opus at 16, 44.1 and 48 kHz, durations
log-normal (sigma 0.65, 1 to 20 s), in manifests of 100 utterances. Each figure is the median of the rounds, each round
of processes of their own with one thread for sedtrain (map-style and streaming) and its peer, in turns:

    features     how many times as long the extractor takes for 10 s of audio, called as usual, as `Collator.features`;
                 the fastest of 50 calls of each, in turns
    audio s/s    seconds of audio decoded, resampled, turned into features and collated in a second of one core's time
                 (CPU time), over an epoch without workers
    real         how much of the padded audio is audio
    largest      padded seconds of the largest batch
    first batch  seconds from nothing but imports to the first training batch, of a folder never seen before

The peer does what transformers' run_speech_recognition_seq2seq.py does with `group_by_length`, as it goes and not ahead
of training: rows of `datasets`, LengthGroupedSampler with as many utterances in a batch as sedtrain has on average,
the extractor's call for each utterance, its `pad` for the batch. It decodes and resamples with soundfile and soxr, as
sedtrain does, because `datasets` needs torchcodec and FFmpeg for that.

`--memory` prints the memory (PSS) of a process and its four workers after each of 20 epochs of the embedded corpus, and
the slope over the second ten.

`--plan ROWS` prints the memory (tracemalloc) of a process that has planned an epoch of so many rows of Parquet, one in
ten of which has no text and is left out, and how many steps ranks make of the batches.
"""

import argparse
import gc
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import soundfile
import soxr
import torch
from hydra import compose, initialize_config_dir
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import LengthGroupedSampler

from sedtrain.config.hydra_calls import create
from sedtrain.config.schema import conf_dir, register
from sedtrain.data.collate import Collator
from sedtrain.data.readers import read_rows
from sedtrain.models.family_settings import feature_extractor_of
from sedtrain.text.tokenizers import train_tokenizer

ENCODERS = ("wav2vec2", "moonshine", "whisper", "w2v_bert", "speech_to_text", "parakeet")
SIDES = ("sedtrain", "streaming", "peer")
RATE = 16_000
FORMATS = (("flac", RATE, {}), ("flac", 44_100, {}), ("opus", 48_000, {"format": "OGG", "subtype": "OPUS"}))


def write_corpus(folder, hours):
    random = np.random.default_rng(0)
    drawn = random.lognormal(np.log(5), 0.65, round(700 * hours))
    rows = []
    for number, seconds in enumerate(drawn[(drawn >= 1) & (drawn <= 20)]):
        suffix, rate, options = FORMATS[number % len(FORMATS)]
        times = np.arange(round(seconds * rate)) / rate
        syllables = np.sin(2 * np.pi * 4 * times) ** 2 * random.normal(0, 0.05, len(times))
        soundfile.write(folder / f"{number}.{suffix}", syllables, rate, **options)
        rows.append({"audio": f"{number}.{suffix}", "text": "a word" * round(seconds)})
    for first in range(0, len(rows), 100):
        lines = "".join(json.dumps(row) + "\n" for row in rows[first : first + 100])
        (folder / f"train-{first // 100:03}.jsonl").write_text(lines)


def composed(*overrides):
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", list(overrides))


def collator_of(encoder):
    extractor = feature_extractor_of(create(composed(f"encoder={encoder}", "run_dir=."), "encoder"))
    tokenizer = train_tokenizer(["a word"], "char", 100)
    return Collator(extractor, tokenizer, tokenizer.bos_token_id)


def sedtrain_loader(cfg, collator):
    data = create(cfg, "data")
    data.collator = collator
    return data.train_dataloader()


class PeerRows:
    """What the example's prepare_dataset and collator make of rows."""

    def __init__(self, folder, collator):
        self.folder, self.extractor, self.tokenizer = folder, collator.feature_extractor, collator.tokenizer
        self.inputs = self.extractor.model_input_names[0]
        files = sorted(str(file) for file in folder.glob("train-*.jsonl"))
        self.rows = datasets.load_dataset("json", data_files=files, split="train")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        samples, rate = soundfile.read(self.folder / row["audio"], dtype="float32")
        audio = samples if rate == RATE else soxr.resample(samples, rate, RATE)
        inputs = self.extractor(audio, sampling_rate=RATE)[self.inputs][0]
        return {"inputs": inputs, "labels": self.tokenizer(row["text"])["input_ids"], "seconds": len(audio) / RATE}

    def collate(self, rows):
        batch = self.extractor.pad([{self.inputs: row["inputs"]} for row in rows], padding=True, return_tensors="pt")
        labels = self.tokenizer.pad([{"input_ids": row["labels"]} for row in rows], return_tensors="pt")
        batch["labels"] = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
        return batch, [row["seconds"] for row in rows]


def peer_loader(folder, collator, batch_size):
    rows = PeerRows(folder, collator)
    lengths = [round(RATE * soundfile.info(folder / name).duration) for name in rows.rows["audio"]]
    return DataLoader(
        rows, batch_size, sampler=LengthGroupedSampler(batch_size, lengths=lengths), collate_fn=rows.collate
    )


def sizes(batch):
    """Number of utterances, seconds of audio and seconds with padding."""
    if isinstance(batch, tuple):
        made, seconds = batch
        is_whisper = made[next(iter(made))].shape[-1] == 3000
        return len(seconds), sum(seconds), len(seconds) * (30 if is_whisper else max(seconds))
    return len(batch), batch.seconds, batch.seconds * batch.attention_mask.numel() / int(batch.attention_mask.sum())


def measure(side, encoders, folder, batch_size):
    """One epoch for each encoder; the size of batches is the peer's alone."""
    folder, found = Path(folder), {}
    for encoder in encoders:
        collator = collator_of(encoder)
        cfg = composed(
            "data=manifest",
            f"data.path='{folder}/train-*.jsonl'",
            "data.columns={audio: audio, translation: null, seconds: null, start: null}",
            "data.batch_seconds=120",
            "data.keep_decoded_hours=0",
            f"data.streaming={side == 'streaming'}",
            "run_dir=.",
        )
        began = time.perf_counter()
        loader = peer_loader(folder, collator, batch_size) if side == "peer" else sedtrain_loader(cfg, collator)
        cpu_began = time.process_time()
        batches = iter(loader)
        made = [sizes(next(batches))]
        first_batch = time.perf_counter() - began
        made += map(sizes, batches)
        cpu_seconds = time.process_time() - cpu_began
        utterances, seconds, padded = np.array(made, dtype=float).T
        found[encoder] = {
            "audio s/s": seconds.sum() / cpu_seconds,
            "real": seconds.sum() / padded.sum(),
            "largest": padded.max(),
            "utterances a batch": utterances.mean(),
            "first batch": first_batch if encoder == encoders[0] else None,  # the others find things in caches
        }
    return found


def features(encoder):
    """How many times as long the extractor takes, called as usual, and the milliseconds of both."""
    collator = collator_of(encoder)
    audio = np.random.default_rng(0).normal(0, 0.1, 10 * RATE).astype(np.float32)
    extractor, samples = collator.feature_extractor, torch.from_numpy(audio)
    padded = {} if encoder == "whisper" else {"padding": True}  # to half a minute by default
    calls = {
        "peer": lambda: extractor(audio, sampling_rate=RATE, return_tensors="pt", **padded),
        "sedtrain": lambda: collator.features(samples),
    }
    taken = {"peer": [], "sedtrain": []}
    for _ in range(50):
        for side, call in calls.items():
            began = time.perf_counter()
            call()
            taken[side].append(1000 * (time.perf_counter() - began))
    return {side: min(times) for side, times in taken.items()}


def memory(epochs=20):
    """Prints megabytes after each epoch, of this process and its four workers."""
    warnings.filterwarnings("ignore", "This DataLoader will create 4 worker processes")  # of smaller machines
    with tempfile.TemporaryDirectory() as folder:
        options = ("data.num_workers=4", f"run_dir={folder}")
        loader = sedtrain_loader(composed("data=spoken_digits", *options), collator_of("wav2vec2"))
        used = []
        for epoch in range(epochs):
            loader.sampler.set_epoch(epoch)
            for _ in loader:
                pass
            pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
            rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
            used.append(sum(int(re.search(r"Pss: +(\d+) kB", rollup)[1]) for rollup in rollups) / 1000)
        slope = np.polyfit(np.arange(epochs // 2), used[-(epochs // 2) :], 1)[0]
        print(f"{len(pids)} processes:", *(f"{each:.0f}" for each in used), "MB", end="; ")
        print(f"{slope:+.2f} MB an epoch over the last {epochs // 2}", flush=True)


def plan(num_rows):
    """Prints bytes an utterance once the first batch of an epoch is drawn, and the steps of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder)
        names, texts = (
            [f"{number:08}.wav" for number in range(num_rows)],
            (["", *["a word"] * 9] * (num_rows // 10 + 1))[:num_rows],
        )
        seconds = np.random.default_rng(0).lognormal(np.log(5), 0.65, num_rows).clip(1, 20)
        file = Path(folder, "train.parquet")
        pyarrow.parquet.write_table(pa.table({"audio": names, "id": names, "text": texts, "seconds": seconds}), file)
        del names, texts, seconds
        read_rows(file)  # makes its copy in Arrow
        columns = (
            "data.columns={audio: audio, transcription: text, translation: null, id: id, seconds: seconds, start: null}"
        )
        options = ("data=parquet", f"data.path={folder}", columns, "data.batch_seconds=240", f"run_dir={folder}")
        cfg, collator = composed(*options, "data.max_bad_fraction=1"), collator_of("wav2vec2")
        tracemalloc.start()
        data = create(cfg, "data")
        data.collator = collator
        sampler = data.train_dataloader().sampler
        drawn = iter(sampler)
        next(drawn)
        gc.collect()
        ours = [tracemalloc.Filter(True, f"*/{package}/*") for package in ("numpy", "sedtrain")]
        found = tracemalloc.take_snapshot().filter_traces(ours).statistics("filename")
    left_out = sum(each.size for each in found if each.traceback[0].filename.endswith("skipped.py"))
    planned, number = sum(each.size for each in found) - left_out, len(sampler.kept)
    print(f"{number:,} utterances: {planned / number:.1f} bytes each", end="; ")
    print(f"{num_rows - number:,} left out: {left_out / (num_rows - number):.0f} bytes each")
    steps = ", ".join(f"{sampler.num_steps(ranks):,} of {ranks}" for ranks in (1, 8, 64))
    print(f"steps of ranks at 240 s a batch: {steps}", flush=True)


def in_a_process(*arguments):
    """What this script prints of one measurement, by a process with one thread and an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        env["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        command = [sys.executable, __file__, "--measure", json.dumps(arguments)]
        done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True, cwd=cache)
    return json.loads(done.stdout.splitlines()[-1])


def compare(encoders, folder, rounds):
    """Prints the medians of all sides and their ratios, and returns them by encoder."""
    found, medians = {side: [] for side in SIDES}, {}
    batch_size = 1
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            found[side].append(in_a_process("measure", side, encoders, folder, batch_size))
            batch_size = round(found["sedtrain"][0][encoders[0]]["utterances a batch"])
    for encoder in encoders:
        taken = in_a_process("features", encoder)
        print(f"{encoder}: features {taken['peer'] / taken['sedtrain']:.1f} times as fast", end=" ")
        print(f"({taken['sedtrain']:.3f} ms for 10 s, the extractor {taken['peer']:.3f})")
        medians[encoder] = {"features": taken}
        for side, runs in found.items():
            values = {key: [run[encoder][key] for run in runs] for key, value in runs[0][encoder].items() if value}
            middle = {key: statistics.median(each) for key, each in values.items()}
            medians[encoder][side] = middle
            print(
                f"  {side:9}", *(f"{key} {value:.{3 if value < 10 else 0}f}" for key, value in middle.items()), sep="  "
            )
        speeds = {side: medians[encoder][side]["audio s/s"] for side in SIDES}
        ratios = (f"{side} {speeds[side] / speeds['peer']:.2f}" for side in ("sedtrain", "streaming"))
        print("  times the peer's audio s/s:", *ratios, flush=True)
    return medians


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=1.0, help="of audio in the corpus")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--encoders", nargs="+", default=ENCODERS)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--plan", type=int, metavar="ROWS")
    parser.add_argument("--json", type=Path, help="a file for the table")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, *arguments = options.measure
        print(json.dumps({"measure": measure, "features": features}[name](*arguments)))
    elif options.memory:
        memory()
    elif options.plan:
        plan(options.plan)
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_corpus(Path(folder), options.hours)
            found = compare(options.encoders, folder, options.rounds)
        if options.json:
            options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
