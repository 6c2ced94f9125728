"""Text from audio by `generate`: greedy, beam search or sampling.

B batch, U generated tokens.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sedtrain.batch import Batch
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.ranges import Count, CountOrZero, Exponent, Positive, PositiveFraction


@dataclass(frozen=True)
class DecodingOptions:
    """Settings of the search for hypotheses; the names are those of `transformers.GenerationConfig`.

    top_k, no_repeat_ngram_size: 0 is off; top_p: 1 is off
    """

    num_beams: Count = 1
    do_sample: bool = False
    max_new_tokens: Count = 200
    length_penalty: Exponent = 1.0
    temperature: Positive = 1.0
    top_k: CountOrZero = 50
    top_p: PositiveFraction = 1.0
    no_repeat_ngram_size: CountOrZero = 0

    def generation_kwargs(self) -> dict[str, Any]:
        """The options that matter for this search: `generate` warns of the others."""
        sampling = {"temperature", "top_k", "top_p"} if not self.do_sample else set()
        beams = {"length_penalty"} if self.num_beams == 1 else set()
        return {name: value for name, value in asdict(self).items() if name not in sampling | beams}


@torch.inference_mode()
def transcribe_batch(
    model: SpeechEncoderDecoder, tokenizer: PreTrainedTokenizerBase, batch: Batch, options: DecodingOptions
) -> list[str]:
    """One hypothesis for each of the B utterances, in their order, without prompts; the model keeps its mode."""
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
