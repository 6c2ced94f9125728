"""The ids of greedy search in fewer calls of the decoder: CTC writes a draft, each call verifies all of the draft at once.

B batch, P prompt, U tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList

from sedtrain.decoding.hypotheses import end_tokens
from sedtrain.decoding.loop import Task
from sedtrain.models.encoder import EncodedSpeech
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

WINDOW = 3  # tokens of the draft among which one that the decoder wrote is looked for


class Speculative:
    """A `custom_generate` of transformers' `generate`, which prepares what it is called with.

    drafts: of each utterance, without end token
    limits: of each utterance, the most tokens behind the prompt
    """

    def __init__(self, drafts: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
        self.drafts, self.limits = drafts, limits

    def __call__(
        self,
        model: SpeechEncoderDecoder,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        """(B, P) prompts -> (B, U) tokens with their prompts, padded behind the end token, as greedy search returns them."""
        encoded: EncodedSpeech = model_kwargs["encoder_outputs"]
        num_prompt, ends = input_ids.shape[1], end_tokens(generation_config)
        rows = [
            Row(number, prompt, [*draft, ends[0]], min(generation_config.max_length, num_prompt + limit))
            for number, (prompt, draft, limit) in enumerate(
                zip(input_ids.tolist(), self.drafts, self.limits, strict=True)
            )
        ]
        unfinished = rows
        while unfinished:
            audio = encoded.rows([row.number for row in unfinished])
            tokens = padded([row.guess for row in unfinished], ends[0]).to(input_ids.device)
            logits = model(encoder_outputs=audio, decoder_input_ids=tokens, use_cache=False).logits
            choices = greedy(tokens, logits, logits_processor, num_prompt).tolist()
            unfinished = [row for row, each in zip(unfinished, choices, strict=True) if not row.accept(each, ends)]
        return padded([row.text for row in rows], generation_config.pad_token_id).to(input_ids.device)


@torch.inference_mode()
def speculate(task: Task, drafts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The rows of greedy search, computed behind what is in memory; a wrong draft's slots stay there, and nothing sees them.

    drafts: of each utterance, without end token
    """
    steps, ends, num_prompt = task.steps, task.ends, task.prompts.shape[1]
    found = zip(task.prompts.tolist(), drafts, task.limits.tolist(), strict=True)
    rows = [Row(n, prompt, [*draft, ends[0]], num_prompt + limit) for n, (prompt, draft, limit) in enumerate(found)]
    memory = steps.listen(task.encoded)
    for position in range(num_prompt - 1):
        steps.step(task.prompts[:, position : position + 1], position, memory)
    unfinished, seen = rows, torch.zeros(len(rows), num_prompt - 1, device=task.prompts.device)
    while unfinished:
        begins = torch.tensor([len(row.text) - 1 for row in unfinished], device=seen.device)
        tokens = padded([row.guess[len(row.text) - 1 :] for row in unfinished], ends[0]).to(seen.device)
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
    """One utterance: the text that the decoder has written, prompt included, and the draft of what follows.

    limit: the most tokens of the text
    """

    number: int
    text: list[int]
    draft: list[int]
    limit: int

    @property
    def guess(self) -> list[int]:
        return (self.text + self.draft)[: self.limit - 1]

    def accept(self, choices: Sequence[int], ends: Sequence[int], first: int = 0) -> bool:
        """Writes what the decoder chooses behind each token of the guess as far as the draft agrees; True if the text ends.

        choices: behind the tokens from the place `first` on


        Where they differ, the draft goes on behind the decoder's token, or leaves one of its own out for it.
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


def greedy(tokens: Tensor, logits: Tensor, processors: LogitsProcessorList, num_prompt: int) -> Tensor:
    """(B, U) tokens, (B, U, V) logits -> (B, U) choices of the token that follows each of them, from the prompt's last."""
    choices = logits.argmax(-1)
    for position in range(num_prompt - 1, tokens.shape[1]) if processors else ():
        scores = processors(tokens[:, : position + 1], logits[:, position].float())
        choices[:, position] = scores.argmax(-1)
    return choices


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(B, U) of rows of unequal length."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
