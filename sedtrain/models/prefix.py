"""Decoder-only language models behind a prefix: prompt, audio, prompt, then the text (arXiv 2310.09424, 2402.08846).

B batch, T frames, U text tokens, L everything the decoder has read, D width.
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
from sedtrain.models.mixing import mix_into

NEEDED = {"attention_mask", "inputs_embeds", "past_key_values"}
"""Arguments of a language model that can continue embeddings."""
OTHER = {"encoder_hidden_states", "encoder_outputs", "pixel_values"}
"""Arguments of a model that reads more than text."""
BOTH = {"gpt2"}
"""Families with cross-attention that can do without it."""
PLACE = "{audio}"
LONGEST = 10_000
"""Tokens that a saved prompt has at most."""


@cache
def arguments_of(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def can_continue(config: PreTrainedConfig) -> bool:
    """True for a family of language models of transformers that can be fed by a prefix."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    names = arguments_of(kind.forward) if kind is not None and hasattr(config, "hidden_size") else frozenset()
    return names >= NEEDED and (not names & OTHER or config.model_type in BOTH)


def is_prefixed(config: PreTrainedConfig) -> bool:
    """True for the configuration of a decoder that reads the audio as a prefix, not by cross-attention."""
    wanted = getattr(config, "listens", None)
    return can_continue(config) and (wanted == "prefix" or config.model_type not in BOTH)


def choose_listening(config: PreTrainedConfig, wanted: str | None) -> None:
    """Sets how a decoder listens, in place; None leaves it to the family. Raises UserError for what the family cannot."""
    kind, fits = config.model_type, can_continue(config)
    if wanted == "prefix" and not fits:
        write = "write decoder.listens=cross_attention, or decoder=llama or another decoder-only language model"
        raise UserError("decoder.listens", wanted, f"{kind} is no language model that can be fed by a prefix", write)
    if wanted == "cross_attention" and fits and kind not in BOTH:
        raise UserError(
            "decoder.listens", wanted, f"{kind} has no cross-attention", "write decoder.listens=prefix, or none"
        )
    if wanted is not None and fits:
        config.listens = wanted


def give_prompt(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None, prompt: str | None) -> None:
    """Sets the tokens around the audio, in place: of `prompt`, or of a turn of the tokenizer's chat template.

    The last of them is the token with which the text starts. Raises UserError where there is not one place for the audio.
    """
    if not is_prefixed(config):
        if prompt is not None:
            write = "write decoder.prompt=null, or decoder=llama or another decoder that is fed by a prefix"
            raise UserError(
                "decoder.prompt", prompt, "this decoder listens by cross-attention, and reads no prompt", write
            )
        return
    if tokenizer is not None:
        before, behind = prompt_ids(tokenizer, prompt)
        config.decoder_start_token_id = behind.pop() if behind else None
        config.audio_prompt = [before, behind]


def prompt_ids(tokenizer: Any, prompt: str | None) -> list[list[int]]:
    """Token ids in front of the audio and behind it."""
    text, begin = PLACE if prompt is None else prompt, list[int]()
    if text.count(PLACE) != 1:
        wrong = f"it has {text.count(PLACE)} places for the audio, and needs one"
        write = f"write prompt='TEXT {PLACE} TEXT'"
        raise UserError("decoder.prompt", prompt, wrong, f"write 'decoder.prompt=\"TEXT {PLACE} TEXT\"'", write)
    if getattr(tokenizer, "chat_template", None):
        text = turn_of_user(tokenizer, text)
    elif prompt is not None and tokenizer.bos_token_id in tokenizer("")["input_ids"][:1]:
        begin = [tokenizer.bos_token_id]
    before, behind = (
        tokenizer(part, add_special_tokens=False)["input_ids"] if part else [] for part in text.split(PLACE)
    )
    return [begin + before, behind]


def turn_of_user(tokenizer: Any, text: str) -> str:
    """A turn by the chat template of the tokenizer's folder. Raises UserError where it fails or loses the audio."""
    arguments = {
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "conversations": [[{"role": "user", "content": text}]],
        "add_generation_prompt": True,
        "enable_thinking": False,
    }
    text, fault = rendered(tokenizer.get_chat_template(), arguments)
    if not fault and text.count(PLACE) != 1:
        fault = f"writes what the user says {text.count(PLACE)} times"
    if fault:
        write = "write decoder.checkpoint=FOLDER whose tokenizer has another chat template, or none"
        raise UserError(
            "decoder.checkpoint", tokenizer.name_or_path, f"the chat template of its tokenizer {fault}", write
        )
    return text


def num_in_front(config: PreTrainedConfig, num_frames: int) -> int:
    """Positions that frames and prompt take in front of a text."""
    return num_frames + sum(map(len, prompt_of(config))) if is_prefixed(config) else 0


def refuse_long_row(
    config: PreTrainedConfig, most: int | None, encoded: Any, tokens: Tensor | None, mask: Tensor | None
) -> None:
    """Raises UserError for an utterance whose prompt, frames and text need more positions than there are; padding needs none.

    tokens, mask: (B, U) tokens, or their embeddings, and the mask of the text so far
    """
    frames, real = encoded.last_hidden_state, encoded.attention_mask
    if most is None or tokens is None or num_in_front(config, frames.shape[1]) + tokens.shape[1] <= most:
        return
    of_audio = [frames.shape[1]] * len(frames) if real is None else real.sum(1).tolist()
    of_text = [tokens.shape[1]] * len(frames) if mask is None else mask.sum(1).tolist()
    for num_frames, num_tokens in zip(of_audio, of_text, strict=True):
        if (in_front := num_in_front(config, int(num_frames))) + num_tokens > most:
            wrong = f"a text of {num_tokens} tokens is too long for the decoder's {most} positions"
            wrong += f" behind {in_front} of audio and prompt"
            write = "write adapter=stack_mlp adapter.stride=NUMBER for fewer frames, or a smaller data.max_seconds"
            raise UserError("labels", tuple(tokens.shape), wrong, write)


def behind_prefix(decoder: PreTrainedModel) -> PreTrainedModel:
    """The language model itself, which now takes encoder_hidden_states; its weights and their names stay.

    Raises UserError where frames of the layers' width cannot stand among the tokens.
    """
    width = decoder.get_input_embeddings().weight.shape[1]
    if width != decoder.config.hidden_size:
        wrong = f"its embeddings are {width} wide and its layers {decoder.config.hidden_size}"
        raise UserError("decoder", type(decoder).__name__, wrong, "write decoder.checkpoint=FOLDER of another member")
    mix_into(decoder, Prefixed)
    return decoder


class Prefixed:
    """Mixed into a family's causal language model: reads the frames of the audio in front of the tokens.

    config.audio_prompt: token ids in front of the frames, and those behind them; saved with the model
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
        """The family's output for U tokens (B, U) or their embeddings (B, U, D); its logits are those of the tokens alone.

        attention_mask: (B, U) of all tokens so far, 0 where a text is padded, in front or behind
        encoder_hidden_states, encoder_attention_mask: (B, T, D) frames and (B, T)

        Whatever is masked moves to the front, where no window of attention and no position counts it; columns that hold
        nothing else are left out.
        """
        assert encoder_hidden_states is not None
        cache = getattr(past_key_values, "self_attention_cache", past_key_values)
        refuse_fixed(cache)
        embed = self.get_input_embeddings()
        tokens = embed(input_ids) if inputs_embeds is None else inputs_embeds
        batch_size, num_tokens = tokens.shape[:2]
        frames, num_read = encoder_hidden_states.to(tokens.dtype), 0 if cache is None else cache.get_seq_length()
        before, behind = prompt_of(self.config)
        real = torch.ones(batch_size, frames.shape[1]) if encoder_attention_mask is None else encoder_attention_mask
        real = real.to(tokens.device, torch.long)
        num_text = num_tokens + max(0, num_read - len(before) - len(behind) - int(real.sum(1).max()))
        text = torch.ones(batch_size, num_text) if attention_mask is None else attention_mask
        text = text.to(tokens.device, torch.long)
        ends = [real.new_ones(batch_size, len(ids)) for ids in (before, behind)]
        mask, order = torch.cat([ends[0], real, ends[1], text], 1).sort(dim=1, stable=True)
        empty = min(int((mask.sum(0).cumsum(0) == 0).sum()), mask.shape[1] - num_tokens)
        mask, order = mask[:, empty:], order[:, empty:]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if not num_read:
            given = [embed(real.new_tensor(ids).expand(batch_size, -1)) for ids in (before, behind)]
            frames = frames.masked_fill(real[..., None] == 0, 0.0)
            tokens = torch.cat([given[0], frames, given[1], tokens], 1)
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
    """(B, U, V) logits of texts whose padding has moved to the front -> logits of the tokens where they were given.

    A padded token behind a text has the logits of its last real one, which `generate` continues from.
    """
    if mask is None:
        return logits
    places = (mask.shape[1] - mask.sum(1, keepdim=True) + mask.cumsum(1) - 1).clamp(min=0)
    return logits.gather(1, places[..., None].expand_as(logits))


def refuse_fixed(cache: Any) -> None:
    """Raises UserError for a cache of a fixed size: `generate` makes it as large as the text."""
    if cache is not None and cache.is_compileable:
        wrong = "a cache of a fixed size has no room for the audio in front of the text"
        raise UserError("cache_implementation", "static", wrong, "write cache_implementation='dynamic', or none")


def is_prompt(value: Any, vocab_size: int) -> bool:
    """True for token ids in front of the audio and behind it; a stranger's file may hold anything."""
    parts = value if isinstance(value, list | tuple) and len(value) == 2 else [None]
    return all(
        isinstance(ids, list)
        and len(ids) < LONGEST
        and all(type(each) is int and 0 <= each < vocab_size for each in ids)
        for ids in parts
    )


def prompt_of(config: PreTrainedConfig) -> Sequence[list[int]]:
    prompt: Sequence[list[int]] = getattr(config, "audio_prompt", None) or ([], [])
    return prompt
