"""Times of words beside those in which espeak-ng spoke them, on the embedded corpus.

    python -m sedtrain encoder=hubert decoder=bert run_dir=RUN    # the model, about eight minutes
    pip install espeakng-loader
    python benchmarks/borders.py RUN                              # a minute; --splits train: two

The lines of the corpus are spoken again, for espeak-ng to say where each phoneme begins. A word lasts from its first
phoneme to the pause or the word behind its last one. The corpus's own audio is transcribed, each utterance alone; those
whose text is right count.
"""

import argparse
import io
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import soundfile
import torch

import sedtrain
from sedtrain.decoding.timestamps import FrameTimes

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import spoken_digits

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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a training with loss=joint on the embedded corpus")
    parser.add_argument("--splits", nargs="+", default=["validation", "test"])
    parser.add_argument("--search", default="attention")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = sedtrain.load(options.run)
    frame = FrameTimes.of(model).hop
    for split in options.splits:
        words, errors = errors_of(model, split, options.search)
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
