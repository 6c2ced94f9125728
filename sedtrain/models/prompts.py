"""Prompts of whole speech models, from their tokenizer and generation config."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers.models.canary.processing_canary import LANGUAGE_CODE_TO_NAME as CANARY_LANGUAGES
from transformers.models.cohere_asr.processing_cohere_asr import LANGUAGES as COHERE_LANGUAGES
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from sedtrain.text.tags import TASK_OF, WholePrompt, tag

BEGIN = ["startofcontext", "startoftranscript", "emo:undefined"]
END = ["pnc", "noitn", "notimestamp", "nodiarize"]
"""Tokens before and after the languages of speech and text, in Canary (arXiv 2509.14128) and Cohere's model."""


def whole_prompt(model_type: str, tokenizer: Any, generation: Any) -> WholePrompt | None:
    """The prompt of a whole model, None for a model of a single language; generation: the generation config."""
    make = PROMPTS.get(model_type)
    prompt = None if make is None else make(tokenizer, generation)
    return prompt if prompt is None or prompt.languages or model_type == "whisper" else None


def whisper(tokenizer: Any, generation: Any) -> WholePrompt:
    """The prompt by the ids in the generation config, where stock Whisper reads them too."""
    last = getattr(generation, "no_timestamps_token_id", None)
    end = [] if last is None else [last]
    languages, tasks = (getattr(generation, name, None) or {} for name in ("lang_to_id", "task_to_id"))
    ids = {
        task: {name.strip("<|>"): [language, tasks[task], *end] for name, language in languages.items()}
        for task in (TASK_OF.values() if languages else ())
    }
    language = (getattr(generation, "language", None) or "").lower().strip("<|>")  # a name, code or token
    return WholePrompt(ids, end, TO_LANGUAGE_CODE.get(language, language) or None, spaced=True)


def canary(tokenizer: Any, generation: Any) -> WholePrompt:
    """Transcription, and translation from English; a prompt for translation into English must name the spoken language."""
    pairs = {"transcribe": {code: (code, code) for code in CANARY_LANGUAGES}}
    pairs["translate"] = {code: ("en", code) for code in CANARY_LANGUAGES if code != "en"}
    return WholePrompt(
        {task: prompts_of_pairs(tokenizer, generation, of_task) for task, of_task in pairs.items()},
        language=getattr(generation, "language", None),
    )


def cohere(tokenizer: Any, generation: Any) -> WholePrompt:
    ids = prompts_of_pairs(tokenizer, generation, {code: (code, code) for code in COHERE_LANGUAGES})
    return WholePrompt({"transcribe": ids} if ids else {}, language=getattr(generation, "language", None))


def prompts_of_pairs(tokenizer: Any, generation: Any, pairs: dict[str, tuple[str, str]]) -> dict[str, list[int]]:
    """Prompts of pairs of languages (speech, text), by the text's; without those that the tokenizer has no tokens for."""
    prompts = {text: [*BEGIN, speech, text, *END] for text, (speech, text) in pairs.items()}
    made = {text: tokenizer.convert_tokens_to_ids([*map(tag, names)]) for text, names in prompts.items()}
    start, unknown = generation.decoder_start_token_id, (None, tokenizer.unk_token_id)
    return {text: ids[ids[0] == start :] for text, ids in made.items() if not any(id in unknown for id in ids)}


def seamless(tokenizer: Any, generation: Any) -> WholePrompt:
    return language_prompt(generation, getattr(generation, "text_decoder_lang_to_code_id", None))


def speech_to_text(tokenizer: Any, generation: Any) -> WholePrompt:
    return language_prompt(generation, getattr(tokenizer, "lang_code_to_id", None))


def language_prompt(generation: Any, codes: Mapping[str, int] | None) -> WholePrompt:
    """One token for the language of the text, the same for every task."""
    ids = {language: [code] for language, code in (codes or {}).items()}
    by_task = dict.fromkeys(TASK_OF.values(), ids) if ids else {}
    return WholePrompt(by_task, language=getattr(generation, "language", None))


PROMPTS: dict[str, Callable[[Any, Any], WholePrompt]] = {
    "whisper": whisper,
    "canary": canary,
    "cohere_asr": cohere,
    "seamless_m4t": seamless,
    "seamless_m4t_v2": seamless,
    "speech_to_text": speech_to_text,
}
"""By the model type of `transformers`."""


def fault_of_prompt(generation: Any, vocab_size: int) -> str:
    """The first setting of a generation config that is unusable for a prompt, in words; "" for none."""
    if not isinstance(language := getattr(generation, "language", None), str | None):
        return f"language={str(language)[:100]}, which is no text"
    for name in ("lang_to_id", "task_to_id", "text_decoder_lang_to_code_id", "no_timestamps_token_id"):
        needed = {*TASK_OF.values()} if name == "task_to_id" else set()
        value = getattr(generation, name, None)
        given = value if isinstance(value, dict) else {} if value is None else {"": value}
        is_id = [type(id) is int and 0 <= id < vocab_size for id in given.values()]
        is_kind = name.startswith("no_") != isinstance(value, dict)
        if value is not None and not (is_kind and all(is_id) and needed <= given.keys()):
            return f"{name}={str(value)[:100]}, which names no tokens of the model"
    if getattr(generation, "lang_to_id", None) and not getattr(generation, "task_to_id", None):
        return "lang_to_id without task_to_id"
    return ""
