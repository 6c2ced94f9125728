"""The frames of each token of a known text, by CTC: Viterbi over the text's tokens with blanks around them.

B batch, T frames, V vocabulary of the CTC head, U tokens, S = 2 U + 1 states: blank, token, blank, token, ..., blank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from sedtrain.decoding.ctc import IMPOSSIBLE, Lattice


@dataclass(frozen=True)
class AlignedToken:
    """A token in frames `start` to `end`, the last not included; confidence: its mean probability in them."""

    token: int
    start: int
    end: int
    confidence: float


def align(lattice: Lattice, texts: Sequence[Sequence[int]]) -> list[list[AlignedToken] | None]:
    """The most probable path of each of the B texts; None if it has none, as for a text of more tokens than frames.

    Between two equal tokens stands a blank. A text has no end token and no blank.
    Source: Graves et al. 2006.
    """
    states = states_of(texts, lattice.blank).to(lattice.log_probs.device)
    emissions = lattice.of_tokens(states)
    num_states = torch.tensor([2 * len(text) + 1 for text in texts], device=states.device)
    score, path = best_states(emissions, states != states.roll(2, 1), num_states)
    probabilities = emissions.gather(1, path[:, None])[:, 0].exp()
    found = zip(texts, score.tolist(), path.tolist(), probabilities.tolist(), strict=True)
    return [None if score == IMPOSSIBLE else spans(text, *of_frames) for text, score, *of_frames in found]


def states_of(texts: Sequence[Sequence[int]], blank: int) -> Tensor:
    """(B, S) tokens of the states, blanks behind them."""
    longest = max(map(len, texts), default=0)
    states = torch.full((len(texts), 2 * longest + 1), blank)
    for row, text in zip(states, texts, strict=True):
        row[1 : 2 * len(text) : 2] = torch.tensor(text)
    return states


def best_states(emissions: Tensor, skippable: Tensor, num_states: Tensor) -> tuple[Tensor, Tensor]:
    """(B, S, T) log-probabilities -> (B,) score of the best path to the last token or the blank behind it, its (B, T) states.

    skippable: (B, S) the state may follow the one before its predecessor
    """
    scores = emissions[..., 0].masked_fill(torch.arange(emissions.shape[1], device=emissions.device) > 1, IMPOSSIBLE)
    steps = []
    for frame in emissions.unbind(-1)[1:]:
        one, two = (pad(scores, (by, 0), value=IMPOSSIBLE)[:, :-by] for by in (1, 2))
        scores, step = torch.stack([scores, one, torch.where(skippable, two, IMPOSSIBLE)]).max(0)
        scores = scores + frame
        steps.append(step)
    ends = torch.stack([num_states - 1, (num_states - 2).clamp(min=0)], 1)
    score, which = scores.gather(1, ends).max(1)
    path = [ends.gather(1, which[:, None])]
    for step in reversed(steps):
        path.append(path[-1] - step.gather(1, path[-1]))
    return score, torch.cat(path[::-1], 1)


def spans(text: Sequence[int], path: Sequence[int], probabilities: Sequence[float]) -> list[AlignedToken]:
    """The text's tokens with their frames; `path` holds the states of all frames."""
    aligned = []
    for number, token in enumerate(text):
        start = path.index(2 * number + 1)
        end = start + path.count(2 * number + 1)
        aligned.append(AlignedToken(token, start, end, sum(probabilities[start:end]) / (end - start)))
    return aligned
