"""The strangest utterances of a corpus: farthest from the median in length, rate of speech, level or silence. N utterances."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, nan

import numpy as np

from sedtrain.inspection.reading import SplitColumns
from sedtrain.inspection.sound import Sound
from sedtrain.inspection.statistics import Floats, robust_scores

STRANGE = 3.5  # robust standard deviations; of normal values one in 2,000 is farther off


@dataclass(frozen=True)
class Feature:
    """Something that every utterance has.

    words:       for people
    least_sigma: smaller deviations are none
    is_log:      whether the logarithm is looked at, since it is distributed evenly to both sides
    """

    words: str
    least_sigma: float
    is_log: bool = False


FEATURES = (
    Feature("{:.2f} s long, median {:.2f} s", 0.05, is_log=True),
    Feature("{:.0f} characters, median {:.0f}", 0.05, is_log=True),
    Feature("{:.1f} characters per second, median {:.1f}", 0.05, is_log=True),
    Feature("{:.1f} dBFS, median {:.1f}", 1.0),
    Feature("{:.0f} % silent, median {:.0f} %", 15.0),
    Feature("{:+.2f} s against what is declared", 0.1),
)


@dataclass(frozen=True)
class Strange:
    """An utterance with the reasons, such as `38.07 s long, median 1.50 s`, the worst first, and the score of that."""

    split: str
    number: int
    id: str
    text: str
    seconds: float
    score: float
    reasons: list[str]


def features_of(columns: SplitColumns, sounds: Mapping[int, Sound]) -> Floats:
    """(F, N) in the order of FEATURES; NaN for what was not decoded, whose numbers `sounds` lacks."""
    seconds, characters = columns.seconds, np.maximum(columns.num_characters, 1)
    values = np.full((len(FEATURES), len(columns)), nan)
    values[0], values[1] = np.log(np.maximum(seconds, 1e-3)), np.log(characters)
    values[2] = values[1] - values[0]
    for number, sound in sounds.items():
        values[3:, number] = sound.level, 100 * sound.silence, sound.seconds - seconds[number]
    return values


def strangest(splits: Sequence[SplitColumns], sounds: Sequence[Mapping[int, Sound]], most: int) -> list[Strange]:
    """The utterances of all splits with the highest scores, of which one is that of its strangest feature."""
    places = [(columns, number) for columns in splits for number in range(len(columns))]
    if not places:
        return []
    values = np.concatenate([features_of(*each) for each in zip(splits, sounds, strict=True)], axis=1)
    scores = np.array([robust_scores(row, feature.least_sigma) for row, feature in zip(values, FEATURES, strict=True)])
    sizes = np.abs(np.nan_to_num(scores))
    found = []
    for place in np.argsort(-sizes.max(axis=0), kind="stable")[:most].tolist():
        columns, number = places[place]
        by_size = np.argsort(-sizes[:, place]).tolist()
        told = [row for row in by_size if sizes[row, place] >= STRANGE] or by_size[:1]
        reasons = [reason(FEATURES[row], values[row, place], float(np.nanmedian(values[row]))) for row in told]
        score = float(sizes[by_size[0], place])
        lengths = columns.lengths[number]
        found.append(
            Strange(columns.split, number, columns.ids[number], columns.texts[number], lengths, score, reasons)
        )
    return found


def reason(feature: Feature, value: float, median: float) -> str:
    return feature.words.format(*(map(exp, (value, median)) if feature.is_log else (value, median)))
