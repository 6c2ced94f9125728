"""The ids of greedy search in fewer calls of the decoder: CTC drafts a text, and each call verifies the whole draft.

B batch, P prompt, U tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from sedtrain.decoding.loop import Task

WINDOW = 3  # first tokens of a wrong draft, among which the decoder's token is looked for


@torch.inference_mode()
def speculate(task: Task, drafts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The rows that greedy search writes. Keys and values of refused tokens stay in memory, hidden by the mask.

    drafts: one for each utterance, without end token
    """
    steps, ends, num_prompt = task.steps, task.ends, task.prompts.shape[1]
    found = zip(task.prompts.tolist(), drafts, task.limits.tolist(), strict=True)
    rows = [Row(prompt, [*draft, ends[0]], num_prompt + limit) for prompt, draft, limit in found]
    memory = steps.listen(task.encoded)
    for position in range(num_prompt - 1):
        steps.step(task.prompts[:, position : position + 1], position, memory)
    unfinished, seen = rows, torch.zeros(len(rows), num_prompt - 1, device=task.prompts.device)
    while unfinished:
        begins = torch.tensor([len(row.text) - 1 for row in unfinished], device=seen.device)
        guesses = [torch.tensor(row.guess[len(row.text) - 1 :]) for row in unfinished]
        tokens = pad_sequence(guesses, batch_first=True, padding_value=ends[0]).to(seen.device)
        order = torch.arange(tokens.shape[1], device=seen.device)
        own = torch.where(order <= order[:, None], 0.0, -torch.inf).expand(len(tokens), -1, -1)
        mask = torch.cat([seen[:, None].expand(-1, len(order), -1), own], 2)[:, None]
        positions = (begins[:, None] + order).clamp(max=len(steps.positions) - 1)
        choices = steps.logits(steps.step(tokens, positions, memory, mask.to(steps.words.dtype))).argmax(-1).tolist()
        left = [n for n, row in enumerate(unfinished) if not row.accept(choices[n], ends, len(row.text) - 1)]
        unfinished = [unfinished[n] for n in left]
        if unfinished:
            kept = torch.tensor(left, device=seen.device)
            written = torch.tensor([len(row.text) - 1 for row in unfinished], device=seen.device) - begins[kept]
            fresh = torch.where(order < written[:, None], 0.0, -torch.inf)
            seen = torch.cat([seen[kept], fresh], 1)
            memory.keep(kept)
    return [row.text[num_prompt:] for row in rows]


@dataclass
class Row:
    """One utterance: the text that the decoder has written, prompt included, and a draft of the rest.

    limit: most tokens of the text
    """

    text: list[int]
    draft: list[int]
    limit: int

    @property
    def guess(self) -> list[int]:
        return (self.text + self.draft)[: self.limit - 1]

    def accept(self, choices: Sequence[int], ends: Sequence[int], first: int) -> bool:
        """Writes the decoder's choices, up to and with the first that differs from the draft; True if the text ends.

        choices: the decoder's next token after each token from place `first` on
        After a difference the draft goes on behind the decoder's token where it is near, else one drafted token is dropped.
        """
        while True:
            token = choices[len(self.text) - 1 - first]
            self.text.append(token)
            if token in ends or len(self.text) == self.limit:
                return True
            agreed, near = self.draft[:1] == [token], self.draft[:WINDOW]
            self.draft = self.draft[near.index(token) + 1 if token in near else 1 :] or [ends[0]]
            if not agreed:
                return False
