"""Greedy and beam search over the steps of a decoder, with the ids that `generate` of `transformers` writes.

B batch, N beams, S slots of a step (1, or N), K candidates, P prompt, U tokens behind it, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from sedtrain.decoding.ctc import rows_of
from sedtrain.models.encoder import EncodedSpeech
from sedtrain.models.step_layers import Memory
from sedtrain.models.steps import Steps

NEVER = -1e9  # `generate` gives this score to empty places of hypotheses
LOOK_EVERY = 8  # steps between looks for finished texts on an accelerator, since each look waits for it
STAY = 0.75  # finished utterances leave the batch once at most this share of it is unfinished


@dataclass(frozen=True)
class Task:
    """Utterances to decode, the limits of their texts, and the processors of their scores.

    prompts: (B, P)
    limits:  (B,) most tokens after the prompt
    ends:    tokens that end a text
    leaves:  finished utterances may leave the batch; False if a processor counts its rows
    """

    steps: Steps
    encoded: EncodedSpeech
    prompts: Tensor
    limits: Tensor
    ends: Sequence[int]
    processors: LogitsProcessorList
    leaves: bool = True

    def read_prompts(self) -> tuple[Memory, Tensor]:
        """The memory of the prompts, and the (B, 1, D) states of their last tokens."""
        memory = self.steps.listen(self.encoded)
        for position in range(self.prompts.shape[1]):
            states = self.steps.step(self.prompts[:, position : position + 1], position, memory)
        return memory, states

    def empty_texts(self) -> Tensor:
        """(B, P + U) prompts, then end tokens as room for the longest text."""
        room = self.prompts.new_full((len(self.prompts), int(self.limits.max())), self.ends[0])
        return torch.cat([self.prompts, room], 1)

    def is_end(self, tokens: Tensor) -> Tensor:
        found = tokens == self.ends[0]
        for end in self.ends[1:]:
            found = found | (tokens == end)
        return found

    def scores(self, states: Tensor, texts: Tensor, *, log: bool) -> Tensor:
        """(B, S, D) states of the last tokens of (B, S, P + U) texts -> (B, S, V) scores, log-probabilities with `log`."""
        logits = self.steps.logits(states)
        if log:
            logits = logits.float().log_softmax(-1)
        if not self.processors:
            return logits
        scores: Tensor = self.processors(texts.flatten(0, 1), logits.flatten(0, 1).float())
        return scores.view(*texts.shape[:2], -1)

    def leaving(self, done: Tensor, num_tokens: int) -> Tensor | None:
        """The (B',) unfinished rows, if the others leave the batch now; None: all stay."""
        if done.device.type != "cpu" and num_tokens % LOOK_EVERY and num_tokens < int(self.limits.max()):
            return None
        [left] = torch.nonzero(~done, as_tuple=True)
        stays = len(left) > (len(done) * STAY if self.leaves else 0)
        return None if stays else left


@torch.inference_mode()
def greedy(task: Task) -> list[list[int]]:
    """The most probable token in each step. A row goes on behind its end token; what follows there means nothing."""
    memory, states = task.read_prompts()
    limits, num_prompt = task.limits, task.prompts.shape[1]
    rows, ids = torch.arange(len(limits), device=limits.device), task.empty_texts()
    texts, done = ids.clone(), torch.zeros_like(limits, dtype=torch.bool)
    for position in range(num_prompt, ids.shape[1]):
        tokens = task.scores(states, ids[:, None, :position], log=False).argmax(-1)
        ids[:, position] = tokens[:, 0]
        number = position + 1 - num_prompt
        done |= task.is_end(tokens[:, 0]) | (number >= limits)
        if (left := task.leaving(done, number)) is not None:
            texts[rows] = ids
            if not len(left):
                break
            rows, ids, done, limits, tokens = (each[left] for each in (rows, ids, done, limits, tokens))
            memory.keep(left)
        states = task.steps.step(tokens, position, memory)
    found = zip(texts[:, num_prompt:].tolist(), task.limits.tolist(), strict=True)
    return [text[:limit] for text, limit in found]


@dataclass
class Beams:
    """The running and the ended hypotheses of each utterance.

    ids, ended_ids: (B, N, P + U)
    scores:         (B, N) sums of log-probabilities
    ended_scores:   (B, N) sums divided by length ** length_penalty
    has_ended:      (B, N) this place among the ended is taken
    done:           (B,) no running hypothesis can beat the ended ones, by the rule of `generate`
    """

    ids: Tensor
    scores: Tensor
    ended_ids: Tensor
    ended_scores: Tensor
    has_ended: Tensor
    done: Tensor

    @classmethod
    def empty(cls, texts: Tensor, num_beams: int) -> "Beams":
        """One hypothesis per utterance, its prompt; the other places score NEVER."""
        ids = texts[:, None].repeat(1, num_beams, 1)
        scores = torch.full(ids.shape[:2], NEVER, device=ids.device)
        first = scores.index_fill(1, ids.new_zeros(1), 0.0)
        has_ended = torch.zeros_like(scores, dtype=torch.bool)
        return cls(ids, first, ids.clone(), scores, has_ended, has_ended[:, 0].clone())

    def grow(self, log_probs: Tensor, position: int, number: int, task: Task, limits: Tensor, penalty: float) -> Tensor:
        """Adds the `number`-th token of the text by (B, S, V) log-probabilities; returns the (B, N) parents of the beams."""
        num_beams = self.ids.shape[1]
        num_kept = max(2, 1 + len(task.ends)) * num_beams
        best, tokens = log_probs.topk(min(num_kept, log_probs.shape[2]))
        scores, chosen = (best + self.scores[:, :, None]).flatten(1).topk(num_kept)
        parents, tokens = chosen // best.shape[2], tokens.expand(-1, num_beams, -1).flatten(1).gather(1, chosen)
        ids = rows_of(self.ids, parents)
        ids[:, :, position] = tokens
        at_limit = number >= limits
        hits = task.is_end(tokens) | at_limit[:, None]
        if hits.device.type != "cpu" or bool(hits[:, :num_beams].any()):
            self.end(ids, scores, hits, number**penalty)
        self.scores, going_on = (scores + hits * NEVER).topk(num_beams)
        self.ids = rows_of(ids, going_on)
        worst = torch.where(self.has_ended, self.ended_scores.amin(1, keepdim=True), NEVER)
        self.done |= (self.scores[:, :1] / number**penalty <= worst).all(1) | at_limit
        return parents.gather(1, going_on)

    def end(self, ids: Tensor, scores: Tensor, hits: Tensor, length: float) -> None:
        """Keeps the N best ended hypotheses. A candidate of (B, K) that ends now has to be among the first N too."""
        num_beams = self.ids.shape[1]
        ends = hits & (torch.arange(hits.shape[1], device=hits.device) < num_beams)
        scores = scores / length + self.done[:, None] * NEVER + ~ends * NEVER
        self.ended_scores, order = torch.cat([self.ended_scores, scores], 1).topk(num_beams)
        self.ended_ids = rows_of(torch.cat([self.ended_ids, ids], 1), order)
        self.has_ended = torch.cat([self.has_ended, ends], 1).gather(1, order)

    def keep(self, rows: Tensor) -> None:
        for name, each in vars(self).items():
            setattr(self, name, each[rows])


@torch.inference_mode()
def beam_search(task: Task, num_beams: int, num_best: int, penalty: float) -> tuple[list[list[list[int]]], Tensor]:
    """The `num_best` hypotheses of each utterance, not cut at their ends, and their (B, num_best) scores.

    penalty: a score is the sum of log-probabilities divided by length ** penalty
    """
    memory, states = task.read_prompts()
    limits, num_prompt = task.limits, task.prompts.shape[1]
    rows, beams = torch.arange(len(limits), device=limits.device), Beams.empty(task.empty_texts(), num_beams)
    texts, scores = beams.ended_ids.clone(), beams.ended_scores.clone()
    own = torch.full((num_beams, num_beams), -torch.inf, device=limits.device).fill_diagonal_(0.0)
    most_slots = num_prompt + (texts.shape[2] - num_prompt) * num_beams
    seen = own.new_zeros(len(limits), num_beams, most_slots)  # added to attention: 0 where a beam sees a slot
    for position in range(num_prompt, texts.shape[2]):
        number = position + 1 - num_prompt
        log_probs = task.scores(states, beams.ids[:, : states.shape[1], :position], log=True)
        parents = beams.grow(log_probs, position, number, task, limits, penalty)
        if (left := task.leaving(beams.done, number)) is not None:
            texts[rows], scores[rows] = beams.ended_ids, beams.ended_scores
            if not len(left):
                break
            rows, limits, seen, parents = rows[left], limits[left], seen[left], parents[left]
            beams.keep(left)
            memory.keep(left)
        used = memory.length
        seen[:, :, :used] = rows_of(seen[:, :, :used], parents)
        seen[:, :, used : used + num_beams] = own
        seen_now = seen[:, None, :, : used + num_beams].to(states.dtype)
        states = task.steps.step(beams.ids[:, :, position], position, memory, seen_now)
    return texts[:, :num_best, num_prompt:].tolist(), scores[:, :num_best]
