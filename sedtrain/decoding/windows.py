"""Finds pauses and cuts recordings at them into windows of bounded length, without silence; joins overlapping texts.

A recording is read as a stream, about a minute at a time. silero-vad finds speech where it is installed, else its energy
does. Positions in a plan are hops. S samples, N hops.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import cache
from importlib.util import find_spec
from itertools import accumulate, chain, pairwise
from threading import Lock
from typing import Any, Literal

import numpy as np
import soxr
import torch
from numpy.typing import NDArray

from sedtrain.decoding.transcription import Segment, Word
from sedtrain.errors import UserError
from sedtrain.text.spacing import UNSPACED

Pauses = Literal["auto", "energy", "silero"]
Samples = NDArray[np.float32]
Activity = Callable[[Samples, int], NDArray[np.float64]]
"""(S,) samples at a rate -> (N,) activity of each hop: above 0 where somebody speaks, lowest where it is quietest."""

HOPS_PER_SECOND = 31.25  # 512 samples at 16 kHz, the step of silero-vad
SILENT = -80.0  # dB of full scale: no more than the noise of 16 bits
ABOVE_FLOOR = 6.0  # dB by which speech exceeds the background; the levels of steady noise vary by less than 1 dB
FLOOR_PERCENT = 10  # the background is this percentile of the levels around, even if somebody speaks without a pause
FLOOR_SECONDS = 15  # around means this far on each side, since the background may change
SMOOTHED = 3  # hops that a level is averaged over
SILERO_RATE = 16_000
USES_SILERO = Lock()  # the model keeps a state between hops
MIN_SPEECH = 3  # hops; shorter sounds are clicks
MIN_PAUSE = 8  # hops, 0.25 s; shorter ones are inside words
LONG_PAUSE = 16  # hops, 0.5 s; a longer one always ends a window, like the pause between two training utterances
MARGIN = 6  # hops, 0.2 s of a pause that stay with the speech: words begin and end quietly
OVERLAP = 4  # a window cut inside speech shares a quarter of its length with the next
HELD_SECONDS = 30  # of audio in memory before windows are planned, at least


def samples_per_hop(rate: int) -> int:
    return round(rate / HOPS_PER_SECOND)


def activity_of(pauses: Pauses) -> Activity:
    """The function that finds speech. Raises UserError for `silero` where silero-vad is not installed."""
    installed = find_spec("silero_vad") is not None
    if pauses == "silero" and not installed:
        write = "pip install 'sedtrain[vad]', or write decoding.pauses=energy"
        raise UserError("decoding.pauses", pauses, "silero-vad is not installed", write)
    return by_energy if pauses == "energy" or not installed else by_silero


def by_energy(samples: Samples, rate: int) -> NDArray[np.float64]:
    """Level in dB above silence or above the background, whichever is higher.

    It measures differences between samples, so that a constant offset, rumble and hum count little and most noise is steady.
    """
    hop = samples_per_hop(rate)
    changes = np.diff(samples, append=samples[-1:])
    changes = np.pad(changes, (0, -len(changes) % hop))
    power = np.square(changes.reshape(-1, hop)).mean(1, dtype=np.float64)
    sums = np.convolve(np.pad(power, SMOOTHED // 2, mode="edge"), np.ones(SMOOTHED), "valid")
    levels = 10 * np.log10(sums / SMOOTHED + 1e-12)
    around, step = round(FLOOR_SECONDS * HOPS_PER_SECOND), round(5 * HOPS_PER_SECOND)
    firsts = range(0, len(levels), step)
    near = [levels[max(0, first - around) : first + step + around] for first in firsts]
    floors = np.repeat([np.percentile(each, FLOOR_PERCENT) for each in near], step)[: len(levels)]
    return levels - np.maximum(floors + ABOVE_FLOOR, SILENT)


def by_silero(samples: Samples, rate: int) -> NDArray[np.float64]:
    """Probability of speech by silero-vad, minus one half; the package brings its model."""
    hop, length = samples_per_hop(SILERO_RATE), -(-len(samples) // samples_per_hop(rate))
    if rate != SILERO_RATE:
        samples = soxr.resample(samples, rate, SILERO_RATE)
    samples = np.pad(samples, (0, max(0, length * hop - len(samples))))[: length * hop]
    model = silero()
    with USES_SILERO, torch.inference_mode():
        model.reset_states()
        found = [model(each[None], SILERO_RATE).item() for each in torch.from_numpy(samples).split(hop)]
    return np.array(found) - 0.5


@cache
def silero() -> Any:
    """The model of silero-vad. Its import changes the number of threads of the whole process, which is set back."""
    num_threads = torch.get_num_threads()
    import silero_vad

    torch.set_num_threads(num_threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit
        return silero_vad.load_silero_vad()


@dataclass(frozen=True)
class Span:
    """Hops from `start` to before `end`; overlaps: it begins inside the span before, as no pause was in reach."""

    start: int
    end: int
    overlaps: bool = False

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Window:
    """Samples of a recording, beginning at sample `start`; overlaps: see Span."""

    start: int
    samples: Samples
    overlaps: bool = False


def planned(activity: NDArray[np.float64], limit: int, overlaps: bool = False) -> list[Span]:
    """Windows of at most `limit` hops that hold all speech, in order of time.

    overlaps: the first one begins inside a window that was planned earlier
    """
    windows: list[Span] = []
    for span in speech(activity, limit):
        for piece in pieces(span, activity, limit):
            last = windows[-1] if windows else None
            is_near = last and not piece.overlaps and piece.start - last.end + 2 * MARGIN < LONG_PAUSE
            if last and is_near and piece.end - last.start <= limit:
                windows[-1] = replace(last, end=piece.end)
            else:
                windows.append(piece)
    if windows and overlaps:
        windows[0] = replace(windows[0], overlaps=True)
    return windows


def speech(activity: NDArray[np.float64], limit: int) -> list[Span]:
    """Stretches of speech between pauses, with margins of at most half a pause that keep them within the limit."""
    starts, ends = np.flatnonzero(np.diff(np.pad(activity > 0, 1).astype(int))).reshape(-1, 2).T
    is_pause = starts[1:] - ends[:-1] >= MIN_PAUSE
    bounds = zip(starts[np.r_[True, is_pause]], ends[np.r_[is_pause, True]], strict=True) if len(starts) else ()
    spans = [Span(int(start), int(end)) for start, end in bounds if (activity[start:end] > 0).sum() >= MIN_SPEECH]
    borders = [0, *((one.end + two.start) // 2 for one, two in pairwise(spans)), len(activity)]
    margins = [min(MARGIN, (limit - len(span)) // 2) if len(span) <= limit else MARGIN for span in spans]
    return [
        Span(max(span.start - margin, before), min(span.end + margin, behind))
        for span, margin, (before, behind) in zip(spans, margins, pairwise(borders), strict=False)
    ]


def pieces(span: Span, activity: NDArray[np.float64], limit: int) -> Iterator[Span]:
    """A span in pieces of at most `limit`, cut at the quietest hop of a piece's second half; if that is loud, they overlap."""
    while len(span) > limit:
        first = span.start + (limit + 1) // 2
        cut = first + int(activity[first : span.start + limit].argmin())
        if activity[cut] <= 0:
            yield replace(span, end=cut)
            span = Span(cut, span.end)
        else:
            cut = span.start + limit
            yield replace(span, end=cut)
            span = Span(cut - limit // OVERLAP, span.end, overlaps=True)
    yield span


def windows_of(blocks: Iterable[Samples], rate: int, seconds: float, activity_of: Activity) -> Iterator[Window]:
    """The windows of a recording, each of at most `seconds`. A short recording is one window, a silent one has none.

    blocks: its samples from beginning to end
    """
    hop, limit = samples_per_hop(rate), max(4, int(seconds * rate) // samples_per_hop(rate))
    enough = max(HELD_SECONDS * rate, 4 * limit * hop)
    held, first, overlaps = np.zeros(0, np.float32), 0, False
    for block, following in pairwise(chain(blocks, [None])):
        assert block is not None  # None only follows the last one
        held, is_last = np.concatenate([held, block]), following is None
        if len(held) < enough and not is_last:
            continue
        activity = activity_of(held, rate)
        spans, length = planned(activity, limit, overlaps), len(activity)
        if is_last and not first and round(len(held) / rate, 2) <= seconds:
            spans = spans and [Span(0, length)]
        done = spans if is_last or not spans or spans[-1].end + LONG_PAUSE <= length else spans[:-1]
        for span in done:
            yield Window(first + span.start * hop, held[span.start * hop : span.end * hop], span.overlaps)
        waiting = spans[len(done)] if len(done) < len(spans) else Span(max(0, length - LONG_PAUSE), length)
        held, first, overlaps = held[waiting.start * hop :].copy(), first + waiting.start * hop, waiting.overlaps


def joined(one: Segment, two: Segment) -> tuple[Segment, Segment]:
    """Two overlapping segments, cut so that the words they share stand once and their times meet in the overlap."""
    texts = one.text + two.text
    space, split = ("", list) if " " not in texts and UNSPACED.search(texts) else (" ", str.split)
    first, second = split(one.text), split(two.text)
    kept, dropped = seam(first, second)
    one_words = one.words and within(one.words, 0, len("".join(first[:kept])))
    two_words = two.words and within(two.words, len("".join(second[:dropped])), len(two.text))
    border = (one.end + two.start) / 2
    if one_words and two_words:
        border = min(max((one_words[-1].end + two_words[0].start) / 2, two.start), one.end)
        one_words = tuple(replace(each, start=min(each.start, border), end=min(each.end, border)) for each in one_words)
        two_words = tuple(replace(each, start=max(each.start, border), end=max(each.end, border)) for each in two_words)
    return (
        replace(one, text=space.join(first[:kept]), end=border, words=one_words, others=()),
        replace(two, text=space.join(second[dropped:]), start=border, words=two_words, others=()),
    )


def within(words: Sequence[Word], first: int, last: int) -> tuple[Word, ...]:
    """The words from letter `first` to before letter `last`, cut there: without spaces in the script, a word can be long."""
    ends = [0, *accumulate(len(word.text) for word in words)]
    pieces = [word.text[max(first - start, 0) : max(last - start, 0)] for word, start in zip(words, ends, strict=False)]
    return tuple(replace(word, text=piece) for word, piece in zip(words, pieces, strict=True) if piece)


def seam(first: Sequence[str], second: Sequence[str]) -> tuple[int, int]:
    """Number of words to keep of the first text, and to drop of the second, which repeats the end of the first.

    Both count to the end of the longest sequence that the first text's second half shares with the second's first half.
    """
    before, until = len(first) // 2, -(-len(second) // 2)
    match = SequenceMatcher(None, first[before:], second[:until], autojunk=False).find_longest_match()
    return (before + match.a + match.size, match.b + match.size) if match.size else (len(first), 0)
