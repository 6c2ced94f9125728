"""Texts by CTC alone: the best path, and beam search over prefixes by their probability.

B batch, T frames, V vocabulary of the CTC head, K prefixes of each utterance, U tokens. All scores are natural logarithms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from sedtrain.decoding.hypotheses import Hypotheses
from sedtrain.models.encoder import EncodedSpeech
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

IMPOSSIBLE = -torch.inf
ELEMENTS_AT_ONCE = 2**24  # scores in memory at once, if only a few tokens' scores are kept


@dataclass(frozen=True)
class Lattice:
    """(B, T, V) log-probabilities of each token in each frame. Padded frames are certain blanks, which change no score."""

    log_probs: Tensor
    num_frames: Tensor
    blank: int

    @classmethod
    def of(cls, logits: Tensor, num_frames: Tensor, blank: int, end: int) -> "Lattice":
        """From (B, T, V) scores and (B,) numbers of frames. CTC writes no end token: the others share its probability."""
        no_end = torch.arange(logits.shape[2], device=logits.device) == (end if end != blank else -1)
        log_probs = logits.float().masked_fill(no_end, IMPOSSIBLE).log_softmax(-1)
        padded = torch.arange(logits.shape[1], device=logits.device) >= num_frames[:, None]
        log_probs[padded] = IMPOSSIBLE
        log_probs[..., blank].masked_fill_(padded, 0.0)
        return cls(log_probs, num_frames, blank)

    def rows(self, order: list[int]) -> "Lattice":
        """The utterances at the indices `order`."""
        return Lattice(self.log_probs[order], self.num_frames[order], self.blank)

    @cached_property
    def best_path(self) -> tuple[list[list[int]], list[float]]:
        """The most probable token of each frame, without repetitions and blanks: ids and log-probability per utterance.

        The log-probability belongs to this one path, not to all paths that give the text.
        """
        scores, tokens = self.log_probs.max(-1)
        changes = tokens.diff(dim=1, prepend=torch.full_like(tokens[:, :1], -1)) != 0
        kept = changes & (tokens != self.blank)
        return [row[of_row].tolist() for row, of_row in zip(tokens, kept, strict=True)], scores.sum(1).tolist()

    @cached_property
    def peaks(self) -> Tensor:
        """(B, 1, V) the highest log-probability of each token."""
        return self.log_probs.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)

    @cached_property
    def relative(self) -> Tensor:
        """(B, T, V) probabilities, divided by the peak of their token."""
        return (self.log_probs - self.peaks).exp()

    def of_tokens(self, tokens: Tensor) -> Tensor:
        """(B, K) tokens -> (B, K, T) log-probabilities; -inf for tokens that CTC does not know."""
        frames, vocabulary = self.log_probs.shape[1:]
        known = tokens.clamp(max=vocabulary - 1)
        log_probs = self.log_probs.gather(2, known[:, None].expand(-1, frames, -1)).transpose(1, 2)
        return log_probs.masked_fill((tokens != known)[..., None], IMPOSSIBLE)


def frames_of(encoded: EncodedSpeech) -> Tensor:
    """(B,) numbers of frames."""
    frames, mask = encoded.encoder_frames, encoded.encoder_mask
    assert frames is not None
    return (
        torch.full(frames.shape[:1], frames.shape[1], device=frames.device)
        if mask is None
        else mask.sum(1).to(frames.device)
    )


def lattice_of(model: SpeechEncoderDecoder, encoded: EncodedSpeech) -> Lattice:
    """The lattice of the CTC head's scores; the pad token is the blank, as in training."""
    assert model.ctc_head is not None
    logits = model.ctc_head(encoded.encoder_frames)
    return Lattice.of(logits, frames_of(encoded), model.config.pad_token_id, model.config.eos_token_id)


def lattice_of_tokens(model: SpeechEncoderDecoder, encoded: EncodedSpeech, columns: Sequence[int]) -> Lattice:
    """The lattice of a few tokens, the blank first. The whole vocabulary is in memory for a few frames at a time only."""
    assert model.ctc_head is not None and encoded.encoder_frames is not None
    num_frames, end = frames_of(encoded), model.config.eos_token_id
    tokens = torch.tensor([columns], device=num_frames.device)
    size = max(ELEMENTS_AT_ONCE // model.ctc_head.out_features, 1)
    rows = [
        torch.cat(
            [
                Lattice.of(model.ctc_head(chunk[None]), (number - n * size)[None], columns[0], end).of_tokens(tokens)
                for n, chunk in enumerate(frames.split(size))
            ],
            2,
        )
        for frames, number in zip(encoded.encoder_frames, num_frames, strict=True)
    ]
    return Lattice(torch.cat(rows).mT.contiguous(), num_frames, 0)


def best_path(lattice: Lattice, limits: Sequence[int]) -> list[Hypotheses]:
    """The best path of each utterance, cut to its limit of tokens."""
    rows = zip(*lattice.best_path, limits, strict=True)
    return [Hypotheses([ids[:limit]], [score]) for ids, score, limit in rows]


@dataclass(frozen=True)
class Prefixes:
    """K prefixes of the text of each utterance; a score sums the probability of all texts that begin with the prefix.

    Source: Watanabe et al. 2017 (doi 10.1109/JSTSP.2017.2763455), algorithm 2; its sum over frames is one matrix product here.

    in_token, in_blank: (B, K, T + 1) log-probability of having written the prefix after t frames, in paths that end in its
        last token and in a blank
    last:   (B, K) the last token, -1 for none
    scores: (B, K)
    """

    lattice: Lattice
    in_token: Tensor
    in_blank: Tensor
    last: Tensor
    scores: Tensor

    @classmethod
    def empty(cls, lattice: Lattice) -> "Prefixes":
        """One prefix of each utterance, without a token."""
        in_blank = pad(lattice.log_probs[..., lattice.blank].cumsum(1), (1, 0))[:, None]
        in_token, scores = torch.full_like(in_blank, IMPOSSIBLE), torch.zeros_like(in_blank[..., 0])
        return cls(lattice, in_token, in_blank, torch.full_like(scores, -1, dtype=torch.long), scores)

    @property
    def whole(self) -> Tensor:
        """(B, K) log-probability of the prefix as the whole text."""
        return torch.logaddexp(self.in_token[..., -1], self.in_blank[..., -1])

    def before(self) -> Tensor:
        """(B, K, T) log-probability of having written the prefix before frame t."""
        return torch.logaddexp(self.in_token, self.in_blank)[..., :-1]

    def extensions(self) -> Tensor:
        """(B, K, V) scores of the prefix with one more token."""
        lattice, before = self.lattice, self.before()
        padded = torch.arange(before.shape[2], device=before.device) >= lattice.num_frames[:, None]
        before = before.masked_fill(padded[:, None], IMPOSSIBLE)
        highest = before.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        scores = ((before - highest).exp() @ lattice.relative).log() + highest + lattice.peaks
        last = self.last.clamp(min=0)
        repeated = (self.in_blank[..., :-1] + lattice.of_tokens(last)).logsumexp(-1)
        kept = scores.gather(2, last[..., None])[..., 0]
        scores.scatter_(2, last[..., None], torch.where(self.last < 0, kept, repeated)[..., None])
        scores[..., lattice.blank] = IMPOSSIBLE
        return scores

    def extended(self, parents: Tensor, tokens: Tensor) -> "Prefixes":
        """Prefixes `parents` (B, K'), each with one more token of `tokens` (B, K'); a blank scores -inf."""
        old = self.chosen(parents)
        token = self.lattice.of_tokens(tokens).masked_fill((tokens == self.lattice.blank)[..., None], IMPOSSIBLE)
        blank = self.lattice.log_probs[:, None, :, self.lattice.blank].expand_as(token)
        repeats = (tokens == old.last)[..., None]
        written = torch.where(repeats, old.in_blank[..., :-1], old.before()) + token
        in_token = pad(recurrence(token, written), (1, 0), value=IMPOSSIBLE)
        in_blank = pad(recurrence(blank, in_token[..., :-1] + blank), (1, 0), value=IMPOSSIBLE)
        return Prefixes(self.lattice, in_token, in_blank, tokens, written.logsumexp(-1))

    def chosen(self, parents: Tensor) -> "Prefixes":
        """Prefixes `parents` (B, K') of each utterance."""
        in_token, in_blank = rows_of(self.in_token, parents), rows_of(self.in_blank, parents)
        return Prefixes(self.lattice, in_token, in_blank, self.last.gather(1, parents), self.scores.gather(1, parents))


def recurrence(decay: Tensor, gain: Tensor) -> Tensor:
    """(..., T) r with r[t] = logaddexp(r[t - 1] + decay[t], gain[t]), in log2(T) steps."""
    step = 1
    while step < gain.shape[-1]:
        gain = torch.logaddexp(gain, pad(gain[..., :-step], (step, 0), value=IMPOSSIBLE) + decay)
        decay = decay + pad(decay[..., :-step], (step, 0))
        step *= 2
    return gain


def prefix_beam(lattice: Lattice, num_beams: int, num_best: int, limits: Tensor) -> list[Hypotheses]:
    """The `num_best` texts that are most probable, summed over their paths; keeps `num_beams` prefixes.

    limits: (B,) most tokens of each text
    A prefix is at least as probable as any text that begins with it, so the search ends once no prefix beats the texts found.
    Source: Graves et al. 2006, prefix search, with a beam.
    """
    frames, vocabulary = lattice.log_probs.shape[1:]
    prefixes = Prefixes.empty(lattice)
    ids = torch.zeros(*prefixes.scores.shape, 0, dtype=torch.long, device=prefixes.scores.device)
    best_ids, best_scores = ids[:, :0], prefixes.scores[:, :0]
    for num_tokens in range(min(int(limits.max()), frames) + 1):
        best_ids = torch.cat([pad(best_ids, (0, num_tokens - best_ids.shape[2]), value=lattice.blank), ids], 1)
        whole = prefixes.whole.masked_fill((num_tokens > limits)[:, None], IMPOSSIBLE)
        best_scores = torch.cat([best_scores, whole], 1)
        best_scores, order = best_scores.topk(min(num_best, best_scores.shape[1]))
        best_ids = rows_of(best_ids, order)
        extensions = prefixes.extensions().flatten(1)
        scores, flat = extensions.topk(min(num_beams, extensions.shape[1]))
        is_over = (scores[:, 0] <= best_scores[:, -1]) | (num_tokens >= limits)
        if best_scores.shape[1] == num_best and bool(is_over.all()):
            break
        parents, tokens = flat // vocabulary, flat % vocabulary
        ids = torch.cat([rows_of(ids, parents), tokens[..., None]], 2)
        prefixes = prefixes.extended(parents, tokens)
    found = []
    for rows, scores_of_rows in zip(best_ids.tolist(), best_scores.tolist(), strict=True):
        number = sum(score > IMPOSSIBLE for score in scores_of_rows)  # the others have no path
        found.append(Hypotheses.of_rows(rows[:number], scores_of_rows[:number], (), lattice.blank))
    return found


def rows_of(rows: Tensor, order: Tensor) -> Tensor:
    """Rows `order` (B, K') of (B, K, N)."""
    return rows.gather(1, order[..., None].expand(-1, -1, rows.shape[2]))
