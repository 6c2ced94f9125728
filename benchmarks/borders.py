"""Times of words beside those in which espeak-ng spoke them, on the embedded corpus.

    python -m sedtrain encoder=hubert decoder=bert run_dir=RUN    # the model, about eight minutes
    pip install espeakng-loader
    python benchmarks/borders.py RUN                              # a minute; --splits train: two; --joined: two

The lines of the corpus are spoken again, for espeak-ng to say where each phoneme begins. A word lasts from its first
phoneme to the pause or the word behind its last one. The corpus's own audio is transcribed, each utterance alone; those
whose text is right count. --joined transcribes a split as one recording, with pauses of 0.5 to 1.5 s of faint noise between
its utterances, again and again until it lasts 30 minutes; words that are right count.
"""

import argparse
import io
import sys
from collections import Counter
from itertools import cycle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import soundfile
import torch
from rapidfuzz.distance import Levenshtein

import sedtrain
from sedtrain.data.audio import read_audio
from sedtrain.decoding.timestamps import FrameTimes

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import spoken_digits

RATE = 16_000
WITHIN = 2  # frames
MOST = 600  # utterances of a split
CORPUS = Path(sedtrain.__file__).parent / "data/spoken_digits"


def errors_of(model, split, search):
    """The words of utterances whose text is right, and the (W, 2) seconds by which they begin and end too late."""
    words, errors = [], []
    for number, row in enumerate(pq.read_table(CORPUS / f"{split}.parquet").to_pylist()[:MOST]):
        _, known = spoken_digits.speak_with_borders(spoken_digits.draw(split, number))
        samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        found = model.transcription(samples, sampling_rate=rate, search=search, pauses="energy")
        if found.text == row["text"]:
            of_line = [word for segment in found.segments for word in segment.words]
            words += [word.text for word in of_line]
            errors.append(np.array([(word.start, word.end) for word in of_line]) - known)
    return words, np.concatenate(errors)


def errors_of_recording(model, split, search):
    """The same of a recording of 30 minutes."""
    random, parts, texts, known, seconds = np.random.default_rng(0), [], [], [], 0.0
    for number, row in cycle(enumerate(pq.read_table(CORPUS / f"{split}.parquet").to_pylist())):
        if seconds > 1800:
            break
        pause = 1e-4 * random.standard_normal(int(random.uniform(0.5, 1.5) * RATE))
        parts += [read_audio(row["audio"]["bytes"], RATE).numpy(), pause.astype(np.float32)]
        known.append(seconds + spoken_digits.speak_with_borders(spoken_digits.draw(split, number))[1])
        texts += row["text"].split()
        seconds += (len(parts[-2]) + len(parts[-1])) / RATE
    found = model.transcription(np.concatenate(parts), sampling_rate=RATE, search=search, pauses="energy")
    heard = [word for segment in found.segments for word in segment.words or ()]
    same = Levenshtein.opcodes(texts, [word.text for word in heard]).as_matching_blocks()
    pairs = [(each.a + number, each.b + number) for each in same for number in range(each.size)]
    known = np.concatenate(known)
    errors = [np.array([heard[second].start, heard[second].end]) - known[first] for first, second in pairs]
    return [texts[first] for first, _ in pairs], np.array(errors)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a training with loss=joint on the embedded corpus")
    parser.add_argument("--splits", nargs="+", default=["validation", "test"])
    parser.add_argument("--search", default="attention")
    parser.add_argument("--joined", action="store_true", help="each split as a recording of 30 minutes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = sedtrain.load(options.run)
    frame = FrameTimes.of(model).hop
    for split in options.splits:
        measured = errors_of_recording if options.joined else errors_of
        words, errors = measured(model, split, options.search)
        is_near = np.abs(errors) <= WITHIN * frame + 1e-9
        print(f"{split}: {len(words)} words, within {WITHIN} frames of {1000 * frame:.0f} ms: ", end="")
        print(
            f"starts {is_near[:, 0].mean():.1%}, ends {is_near[:, 1].mean():.1%}, borders {is_near.mean():.1%}, ",
            end="",
        )
        print(f"words with both {is_near.all(1).mean():.1%}; ", end="")
        print(f"median error {np.median(np.abs(errors)):.3f} s")
        for column, name in enumerate(("starts", "ends")):
            late = Counter(word for word, each in zip(words, errors[:, column], strict=True) if each > WITHIN * frame)
            early = Counter(word for word, each in zip(words, errors[:, column], strict=True) if each < -WITHIN * frame)
            print(f"  {name} too late: {dict(late.most_common(5))}, too early: {dict(early.most_common(5))}")


if __name__ == "__main__":
    main()
