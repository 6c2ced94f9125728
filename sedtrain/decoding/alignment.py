"""The words of a decoded text, their tokens, and the frames of these by CTC: Viterbi over tokens with blanks around them.

B batch, T frames, V vocabulary of the CTC head, U tokens, S = 2 U + 1 states: blank, token, blank, token, ..., blank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from operator import eq
from statistics import fmean
from unicodedata import category

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from sedtrain.decoding.ctc import IMPOSSIBLE, Lattice
from sedtrain.decoding.hypotheses import HeardWord, Hypotheses
from sedtrain.text.spacing import UNSPACED


@dataclass(frozen=True)
class AlignedToken:
    """A token in frames `start` to before `end`; confidence: its mean probability in them."""

    token: int
    start: int
    end: int
    confidence: float


def align(lattice: Lattice, texts: Sequence[Sequence[int]]) -> list[list[AlignedToken] | None]:
    """The most probable path of each of the B texts; None if there is none, as for a text of more tokens than frames.

    A text has no end token and no blank. The path has a blank between two equal tokens.
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
    """(B, S) tokens of the states, padded with blanks."""
    longest = max(map(len, texts), default=0)
    states = torch.full((len(texts), 2 * longest + 1), blank)
    for row, text in zip(states, texts, strict=True):
        row[1 : 2 * len(text) : 2] = torch.tensor(text)
    return states


def best_states(emissions: Tensor, skippable: Tensor, num_states: Tensor) -> tuple[Tensor, Tensor]:
    """(B, S, T) log-probabilities -> (B,) scores and (B, T) states of the best paths, which end in the last token or blank.

    skippable: (B, S) True if a path may skip the state before this one
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
    """The text's tokens with their frames; `path` holds the state of each frame."""
    aligned = []
    for number, token in enumerate(text):
        start = path.index(2 * number + 1)
        end = start + path.count(2 * number + 1)
        aligned.append(AlignedToken(token, start, end, sum(probabilities[start:end]) / (end - start)))
    return aligned


# --- CTC about the texts of a search


def checked_by_ctc(
    tokenizer: PreTrainedTokenizerBase, lattice: Lattice, found: Sequence[Hypotheses], with_words: bool
) -> list[Hypotheses]:
    """The hypotheses with confidence and agreement of CTC about the best text, and with the frames of its words if asked."""
    silent = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    texts, alone = (
        [[token for token in row if token not in silent] for row in rows]
        for rows in ([each.ids[0] for each in found], lattice.best_path[0])
    )
    return [
        replace(
            each,
            confidence=fmean(token.confidence for token in tokens) if of_ctc and tokens else 0.0,
            agreement=Levenshtein.normalized_similarity(text, of_ctc),
            words=words_of(tokenizer, text, each.texts[0], tokens) if with_words and tokens is not None else None,
        )
        for each, text, of_ctc, tokens in zip(found, texts, alone, align(lattice, texts), strict=True)
    ]


def words_of(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str, aligned: Sequence[AlignedToken]
) -> tuple[HeardWord, ...]:
    """The words of aligned tokens; a word's confidence is the mean of its tokens'."""
    return tuple(
        HeardWord(word, of_word[0].start, of_word[-1].end, fmean(token.confidence for token in of_word))
        for word, first, last in words_in(tokenizer, ids, text)
        for of_word in [aligned[first:last]]
    )


def texts_of(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> list[str]:
    """Texts of rows of tokens, without special tokens and without white space around them."""
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


def words_in(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> Iterator[tuple[str, int, int]]:
    """The words of a decoded text, each with the number of its first token and of the one after its last.

    White space separates words. In scripts without it, such as Chinese, each token is a word, together with its marks.
    """
    tokens = iter(letter_tokens(tokenizer, ids, text))
    for written in text.split():
        word, first, last = "", 0, -1
        for letter in written:
            start, end = next(tokens)
            if word and start > last and may_part(word[-1], letter):
                yield word, first, last + 1
                word = ""
            first = first if word else start
            word, last = word + letter, end
        yield word, first, last + 1


def letter_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> list[tuple[int, int]]:
    """The first and the last token of each letter of a decoded text, without its white space.

    The text is decoded token by token. A letter belongs to the token that makes it appear, and to the tokens just before that
    show nothing yet, such as the first bytes of a character. White space and special tokens belong to no letter.
    """
    letters, found, first = "".join(text.split()), list[tuple[int, int]](), None
    for number, token in enumerate(ids):
        shown = "".join(tokenizer.decode(ids[: number + 1], skip_special_tokens=True).split())
        new = sum(takewhile(bool, map(eq, letters[len(found) :], shown[len(found) :])))
        if first is None and (new > 0 or tokenizer.decode([token], skip_special_tokens=True).strip()):
            first = number
        if new > 0 and first is not None:
            found += [(first, number)] * new
            first = None
    return found


def may_part(left: str, right: str) -> bool:
    """True if a word may end here, in a script without spaces: not before a closing mark, nor after an opening one."""
    closes = category(right)[0] == "M" or category(right) in ("Pe", "Pf", "Po")
    return bool(UNSPACED.match(left) or UNSPACED.match(right)) and not closes and category(left) not in ("Pi", "Ps")
