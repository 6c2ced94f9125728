"""Decoder-only language models that read the audio as a prefix: prompt, audio, prompt, text (arXiv 2310.09424, 2402.08846).

B batch, T frames, U text tokens, D width, V vocabulary.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    EncoderDecoderCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sedtrain.errors import UserError
from sedtrain.models.chat_template import rendered
from sedtrain.models.mixins import mix_into

NEEDED = {"attention_mask", "inputs_embeds", "past_key_values"}
"""Arguments that a language model needs to continue a prefix of embeddings."""
OTHER = {"encoder_hidden_states", "encoder_outputs", "pixel_values"}
"""Arguments of models that read more than text."""
BOTH = {"gpt2"}
"""Families that can read audio either way: by cross-attention or as a prefix."""
PLACE = "{audio}"
LONGEST = 10_000
"""Largest number of tokens in each half of a saved prompt."""


@cache
def arguments_of(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def can_continue(config: PreTrainedConfig) -> bool:
    """True for a family of language models in transformers that can read a prefix."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    names = arguments_of(kind.forward) if kind is not None and hasattr(config, "hidden_size") else frozenset()
    return names >= NEEDED and (not names & OTHER or config.model_type in BOTH)


def is_prefixed(config: PreTrainedConfig) -> bool:
    """True for a decoder that reads the audio as a prefix, False for cross-attention."""
    wanted = getattr(config, "listens", None)
    return can_continue(config) and (wanted == "prefix" or config.model_type not in BOTH)


def choose_listening(config: PreTrainedConfig, wanted: str | None) -> None:
    """Sets `config.listens`, in place; None leaves it to the family. Raises UserError for a way that the family lacks."""
    kind, fits = config.model_type, can_continue(config)
    if wanted == "prefix" and not fits:
        write = "write decoder.listens=cross_attention, or decoder=llama or another decoder-only language model"
        raise UserError("decoder.listens", wanted, f"{kind} is not a language model that can read a prefix", write)
    if wanted == "cross_attention" and fits and kind not in BOTH:
        raise UserError(
            "decoder.listens", wanted, f"{kind} has no cross-attention", "write decoder.listens=prefix, or none"
        )
    if wanted is not None and fits:
        config.listens = wanted


def give_prompt(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None, prompt: str | None) -> None:
    """Sets the tokens before and after the audio, in place: from `prompt`, in a turn of the tokenizer's chat template if any.

    The last token becomes the start token of the text. Raises UserError unless the prompt has one place for the audio.
    """
    if not is_prefixed(config):
        if prompt is not None:
            write = "write decoder.prompt=null, or decoder=llama or another decoder that reads a prefix"
            raise UserError(
                "decoder.prompt", prompt, "this decoder listens by cross-attention, and reads no prompt", write
            )
        return
    if tokenizer is not None:
        before, after = prompt_ids(tokenizer, prompt)
        config.decoder_start_token_id = after.pop() if after else None
        config.audio_prompt = [before, after]


def prompt_ids(tokenizer: Any, prompt: str | None) -> list[list[int]]:
    """Token ids before and after the audio."""
    text, begin = PLACE if prompt is None else prompt, list[int]()
    if text.count(PLACE) != 1:
        wrong = f"it has {text.count(PLACE)} places for the audio, and needs one"
        write = f"write prompt='TEXT {PLACE} TEXT'"
        raise UserError("decoder.prompt", prompt, wrong, f"write 'decoder.prompt=\"TEXT {PLACE} TEXT\"'", write)
    if getattr(tokenizer, "chat_template", None):
        text = turn_of_user(tokenizer, text)
    elif prompt is not None and tokenizer.bos_token_id in tokenizer("")["input_ids"][:1]:
        begin = [tokenizer.bos_token_id]
    before, after = (
        tokenizer(part, add_special_tokens=False)["input_ids"] if part else [] for part in text.split(PLACE)
    )
    return [begin + before, after]


def turn_of_user(tokenizer: Any, text: str) -> str:
    """A user's turn in the tokenizer's chat template. Raises UserError if the template fails, or drops or repeats the audio."""
    arguments = {
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "conversations": [[{"role": "user", "content": text}]],
        "add_generation_prompt": True,
        "enable_thinking": False,
    }
    text, fault = rendered(tokenizer.get_chat_template(), arguments)
    if not fault and text.count(PLACE) != 1:
        fault = f"writes the user's message {text.count(PLACE)} times"
    if fault:
        write = "write decoder.checkpoint=FOLDER whose tokenizer has another chat template, or none"
        raise UserError(
            "decoder.checkpoint", tokenizer.name_or_path, f"the chat template of its tokenizer {fault}", write
        )
    return text


def num_in_front(config: PreTrainedConfig, num_frames: int) -> int:
    """Number of positions that frames and prompt take before a text; 0 with cross-attention."""
    return num_frames + sum(map(len, prompt_of(config))) if is_prefixed(config) else 0


def num_frames(encoded: Any) -> list[int]:
    """Number of real frames of each of the B utterances."""
    frames, real = encoded.last_hidden_state, encoded.attention_mask
    return [frames.shape[1]] * len(frames) if real is None else real.sum(1).tolist()


def refuse_long_row(
    config: PreTrainedConfig, most: int | None, encoded: Any, tokens: Tensor | None, mask: Tensor | None
) -> None:
    """Raises UserError for an utterance whose prompt, frames and text exceed the `most` positions; padding needs none.

    tokens: (B, U) ids or (B, U, D) embeddings; mask: of the text so far
    """
    frames = encoded.last_hidden_state
    if most is None or tokens is None or num_in_front(config, frames.shape[1]) + tokens.shape[1] <= most:
        return
    token_counts = [tokens.shape[1]] * len(frames) if mask is None else mask.sum(1).tolist()
    for number, num_tokens in zip(num_frames(encoded), token_counts, strict=True):
        if (in_front := num_in_front(config, number)) + num_tokens > most:
            wrong = f"a text of {num_tokens} tokens is too long for the decoder's {most} positions"
            wrong += f" after {in_front} of audio and prompt"
            write = "write adapter=stack_mlp adapter.stride=NUMBER for fewer frames, or a smaller data.max_seconds"
            raise UserError("labels", tuple(tokens.shape), wrong, write)


def behind_prefix(decoder: PreTrainedModel) -> PreTrainedModel:
    """Makes a language model take `encoder_hidden_states`, in place; its weights keep their names.

    Raises UserError if its embeddings and layers differ in width, so that no frame fits among the tokens.
    """
    width = decoder.get_input_embeddings().weight.shape[1]
    if width != decoder.config.hidden_size:
        wrong = f"its embeddings are {width} wide and its layers {decoder.config.hidden_size}"
        raise UserError("decoder", type(decoder).__name__, wrong, "write decoder.checkpoint=FOLDER of another member")
    mix_into(decoder, Prefixed)
    return decoder


class Prefixed:
    """Mixin for a causal language model that reads frames of audio before the tokens.

    config.audio_prompt: token ids before the frames and after them; saved with the model
    """

    family_arguments: frozenset[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        family: Any = super()
        cls.family_arguments = arguments_of(family.forward)

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Any:
        """The family's output for (B, U) tokens or their (B, U, D) embeddings; logits are of these tokens only.

        attention_mask: over all tokens of the text so far, 0 where a text is padded, before or after it
        encoder_hidden_states, encoder_attention_mask: (B, T, D) frames and their (B, T) mask

        Masked frames and tokens move to the front of their row, where they take up no position and no place in a sliding
        window of attention. Columns in which all rows are masked are dropped.
        """
        assert encoder_hidden_states is not None
        cache = getattr(past_key_values, "self_attention_cache", past_key_values)
        refuse_fixed(cache)
        embed = self.get_input_embeddings()
        tokens = embed(input_ids) if inputs_embeds is None else inputs_embeds
        batch_size, num_tokens = tokens.shape[:2]
        frames, num_read = encoder_hidden_states.to(tokens.dtype), 0 if cache is None else cache.get_seq_length()
        before, after = prompt_of(self.config)
        real = torch.ones(batch_size, frames.shape[1]) if encoder_attention_mask is None else encoder_attention_mask
        real = real.to(tokens.device, torch.long)
        num_text = num_tokens + max(0, num_read - len(before) - len(after) - int(real.sum(1).max()))
        text = torch.ones(batch_size, num_text) if attention_mask is None else attention_mask
        text = text.to(tokens.device, torch.long)
        ends = [real.new_ones(batch_size, len(ids)) for ids in (before, after)]
        mask, order = torch.cat([ends[0], real, ends[1], text], 1).sort(dim=1, stable=True)
        empty = min(int((mask.sum(0).cumsum(0) == 0).sum()), mask.shape[1] - num_tokens)
        mask, order = mask[:, empty:], order[:, empty:]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if not num_read:
            prompts = [embed(real.new_tensor(ids).expand(batch_size, -1)) for ids in (before, after)]
            frames = frames.masked_fill(real[..., None] == 0, 0.0)
            tokens = torch.cat([prompts[0], frames, prompts[1], tokens], 1)
            tokens = tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[2]))
        extra = {"position_ids": positions[:, -tokens.shape[1] :], "logits_to_keep": num_tokens}
        options |= {name: value for name, value in extra.items() if name in self.family_arguments}
        output = super().forward(inputs_embeds=tokens, attention_mask=mask, past_key_values=cache, **options)  # type: ignore[misc]
        output.logits = in_place(
            output.logits[:, -num_tokens:], None if attention_mask is None else text[:, -num_tokens:]
        )
        if isinstance(past_key_values, EncoderDecoderCache):
            output.past_key_values = past_key_values
        return output


def in_place(logits: Tensor, mask: Tensor | None) -> Tensor:
    """(B, U, V) logits of texts with their padding at the front -> logits in the order of the caller's tokens.

    Padding after a text gets the logits of the last real token, which `generate` continues from.
    """
    if mask is None:
        return logits
    places = (mask.shape[1] - mask.sum(1, keepdim=True) + mask.cumsum(1) - 1).clamp(min=0)
    return logits.gather(1, places[..., None].expand_as(logits))


def refuse_fixed(cache: Any) -> None:
    """Raises UserError for a cache of fixed size: `generate` makes it only as large as the text."""
    if cache is not None and cache.is_compileable:
        wrong = "a cache of fixed size has no room for the audio before the text"
        raise UserError("cache_implementation", "static", wrong, "write cache_implementation='dynamic', or none")


def is_prompt(value: Any, vocab_size: int) -> bool:
    """True for two lists of token ids, before and after the audio; a stranger's file may hold anything."""
    halves = value if isinstance(value, list | tuple) and len(value) == 2 else [None]
    return all(
        isinstance(ids, list) and len(ids) < LONGEST and all(type(id) is int and 0 <= id < vocab_size for id in ids)
        for ids in halves
    )


def prompt_of(config: PreTrainedConfig) -> Sequence[list[int]]:
    prompt: Sequence[list[int]] = getattr(config, "audio_prompt", None) or ([], [])
    return prompt
