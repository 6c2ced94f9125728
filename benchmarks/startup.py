"""How long commands take until they answer: CPU seconds, all their threads and libraries included.

    python benchmarks/startup.py          # a table; --json FILE also writes it

A model is trained for two steps first. Each command runs in a process of its own, in turns; the fastest of the rounds
is shown. The peer of `transcribe` is a script that does the same with `transformers` and soundfile alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

PEER = """
import soundfile, sys
from transformers import AutoProcessor, SpeechEncoderDecoderModel
model = SpeechEncoderDecoderModel.from_pretrained(sys.argv[1]).eval()
processor = AutoProcessor.from_pretrained(sys.argv[1])
audio, rate = soundfile.read(sys.argv[2], dtype="float32")
inputs = processor(audio, sampling_rate=rate, return_tensors="pt")
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=200), skip_special_tokens=True)[0])
"""


def measured(command: list[str], folder: Path) -> tuple[float, float]:
    """CPU and wall seconds of a command."""
    start = time.perf_counter()
    with (folder / "printed").open("w") as printed:
        child = subprocess.Popen(command, stdout=printed, stderr=printed)
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode in (0, 2), (folder / "printed").read_text()
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - start


def commands(run: Path, audio: Path) -> dict[str, list[str]]:
    sedtrain = [sys.executable, "-m", "sedtrain"]
    return {
        "--help": [*sedtrain, "--help"],
        "a mistake": [*sedtrain, "optimizer.lrr=3"],
        "import of sedtrain.load": [sys.executable, "-c", "from sedtrain import load"],
        "task=transcribe": [*sedtrain, "task=transcribe", f"checkpoint={run}", f"audio={audio}"],
        "the same, transformers": [sys.executable, "-c", PEER, str(run / "model"), str(audio)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder, run, audio = Path(name), Path(name, "run"), Path(name, "a.wav")
        soundfile.write(audio, np.random.default_rng(0).normal(0, 0.1, 3 * 16_000), 16_000)
        training = ["trainer.max_steps=2", f"run_dir={run}", "decoding.max_new_tokens=5"]
        measured([sys.executable, "-m", "sedtrain", *training], folder)
        found = commands(run, audio)
        rounds = [{each: measured(command, folder) for each, command in found.items()} for _ in range(options.rounds)]
    fastest = {
        each: [min(seconds) for seconds in zip(*(times[each] for times in rounds), strict=True)] for each in found
    }
    for each, (cpu, wall) in fastest.items():
        print(f"{each:24} {cpu:6.2f} s CPU  {wall:6.2f} s")
    if options.json:
        options.json.write_text(json.dumps({each: {"cpu": c, "wall": w} for each, (c, w) in fastest.items()}, indent=2))


if __name__ == "__main__":
    main()
