"""Finds the outliers of a corpus: utterances with an unusual length, text, level or silence. N utterances."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sedtrain.data.buckets import Floats
from sedtrain.inspection.splits import Entry, SplitEntries

NUM_STRANGE = 10
NORMAL_MAD, NORMAL_MEAN_DEVIATION = 1.4826, 1.2533  # sigma of a normal distribution, in units of these deviations
STRANGE = 3.5  # robust standard deviations; of normal values one in 2,000 is farther off
FEATURES = (  # text with value and median, smallest standard deviation, whether it is that of the logarithm
    ("{:.2f} s long, median {:.2f} s", 0.05, True),
    ("{:.0f} characters, median {:.0f}", 0.05, True),
    ("{:.1f} characters per second, median {:.1f}", 0.05, True),
    ("{:.1f} dBFS, median {:.1f}", 1.0, False),
    ("{:.0f} % silent, median {:.0f} %", 15.0, False),
    ("{:+.2f} s against what is declared", 0.1, False),
)


@dataclass(frozen=True)
class Strange:
    """An outlier with the reasons, such as `38.07 s long, median 1.50 s`, worst first; `score` is that of the worst."""

    split: str
    number: int
    id: str
    text: str
    seconds: float
    score: float
    reasons: list[str]


def strangest(splits: Sequence[SplitEntries]) -> list[Strange]:
    """Utterances of all splits with the highest scores; each is scored by its most unusual feature."""
    located = [(split.split, number, entry) for split in splits for number, entry in enumerate(split.entries)]
    if not located:
        return []
    values = np.array([features(entry) for *_, entry in located]).T
    scores = [
        robust_scores(np.log(row) if is_log else row, sigma)
        for row, (_, sigma, is_log) in zip(values, FEATURES, strict=True)
    ]
    sizes = np.abs(np.nan_to_num(scores))
    found = []
    for column in np.argsort(-sizes.max(axis=0), kind="stable")[:NUM_STRANGE].tolist():
        split, number, entry = located[column]
        by_size = np.argsort(-sizes[:, column]).tolist()
        shown = [row for row in by_size if sizes[row, column] >= STRANGE] or by_size[:1]
        reasons = [FEATURES[row][0].format(values[row, column], np.nanmedian(values[row])) for row in shown]
        score = float(sizes[:, column].max())
        found.append(Strange(split, number, entry.id, entry.text, entry.seconds, score, reasons))
    return found


def features(entry: Entry) -> list[float]:
    """Values in the order of FEATURES; NaN where an utterance was not decoded."""
    seconds, characters, sound = max(entry.seconds, 1e-3), max(len(entry.text), 1), entry.sound
    heard = (sound.level, 100 * sound.silence, sound.seconds - entry.seconds) if sound else [np.nan] * 3
    return [seconds, characters, characters / seconds, *heard]


def robust_scores(values: Floats, least_sigma: float) -> Floats:
    """(N,) deviations from the median, in robust sigmas of at least `least_sigma`; NaN stays NaN.

    The sigma comes from the median deviation, or from the mean one if more than half of the values are equal
    (Iglewicz and Hoaglin, 1993).
    """
    if np.isnan(values).all():
        return values
    distance = values - np.nanmedian(values)
    sigma = NORMAL_MAD * np.nanmedian(np.abs(distance)) or NORMAL_MEAN_DEVIATION * np.nanmean(np.abs(distance))
    return distance / max(float(sigma), least_sigma)
