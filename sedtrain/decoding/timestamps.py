"""The times of words: from frames to seconds by the encoder's frame rate, with borders where the audio is quiet.

S samples, L blocks of 10 ms.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import Any, Self

import torch
from torch import Tensor

from sedtrain.decoding.hypotheses import HeardWord
from sedtrain.decoding.transcription import Word
from sedtrain.models.encoder import frame_spacing
from sedtrain.models.saved import SavedModel

KALDI_HOP, KALDI_WINDOW = 0.010, 0.025  # seconds, for features whose extractor names no hop
BLOCKS_PER_SECOND = 100
QUIET_DB = -37.0  # a block is quiet below this level, relative to the loudest block
ABOVE_FLOOR_DB, MOST_DB = 3.0, -20.0  # or up to 3 dB above the quietest tenth of the blocks, but not above -20 dB
QUIET_END_DB = -30.0  # replaces QUIET_DB at the end of a word, where a room still echoes
GAP = 10  # quiet blocks in a row that end a word; the stop before a "t" has fewer
DB_PER_BLOCK = 10.0  # cost of a border for each block that it lies inside a word as CTC heard it
PAUSE_DB = -150.0  # cost of a border at a pause, which is taken unless next to nothing would be left of a word
DURATION_DB = 60.0  # cost of a word that lasts e times as long as its letters say, or 1/e of it
MORE_LETTERS = 10  # added to the letters of each word, since short words last longer than their letters say


@dataclass(frozen=True)
class FrameTimes:
    """Seconds from frame to frame of the encoder, and the centre of the first frame."""

    hop: float
    first: float

    @classmethod
    def of(cls, saved: SavedModel) -> Self:
        """From the receptive field of a frame in inputs of the encoder, and of an input in samples."""
        inputs, first = frame_spacing(saved.model.encoder)
        hop, first_input = input_times(saved.feature_extractor)
        return cls(inputs * hop, first_input + (first - 0.5) * hop)

    def border(self, frame: int) -> float:
        """The second between a frame and the one before it."""
        return self.first + (frame - 0.5) * self.hop


def input_times(extractor: Any) -> tuple[float, float]:
    """Seconds from input to input of the encoder (samples, or frames of features), and the centre of the first.

    Extractors with a hop_length centre their frames; the others in `transformers` follow Kaldi.
    """
    if extractor.model_input_names[0] == "input_values":
        return 1 / extractor.sampling_rate, 0.5 / extractor.sampling_rate
    if hop := getattr(extractor, "hop_length", None):
        return hop / extractor.sampling_rate, 0.0
    stacked = getattr(extractor, "stride", 1)
    return stacked * KALDI_HOP, (KALDI_WINDOW + (stacked - 1) * KALDI_HOP) / 2


def timed(words: Sequence[HeardWord], audio: Tensor, sampling_rate: int, times: FrameTimes) -> tuple[Word, ...]:
    """Words in seconds of their (S,) audio: each from its first to its last loud block, within the borders to others."""
    if not words:
        return ()
    levels = decibels(audio, sampling_rate)
    spans = [tuple(round(times.border(f) * BLOCKS_PER_SECOND) for f in (word.start, word.end)) for word in words]
    noise = min(sorted(levels)[len(levels) // 10] + ABOVE_FLOOR_DB, MOST_DB)
    limit, limit_behind = max(QUIET_DB, noise), max(QUIET_END_DB, noise)
    audible = [max(level, limit) for level in levels]
    inner = best_borders(audible, limit, candidates(audible, limit, spans), [len(word.text) for word in words])
    borders = [0, *inner, len(levels)]
    timed_words = []
    for word, (start, end), lowest, highest in zip(words, spans, borders[:-1], borders[1:], strict=True):
        first = max(lowest, min(start, highest - 1))
        loudest = max(range(first, max(first + 1, min(end, highest))), key=levels.__getitem__)
        start = reached(levels, limit, loudest, range(loudest, lowest - 1, -1))
        end = reached(levels, limit_behind, loudest, range(loudest, highest)) + 1
        timed_words.append(
            Word(
                word.text,
                start / BLOCKS_PER_SECOND,
                min(end / BLOCKS_PER_SECOND, len(audio) / sampling_rate),
                word.confidence,
            )
        )
    return tuple(timed_words)


def decibels(audio: Tensor, sampling_rate: int) -> list[float]:
    """(S,) audio -> L levels of blocks of 10 ms, relative to the loudest, at least -60."""
    number = -(-len(audio) * BLOCKS_PER_SECOND // sampling_rate)
    edges = (torch.arange(number + 1) * sampling_rate // BLOCKS_PER_SECOND).clamp(max=len(audio))
    energy = torch.nn.functional.pad(audio.double().square().cumsum(0), (1, 0))[edges]
    power = energy.diff() / edges.diff().clamp(min=1)
    levels: list[float] = (10 * (power / power.max().clamp(min=1e-12)).clamp(min=1e-6).log10()).tolist()
    return levels


def candidates(
    levels: Sequence[float], limit: float, spans: Sequence[tuple[int, ...]]
) -> list[list[tuple[int, float]]]:
    """Blocks at which each word but the last may end, with their costs in dB.

    They lie between the middles of two neighbouring words as CTC heard them: blocks that are quieter than the blocks beside
    them, and the first block of a pause.

    limit: the lowest level; GAP blocks of it are a pause
    spans: blocks in which CTC hears the words
    """
    middles = [max(0, min(sum(span) // 2, len(levels) - 1)) for span in spans]
    found = []
    for (first, last), ((_, ended), (begun, _)) in zip(pairwise(middles), pairwise(spans), strict=True):
        blocks = range(first, max(first, last) + 1)
        pauses = (block for block in blocks if block >= ended and max(levels[block : block + GAP]) <= limit)
        outside = (DB_PER_BLOCK * max(ended - block, block - begun, 0) for block in blocks)
        costs = [levels[block] + each for block, each in zip(blocks, outside, strict=True)]
        around = zip([math.inf, *costs], costs, [*costs[1:], math.inf], blocks, strict=False)
        quietest = [(block, cost) for before, cost, behind, block in around if before > cost <= behind]
        found.append([*quietest, *((block, PAUSE_DB) for block in islice(pauses, 1))])
    return found


def best_borders(
    levels: Sequence[float], limit: float, offered: Sequence[Sequence[tuple[int, float]]], letters: Sequence[int]
) -> list[int]:
    """The best of the blocks `offered` for each border: costs are low, and words last as long as their letters say.

    A stop inside a word is often quieter than the border of two words, but a cut there would leave very short and long words.
    """
    loud = [0, *accumulate(level > limit for level in levels)]
    shares = [(number + MORE_LETTERS) / sum(each + MORE_LETTERS for each in letters) for number in letters]
    paths = [(0.0, [0])]
    for blocks, share in zip([*offered, [(len(levels), 0.0)]], shares, strict=True):
        expected = max(1.0, share * loud[-1])
        paths = [
            min(
                (so_far + cost + DURATION_DB * math.log(max(loud[block] - loud[path[-1]], 0.5) / expected) ** 2, path)
                for so_far, path in paths
            )
            for block, cost in blocks
        ]
        paths = [(cost, [*path, block]) for (cost, path), (block, _) in zip(paths, blocks, strict=True)]
    return paths[0][1][1:-1]


def reached(levels: Sequence[float], limit: float, loudest: int, blocks: range) -> int:
    """The last block above the limit on the way from the loudest, before more than GAP quiet blocks in a row."""
    last = loudest
    for block in blocks:
        if abs(block - last) > GAP:
            break
        last = block if levels[block] > limit else last
    return last
