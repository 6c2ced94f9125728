"""Recordings made of the embedded test utterances: their errors by windows and as a whole, and the memory that they take.

    python -m sedtrain encoder=hubert decoder=bert run_dir=RUN    # the model, about eight minutes
    python benchmarks/windows.py RUN                              # four minutes; --only-no-speech: half a minute

joined       utterances one after the other, without pauses, to three times the longest utterance in training: the word
             error rate of the whole at once and by windows
30 minutes   utterances with pauses of 0.5 to 1.5 s of faint noise: the word error rate beside that of the utterances
             one by one
no speech    30 s of silence, noises and music: words, and windows whose text is warned of
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

from sedtrain.build_saved import connect
from sedtrain.config.hydra_calls import create
from sedtrain.config.schema import conf_dir, register
from sedtrain.decoding.recordings import Recording, RecordingDecoder
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


def decoder_of(saved, search, pauses):
    return RecordingDecoder(saved, replace(created("decoding", f"decoding={search}"), pauses=pauses))


def by_windows(decoder, recordings):
    return [decoder.transcription("", [samples]).text for samples in recordings]


def without_speech(seconds=30):
    """(S,) samples by name; the music is a melody above chords, the last noise rises and falls three times a second."""
    times, random = np.arange(seconds * RATE) / RATE, np.random.default_rng(0)
    white = random.standard_normal(len(times))
    spectrum = np.fft.rfft(white)
    pink = np.fft.irfft(spectrum / np.sqrt(np.maximum(1, np.arange(len(spectrum)))), len(times))
    yield "zeros", 0 * times
    yield "white noise", 0.1 * white
    yield "pink noise", 0.2 * pink / pink.std()
    yield "brown noise", 0.001 * np.cumsum(white)
    yield "hum", 0.2 * np.sin(2 * np.pi * 50 * times)
    yield "music", 0.05 * (tones(times, 0.4, (0, 4, 7, 12, 9, 5), 440) + tones(times, 1.6, (0, 5, 7, 0), 110))
    yield "wobbling noise", 0.1 * white * np.sin(3 * np.pi * times) ** 2


def tones(times, seconds, steps, lowest):
    """Notes of so many seconds, `steps` semitones above the lowest, with four overtones; each fades."""
    pitch = lowest * 2 ** (np.array(steps)[(times // seconds).astype(int) % len(steps)] / 12)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    return np.exp(-3 * (times % seconds) / seconds) * sum(np.sin(number * phase) / number for number in range(1, 6))


def show_no_speech(decoder):
    for name, samples in without_speech():
        found = decoder.transcription(name, [samples.astype(np.float32)])
        doubtful = sum(segment.doubt is not None for segment in found.segments if segment.text)
        written = sum(bool(segment.text) for segment in found.segments)
        print(f"{name}: {len(found.text.split())} words, {doubtful} of {written} texts warned of", flush=True)


def peak_megabytes(run, samples, folder):
    soundfile.write(folder / "a.flac", samples, RATE)
    command = [sys.executable, "-c", PROCESS, str(run), str(folder / "a.flac")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a training with loss=joint on the embedded corpus")
    parser.add_argument("--pauses", choices=("energy", "silero"), default="energy")
    parser.add_argument("--only-no-speech", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    saved, data = load(options.run), created("data")
    for search in ("greedy", "joint"):
        print(f"no speech, {search}, pauses by {options.pauses}")
        show_no_speech(decoder_of(saved, search, options.pauses))
    if options.only_no_speech:
        return
    connect(data, saved, ["test"])
    dataset = data.split("test")
    utterances = [dataset.decode(reference) for reference in dataset.kept[["part", "row"]].tolist()]
    audio, texts = [each.audio.numpy() for each in utterances], [each.text for each in utterances]
    longest = saved.max_training_seconds
    joins, joined_texts = zip(*long_utterances(utterances, 3 * longest), strict=True)
    hour = joined(cycle(utterances), 1800, 0.5, 1.5)
    rounds = -(-hour[2] // len(audio))
    print(f"{len(joins)} joined to {3 * longest:.1f} s; {hour[2]} utterances in 30 minutes")
    for search in ("greedy", "joint"):
        decoder = decoder_of(saved, search, options.pauses)
        recording = Recording(decoder, "", [])
        whole = [decoder.decode([(recording, Window(0, samples))])[0].texts[0] for samples in joins]
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
