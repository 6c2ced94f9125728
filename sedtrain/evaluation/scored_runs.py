"""Reads a run's results.json and hypotheses.jsonl. They may be a stranger's: sizes are bounded, contents checked."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from math import nan
from pathlib import Path
from typing import Any

from sedtrain.errors import UserError
from sedtrain.evaluation.metrics import METRICS
from sedtrain.evaluation.results import BestHypothesis, Results, TrainingTotals
from sedtrain.evaluation.statistics import Interval
from sedtrain.plain import plain_value
from sedtrain.ranges import BLEU_TOKENIZERS
from sedtrain.text.normalizers import NORMALIZERS

MAX_BYTES = 1_000_000_000
MAX_LINE = 1_000_000  # bytes of an utterance
WRITE = "write folders of runs that have ended, or of task=evaluate"
TEXTS, OPTIONAL, NUMBERS = ("id", "reference", "hypothesis"), ("speaker", "language"), ("seconds", "score")
COUNTED = ("num_utterances", "audio_seconds", "num_empty", "num_cut", "num_speakers", "num_without_speaker")
LARGEST = 1e300  # JSON can spell numbers that no float can hold
HALF = re.compile("[\ud800-\udfff]")
"""Halves of surrogate pairs, which JSON can spell and no file can hold."""


@dataclass(frozen=True)
class ScoredRun:
    """The scores of a run: names of its metrics, how they were computed, and its utterances by id.

    metrics: names in METRICS; own: other names
    """

    folder: Path
    split: str
    data: str
    metrics: list[str]
    own: list[str]
    normalizer: Mapping[str, str]
    signatures: Mapping[str, str]
    utterances: Mapping[str, BestHypothesis]

    @property
    def tokenize(self) -> str:
        """The tokenizer of BLEU; never one that sacrebleu would download."""
        found = re.search(r"\|tok:([\w-]+)\|", self.signatures.get("bleu", ""))
        return found[1] if found and found[1] in BLEU_TOKENIZERS else "13a"

    @classmethod
    def read(cls, folder: str) -> "ScoredRun":
        """Raises UserError if a file is missing, too large, or holds something else."""
        place = Path(folder).expanduser()
        stored = stored_results(place, "runs", folder, WRITE)
        if not (place / "hypotheses.jsonl").is_file():
            raise UserError("runs", folder, f"there is no file {place / 'hypotheses.jsonl'}", WRITE)
        names = list(stored["metrics"])
        return cls(
            place,
            printable(stored["split"]),
            printable(stored.get("data", "")),
            [name for name in names if name in METRICS],
            [printable(name) for name in names if name not in METRICS],
            printable_values(stored["normalizer"]),
            printable_values(stored.get("signatures", {})),
            read_utterances(place / "hypotheses.jsonl", folder),
        )


def stored_results(folder: Path, option: str, value: str, write: str) -> dict[str, Any]:
    """The content of results.json. Raises UserError if it is missing, too large, or holds something else."""
    file = folder / "results.json"
    if not file.is_file():
        raise UserError(option, value, f"there is no file {file}", write)
    stored: dict[str, Any] = plain_value(file, option, value, write)
    if not is_results(stored):
        raise UserError(option, value, f"{file} holds no results: split, data, metrics, normalizer, signatures", write)
    return stored


def read_results(folder: Path, option: str, value: str, write: str) -> Results:
    """The results in a folder, for a card. Raises UserError of `option`, `value` and `write` if there are none."""
    stored = stored_results(folder, option, value, write)
    counts, learnt, train = (stored.get(name) for name in ("not_scored", "training_normalizer", "train"))
    names_learnt = isinstance(learnt, dict) and all(isinstance(each, str) for each in learnt.values())
    totals = [train.get(each.name) for each in fields(TrainingTotals)[:4]] if isinstance(train, dict) else [None]
    return Results(
        task="translation" if stored.get("task") == "translation" else "transcription",
        split=printable(stored["split"]),
        metrics={printable(name): interval(each) for name, each in stored["metrics"].items()},
        normalizer=printable_values(stored["normalizer"]),
        decoding={},
        rtfx=nan,
        train=TrainingTotals(*totals) if all(map(is_number, totals)) else None,
        skipped={},
        versions={},
        training_normalizer=printable_values(learnt or {}) if names_learnt else None,
        not_scored={printable(name): number for name, number in numbers(counts).items()},
        signatures=printable_values(stored.get("signatures", {})),
        resampled="speaker" if stored.get("resampled") == "speaker" else "utterance",
        data=printable(stored.get("data", "")),
        **{**dict.fromkeys(("num_utterances", "audio_seconds"), 0), **numbers(stored, COUNTED)},
    )


def numbers(stored: Any, names: Iterable[str] | None = None) -> dict[str, Any]:
    """The entries that are numbers, of these names or of all."""
    stored = stored if isinstance(stored, dict) else {}
    return {name: stored[name] for name in names or stored if is_number(stored.get(name))}


def interval(stored: Any) -> Interval:
    """The interval in a table; NaN for a missing number."""
    ends = numbers(stored)
    return Interval(*(float(ends.get(name, nan)) for name in ("value", "low", "high")))


def is_results(stored: Any) -> bool:
    """True if the parts of results.json that are read have the right types."""
    if not isinstance(stored, dict) or not isinstance(stored.get("metrics"), dict):
        return False
    tables: tuple[Any, Any] = stored.get("normalizer"), stored.get("signatures", {})
    if not all(isinstance(table, dict) for table in tables):
        return False
    texts = [stored.get("split"), stored.get("data", ""), *(text for table in tables for text in table.values())]
    return all(isinstance(each, str) for each in texts) and stored["normalizer"].get("name") in NORMALIZERS


def read_utterances(file: Path, folder: str) -> dict[str, BestHypothesis]:
    if file.stat().st_size > MAX_BYTES:
        raise UserError("runs", folder, f"{file} is larger than {MAX_BYTES:,} bytes", WRITE)
    utterances: dict[str, BestHypothesis] = {}
    with file.open("rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), b""), start=1):
            each = parsed(line)
            if each is None:
                wrong = f"line {number} of {file} is no utterance: expected JSON with the texts {', '.join(TEXTS)}"
                raise UserError("runs", folder, wrong, WRITE)
            if each.id in utterances:
                wrong = f"line {number} of {file} has the id {each.id!r} again: utterances cannot be told apart"
                raise UserError(
                    "runs", folder, wrong, "give every utterance its own id (data.columns.id), and score again"
                )
            utterances[each.id] = each
    return utterances


def parsed(line: bytes) -> BestHypothesis | None:
    """The utterance of a line; None if it is none."""
    try:
        stored = json.loads(line) if len(line) <= MAX_LINE else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(stored, dict):
        return None
    known: dict[str, Any] = {name: stored.get(name) for name in (*TEXTS, *OPTIONAL, *NUMBERS)}
    for name, value in known.items():
        fits = is_number(value) if name in NUMBERS else isinstance(value, str) and not HALF.search(value)
        if not (fits or (value is None and name not in TEXTS)):
            return None
    return BestHypothesis(**known)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def printable(text: str) -> str:
    """The text without control characters, which a terminal would obey, and without halves of surrogate pairs."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def printable_values(texts: Mapping[str, str]) -> dict[str, str]:
    return {printable(name): printable(text) for name, text in texts.items()}
