"""The times of words: frames by CTC, seconds by the frame rate of the encoder, borders where the audio is quiet.

B batch, T frames, U tokens, V vocabulary of the CTC head, S samples, L blocks of 10 ms.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice, pairwise
from statistics import fmean
from typing import Any, Self

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sedtrain.decoding.alignment import AlignedToken, align
from sedtrain.decoding.ctc import Lattice, best_path
from sedtrain.decoding.hypotheses import HeardWord, Hypotheses
from sedtrain.decoding.transcription import Word
from sedtrain.decoding.words import words_in
from sedtrain.models.encoder import frame_spacing
from sedtrain.models.saved import SavedModel

KALDI_HOP, KALDI_WINDOW = 0.010, 0.025  # seconds, of features whose extractor names no hop
BLOCKS = 100  # in a second
QUIET_DB, ABOVE_FLOOR_DB, MOST_DB = -37.0, 3.0, -20.0  # below the loudest; above the quietest tenth; the limit of that
QUIET_END_DB = -30.0  # behind a word, where a room still sounds
GAP = 10  # quiet blocks in a row that end a word; the stop before a "t" has fewer
DB_PER_BLOCK = 10.0  # a border should be so much quieter for each block that it stands within what CTC heard of a word
PAUSE_DB = -150.0  # a border at a pause costs that, and is taken unless next to nothing is left of a word
DURATION_DB = 60.0  # and where a word lasts e times as long as its letters say, or one e-th
MORE_LETTERS = 10  # for each word: short ones last longer than their letters say


# --- frames


def heard(
    tokenizer: PreTrainedTokenizerBase, lattice: Lattice, found: Sequence[Hypotheses], with_words: bool
) -> list[Hypotheses]:
    """The same with what CTC hears of the best texts: how sure it is of their tokens, and with words where these are."""
    silent = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    texts, alone = (
        [[token for token in each.ids[0] if token not in silent] for each in written]
        for written in (found, best_path(lattice, lattice.log_probs.shape[1]))
    )
    sure = align(lattice, texts)
    found = [
        replace(
            each,
            confidence=fmean(token.confidence for token in tokens) if of_ctc and tokens else 0.0,
            agreement=Levenshtein.normalized_similarity(text, of_ctc),
        )
        for each, text, of_ctc, tokens in zip(found, texts, alone, sure, strict=True)
    ]
    if not with_words:
        return found
    rows = zip(found, texts, sure, strict=True)
    return [replace(each, words=joined(tokenizer, text, each.texts[0], tokens)) for each, text, tokens in rows]


def joined(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str, aligned: Sequence[AlignedToken] | None
) -> tuple[HeardWord, ...] | None:
    """Words of tokens with their frames, and the means of their confidences."""
    if aligned is None:
        return None
    return tuple(
        HeardWord(word, of_word[0].start, of_word[-1].end, fmean(token.confidence for token in of_word))
        for word, first, last in words_in(tokenizer, ids, text)
        for of_word in [aligned[first:last]]
    )


# --- seconds


@dataclass(frozen=True)
class FrameTimes:
    """Seconds between the encoder's frames, and the centre of the first."""

    hop: float
    first: float

    @classmethod
    def of(cls, saved: SavedModel) -> Self:
        """From the frames' receptive field in inputs of the encoder, and from that of the inputs."""
        inputs, first = frame_spacing(saved.model.encoder)
        hop, first_input = input_times(saved.feature_extractor)
        return cls(inputs * hop, first_input + (first - 0.5) * hop)

    def border(self, frame: int) -> float:
        """The second between a frame and the one before it."""
        return self.first + (frame - 0.5) * self.hop


def frames_per_second(saved: SavedModel) -> float:
    """Frames that the decoder gets of a second of audio: those of the encoder, joined or made anew by the adapter."""
    return adapted_frames(saved, 1000) / 1000 / FrameTimes.of(saved).hop


@torch.no_grad()
def adapted_frames(saved: SavedModel, number: int) -> int:
    """Frames that the decoder gets of so many of the encoder."""
    model = saved.model
    frames = torch.zeros(1, number, model.encoder_output_dim, dtype=model.dtype, device=model.device)
    with torch.random.fork_rng(devices=[]):  # dropout draws nothing from the run's own
        adapted = model.adapt({"last_hidden_state": frames}, None).last_hidden_state
    assert adapted is not None
    return int(adapted.shape[1])


def input_times(extractor: Any) -> tuple[float, float]:
    """Seconds between the inputs of the encoder, and the centre of the first: samples, or frames of features.

    An extractor with a hop_length centres its frames, the others of `transformers` compute as Kaldi does.
    """
    if extractor.model_input_names[0] == "input_values":
        return 1 / extractor.sampling_rate, 0.5 / extractor.sampling_rate
    if hop := getattr(extractor, "hop_length", None):
        return hop / extractor.sampling_rate, 0.0
    stacked = getattr(extractor, "stride", 1)
    return stacked * KALDI_HOP, (KALDI_WINDOW + (stacked - 1) * KALDI_HOP) / 2


def timed(words: Sequence[HeardWord], audio: Tensor, sampling_rate: int, times: FrameTimes) -> tuple[Word, ...]:
    """Words in seconds of their (S,) audio: from the first loud block to the last, up to the borders with their neighbours."""
    if not words:
        return ()
    levels = decibels(audio, sampling_rate)
    spans = [tuple(round(times.border(f) * BLOCKS) for f in (word.start, word.end)) for word in words]
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
            Word(word.text, start / BLOCKS, min(end / BLOCKS, len(audio) / sampling_rate), word.confidence)
        )
    return tuple(timed_words)


def decibels(audio: Tensor, sampling_rate: int) -> list[float]:
    """(S,) audio -> (L,) levels below the loudest block, down to -60; a block is 10 ms at any rate."""
    number = -(-len(audio) * BLOCKS // sampling_rate)
    edges = (torch.arange(number + 1) * sampling_rate // BLOCKS).clamp(max=len(audio))
    energy = torch.nn.functional.pad(audio.double().square().cumsum(0), (1, 0))[edges]
    power = energy.diff() / edges.diff().clamp(min=1)
    levels: list[float] = (10 * (power / power.max().clamp(min=1e-12)).clamp(min=1e-6).log10()).tolist()
    return levels


def candidates(
    levels: Sequence[float], limit: float, spans: Sequence[tuple[int, ...]]
) -> list[list[tuple[int, float]]]:
    """Blocks where each word but the last may end, with their costs in dB, from the middle of what CTC heard of it to that of
    the next one: those that are quieter than the blocks beside them, and the first one of a pause.

    limit: the lowest of the levels; GAP such blocks are a pause
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
    """One of the blocks that are offered for each border, so that costs are low and words last as long as their letters say.

    A stop inside a word is often quieter than the border of two words, but would leave very short and very long words.
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
    """The last of some blocks that is louder than the limit, before so many in a row are not."""
    last = loudest
    for block in blocks:
        if abs(block - last) > GAP:
            break
        last = block if levels[block] > limit else last
    return last
