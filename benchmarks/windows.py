"""Recordings made of the embedded test utterances: their errors by windows and as a whole, and the memory that they take.

    python -m sedtrain encoder=hubert decoder=bert run_dir=RUN    # the model, about eight minutes
    python benchmarks/windows.py RUN                              # three minutes

joined       utterances one after the other, without pauses, to three times the longest utterance in training: the word
             error rate of the whole at once and by windows
30 minutes   utterances with pauses of 0.5 to 1.5 s of faint noise: the word error rate beside that of the utterances
             one by one
memory       peak of a process that transcribes a file of one minute, and of one that transcribes 30 minutes
"""

import argparse
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import soundfile
import torch
from hydra import compose, initialize_config_dir
from rapidfuzz.distance import Levenshtein

from sedtrain.build import connect
from sedtrain.config.instantiate import create
from sedtrain.config.schema import conf_dir, register
from sedtrain.decoding.recordings import RecordingDecoder
from sedtrain.decoding.windows import Window
from sedtrain.models.saved import load

RATE = 16_000
PROCESS = """
import sys, sedtrain
print(len(sedtrain.load(sys.argv[1]).transcribe(sys.argv[2], pauses="energy").split()))
[peak] = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(int(peak) // 1024)
"""


def created(group, *overrides):
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return create(compose("train", ["run_dir=.", "data.num_workers=0", *overrides]), group)


def wer(references, hypotheses):
    pairs = [(one.lower().split(), two.lower().split()) for one, two in zip(references, hypotheses, strict=True)]
    return sum(Levenshtein.distance(*pair) for pair in pairs) / sum(len(reference) for reference, _ in pairs)


def joined(utterances, seconds, low, high):
    """(S,) samples of utterances with pauses between them until they last so long, their text, and how many there are."""
    random, parts, texts, number = np.random.default_rng(0), [], [], 0
    for each in utterances:
        pause = 1e-4 * random.standard_normal(round(random.uniform(low, high) * RATE))
        parts += [each.audio.numpy(), pause.astype(np.float32)]
        texts.append(each.text)
        if (number := number + len(parts[-1]) + len(parts[-2])) >= seconds * RATE:
            break
    return np.concatenate(parts), " ".join(texts), len(texts)


def long_utterances(utterances, seconds):
    """Neighbours joined without pauses until they last so long."""
    first = 0
    while first < len(utterances):
        samples, text, number = joined(utterances[first:], seconds, 0, 0)
        first += number
        if len(samples) >= seconds * RATE:
            yield samples, text


def by_windows(decoder, recordings):
    return [decoder.transcription("", [samples]).text for samples in recordings]


def peak_megabytes(run, samples, folder):
    soundfile.write(folder / "a.flac", samples, RATE)
    command = [sys.executable, "-c", PROCESS, str(run), str(folder / "a.flac")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a training with loss=joint on the embedded corpus")
    parser.add_argument("--pauses", choices=("energy", "silero"), default="energy")
    options = parser.parse_args()
    torch.set_num_threads(1)
    saved, data = load(options.run), created("data")
    connect(data, saved, ["test"])
    dataset = data.split("test")
    utterances = [dataset.decode(reference) for reference in dataset.kept.references.tolist()]
    audio, texts = [each.audio.numpy() for each in utterances], [each.text for each in utterances]
    longest = saved.max_training_seconds
    joins, joined_texts = zip(*long_utterances(utterances, 3 * longest), strict=True)
    hour = joined(cycle(utterances), 1800, 0.5, 1.5)
    rounds = -(-hour[2] // len(audio))
    print(f"{len(joins)} joined to {3 * longest:.1f} s; {hour[2]} utterances in 30 minutes")
    for search in ("greedy", "joint"):
        decoder = RecordingDecoder(saved, replace(created("decoding", f"decoding={search}"), pauses=options.pauses))
        whole = [decoder.decode([Window(0, samples)], None, "transcribe")[0].texts[0] for samples in joins]
        print(f"{search}: joined, whole {wer(joined_texts, whole):.2%}", end=", ", flush=True)
        print(f"windows {wer(joined_texts, by_windows(decoder, joins)):.2%}", flush=True)
        single = (by_windows(decoder, audio) * rounds)[: hour[2]]
        print(f"{search}: one by one {wer((texts * rounds)[: hour[2]], single):.2%}", end=", ", flush=True)
        print(f"30 minutes {wer([hour[1]], by_windows(decoder, [hour[0]])):.2%}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for seconds in (60, 1800):
            words, peak = peak_megabytes(options.run, hour[0][: seconds * RATE], Path(folder))
            print(f"{seconds} s: {words} words, {peak} MB", flush=True)


if __name__ == "__main__":
    main()
