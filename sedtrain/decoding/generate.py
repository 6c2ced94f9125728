"""Text from audio by `generate`: greedy, beam search or sampling.

B batch, U generated tokens.
"""

from dataclasses import asdict, dataclass
from math import inf
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sedtrain.batch import Batch
from sedtrain.errors import require
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder


@dataclass(frozen=True)
class DecodingOptions:
    """How hypotheses are searched for; the names are those of `transformers.GenerationConfig`."""

    num_beams: int = 1
    do_sample: bool = False
    max_new_tokens: int = 200
    length_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for what `generate` could not do."""
        for name in ("num_beams", "max_new_tokens"):
            require(getattr(self, name) >= 1, f"decoding.{name}", getattr(self, name), "1 or more")
        for name in ("top_k", "no_repeat_ngram_size"):
            require(getattr(self, name) >= 0, f"decoding.{name}", getattr(self, name), "0, which is off, or more")
        require(0 < self.temperature < inf, "decoding.temperature", self.temperature, "a number above 0")
        require(0 < self.top_p <= 1, "decoding.top_p", self.top_p, "a fraction above 0 and up to 1, which is off")

    def generation_kwargs(self) -> dict[str, Any]:
        """The options that matter for this search: `generate` warns of the others."""
        sampling = {"temperature", "top_k", "top_p"} if not self.do_sample else set()
        beams = {"length_penalty"} if self.num_beams == 1 else set()
        return {name: value for name, value in asdict(self).items() if name not in sampling | beams}


@torch.inference_mode()
def transcribe_batch(
    model: SpeechEncoderDecoder, tokenizer: PreTrainedTokenizerBase, batch: Batch, options: DecodingOptions
) -> list[str]:
    """One hypothesis for each of the B utterances, in their order, without prompts; the model's mode is left as it was."""
    was_training = model.training
    model.eval()
    prompts = {} if batch.prompts is None else {"decoder_input_ids": batch.prompts}
    tokens = model.generate(
        batch.inputs,
        attention_mask=batch.attention_mask,
        synced_gpus=False,  # where weights lie in pieces on several ranks, the validation has gathered them
        **prompts,
        **options.generation_kwargs(),
    )
    model.train(was_training)
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
