"""The embedded corpus: English digit strings and their German translation, spoken by espeak-ng.

`python tools/spoken_digits.py OUTPUT_FOLDER` writes train.parquet, validation.parquet and test.parquet, as they
ship in `sedtrain/data/spoken_digits`. It needs the PyPI wheel espeakng-loader (espeak-ng with its voices, GPL-3)
on Linux or macOS. The speech is synthetic, and repeats sample by sample for a seed; the files do not repeat byte by
byte, because libsndfile gives each Ogg stream a random serial number.
"""

import _ctypes
import argparse
import ctypes
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import soxr

ENGLISH = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GERMAN = ("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun")
SAMPLING_RATE = 16_000
NUM_UTTERANCES = {"train": 3000, "validation": 200, "test": 250}

# espeak-ng calls its British accent `en`.
ACCENTS = (
    "en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc",
)  # fmt: skip

# Variants per split, women before men; no variant is in two splits. Left out: whispers, croaks, robots, echoes and
# monsters; everything built on the buzzing Klatt synthesiser (adam, benjamin, caleb, david, edward, Reed, mike2,
# announcer); the shrill anika and zac; the distorted AnxiousAndy, boris, ian, kaukovalta, Lee, travis and Tweaky;
# Storm, tied to one accent; and near-copies (fast, Gene2, Henrique, Hugo, gustave, iven2 to iven4, michel, miguel,
# Mr serious, robert, steph2, steph3).
VARIANTS = {
    "train": (
        ("Alicia", "Andrea", "Annie", "aunty", "f3", "f4", "f5", "grandma", "shelby", "steph"),
        (
            "Alex", "Andy", "Denis", "Diogo", "Gene", "Jacky", "Marco", "Mario", "Mike", "Nguyen", "antonio", "ed",
            "grandpa", "iven", "john", "m1", "m2", "m5", "m6", "m8", "marcelo", "max", "norbert", "paul", "pedro",
            "quincy", "rob", "sandro", "victor",
        ),
    ),
    "validation": (("belinda", "f1"), ("Michael", "m4")),
    "test": (("f2", "linda"), ("m3", "m7", "pablo")),
}  # fmt: skip

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "audio": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "text": pa.string(),
        "translation": pa.string(),
        "speaker": pa.string(),
        "seconds": pa.float32(),
    }
)

# From espeak-ng's speak_lib.h.
AUDIO_OUTPUT_SYNCHRONOUS, PHONEME_EVENTS = 2, 1
CHARS_UTF8, ENDPAUSE = 1, 0x1000
RATE, VOLUME, PITCH, RANGE, WORDGAP = 1, 2, 3, 4, 7
WORD, PHONEME = 1, 7
Samples = npt.NDArray[np.float32]


class Event(ctypes.Structure):
    """espeak_EVENT; `name` is that of a phoneme."""

    _fields_ = (
        ("type", ctypes.c_int), ("identifier", ctypes.c_uint), ("text_position", ctypes.c_int), ("length", ctypes.c_int),
        ("milliseconds", ctypes.c_int), ("sample", ctypes.c_int), ("user_data", ctypes.c_void_p), ("name", ctypes.c_char * 8),
    )  # fmt: skip


SynthCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event))


@dataclass(frozen=True)
class Line:
    """One utterance before it is spoken: what is said, by whom, and how."""

    id: str
    digits: tuple[int, ...]
    speaker: str  # accent+variant, the name espeak-ng gives the voice
    words_per_minute: int
    pitch: int  # 0 to 99, 50 is the voice's own; so is the range
    pitch_range: int
    pause: int  # between words, in units of 10 ms at the voice's normal speed
    peak_dbfs: float
    lead_seconds: float  # silence before and after
    tail_seconds: float


def draw(split: str, index: int, seed: int = 0) -> Line:
    """Row `index` of a split, drawn at random; it does not depend on how many rows the split has."""
    random = np.random.default_rng([seed, list(VARIANTS).index(split), index])
    women_or_men = VARIANTS[split][random.integers(2)]
    return Line(
        id=f"{split}-{index:04d}",
        digits=tuple(random.integers(10, size=random.integers(1, 7)).tolist()),
        speaker=f"{random.choice(ACCENTS)}+{random.choice(women_or_men)}",
        words_per_minute=int(random.integers(140, 221)),
        pitch=int(random.integers(35, 66)),
        pitch_range=int(random.integers(30, 71)),
        pause=int(random.integers(0, 5)),
        peak_dbfs=float(random.uniform(-24, -2)),
        lead_seconds=float(random.uniform(0.02, 0.2)),
        tail_seconds=float(random.uniform(0.02, 0.2)),
    )


@contextmanager
def espeak() -> Iterator[tuple[ctypes.CDLL, int]]:
    """espeak-ng and its sampling rate, freshly loaded: pitch flutter otherwise runs on from the utterance before."""
    try:
        import espeakng_loader
    except ImportError:
        raise SystemExit("Speaking the corpus needs espeak-ng. Install it: pip install espeakng-loader") from None
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data_path = espeakng_loader.get_data_path().encode()
    try:
        sampling_rate = library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path, PHONEME_EVENTS)
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # breath noise
        yield library, sampling_rate
    finally:
        library.espeak_Terminate()
        _ctypes.dlclose(library._handle)


def speak(line: Line) -> Samples:
    """The line as 16 kHz mono samples in [-1, 1], with exactly the silence it asks for at both ends."""
    return speak_with_borders(line)[0]


def speak_with_borders(line: Line) -> tuple[Samples, npt.NDArray[np.float64]]:
    """The samples of `speak`, and the (W, 2) seconds in which each word begins and ends."""
    synthesized, sampling_rate, borders = synthesize(line)
    speech = soxr.resample(synthesized, sampling_rate, SAMPLING_RATE)
    first, last = loud(speech)
    speech = speech[first:last] * (10 ** (line.peak_dbfs / 20) / np.abs(speech).max())
    samples = np.pad(speech, [round(seconds * SAMPLING_RATE) for seconds in (line.lead_seconds, line.tail_seconds)])
    return samples, np.array(borders) / sampling_rate - first / SAMPLING_RATE + line.lead_seconds


def synthesize(line: Line) -> tuple[Samples, int, list[tuple[int, int]]]:
    """What espeak-ng speaks: samples, their rate, and where each word begins and ends: at a pause, or the next word."""
    blocks: list[npt.NDArray[np.int16]] = []
    phonemes: list[list[tuple[bytes, int]]] = []  # of each word, with the samples at which they begin

    def keep(samples: Any, num_samples: int, events: Any) -> int:
        if samples and num_samples:
            blocks.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        for event in takewhile(lambda event: event.type, map(events.__getitem__, count())):
            if event.type == WORD:
                phonemes.append([])
            elif event.type == PHONEME and phonemes:
                phonemes[-1].append((event.name, event.sample))
        return 0

    callback = SynthCallback(keep)  # must outlive the synthesis
    with espeak() as (library, sampling_rate):
        library.espeak_SetSynthCallback(callback)
        assert library.espeak_SetVoiceByName(line.speaker.encode()) == 0, f"espeak-ng has no voice {line.speaker}"
        settings = {RATE: line.words_per_minute, PITCH: line.pitch, RANGE: line.pitch_range, WORDGAP: line.pause}
        for parameter, value in (settings | {VOLUME: 20}).items():  # louder, some voices clip
            library.espeak_SetParameter(parameter, value, 0)
        text = words(line.digits, ENGLISH).encode()
        flags = CHARS_UTF8 | ENDPAUSE  # without the pause a voice's reverberation is cut off
        library.espeak_Synth(text, ctypes.c_size_t(len(text) + 1), 0, 1, 0, flags, None, None)
    starts = [word[0][1] for word in phonemes]
    pauses = [[sample for name, sample in word if name.startswith(b"_")] for word in phonemes]
    ends = [pause[0] if pause else start for pause, start in zip(pauses, [*starts[1:], 0], strict=True)]
    return np.concatenate(blocks).astype(np.float32), sampling_rate, list(zip(starts, ends, strict=True))


def loud(speech: Samples) -> tuple[int, int]:
    """The first sample that is louder than 50 dB below the peak, and the one behind the last."""
    found = np.flatnonzero(np.abs(speech) > 10 ** (-50 / 20) * np.abs(speech).max())
    return int(found[0]), int(found[-1]) + 1


def words(digits: tuple[int, ...], names: tuple[str, ...]) -> str:
    return " ".join(names[digit] for digit in digits)


def encode(samples: Samples) -> bytes:
    """Ogg Opus at about 12 kbit/s, which is near the bottom of libsndfile's scale."""
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLING_RATE, format="OGG", subtype="OPUS", compression_level=0.975)
    return file.getvalue()


def spoken_row(line: Line) -> dict[str, Any]:
    """The line's row of the Parquet file."""
    samples = speak(line)
    return {
        "id": line.id,
        "audio": {"bytes": encode(samples), "path": f"{line.id}.opus"},
        "text": words(line.digits, ENGLISH),
        "translation": words(line.digits, GERMAN),
        "speaker": line.speaker,
        "seconds": len(samples) / SAMPLING_RATE,
    }


def write_corpus(folder: Path, num_utterances: dict[str, int] = NUM_UTTERANCES, seed: int = 0) -> None:
    """Speak and write `folder/SPLIT.parquet` for every split; to `datasets` the column `audio` is an Audio feature."""
    features: dict[str, Any] = {field.name: {"dtype": str(field.type), "_type": "Value"} for field in SCHEMA}
    features["audio"] = {"sampling_rate": SAMPLING_RATE, "_type": "Audio"}
    schema = SCHEMA.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    folder.mkdir(parents=True, exist_ok=True)
    for split, num_rows in num_utterances.items():
        rows = [spoken_row(draw(split, index, seed)) for index in range(num_rows)]
        # Each Opus header is a kilobyte of padding, which zstd removes.
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"{split}.parquet", compression="zstd")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.spoken_digits", description="Speak the embedded corpus.")
    parser.add_argument("output_folder", type=Path, help="where train, validation and test.parquet are written")
    folder = parser.parse_args(arguments).output_folder
    try:
        write_corpus(folder)
    except OSError as error:
        raise SystemExit(f"Cannot write to {folder}: {error.strerror}. Name a folder that can be written.") from None


if __name__ == "__main__":
    main()
