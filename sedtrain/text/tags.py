"""Special tokens before a target text that name its language and its task, as in Whisper (arXiv 2212.04356)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from sedtrain.errors import UserError

TASK_OF = {"transcription": "transcribe", "translation": "translate"}  # by target


@dataclass(frozen=True)
class Tags:
    """The languages and tasks that a model learnt; `ids` holds their tokens, by task and language."""

    ids: Mapping[str, Mapping[str, Sequence[int]]]
    number = 2  # before a text

    def of(self, language: str | None, task: str) -> list[int]:
        """Tokens of a language; None is the only language of the task. Raises UserError for what was never learnt."""
        languages = self.ids.get(task, {})
        if language is None and len(languages) == 1:
            [language] = languages
        if language is None or language not in languages:
            wanted = f"in {language!r}" if language else "in a language that nothing names"
            pairs = [(target, known) for target, of in TASK_OF.items() for known in self.ids.get(of, ())]
            commands = [f"target={target} data.language={known}" for target, known in pairs]
            arguments = [f"target={target!r}, language={known!r}" for target, known in pairs]
            raise UserError(
                "data.language",
                language,
                f"the model writes {' and '.join(self.known())}, and is asked to {task} {wanted}",
                f"write {', or '.join(commands)}",
                f"write {', or '.join(arguments)}",
            )
        return list(languages[language])

    def known(self) -> list[str]:
        """The tags of each language and task, such as `<|de|><|translate|>`."""
        return [tag(language) + tag(task) for task, languages in self.ids.items() for language in languages]


@dataclass(frozen=True)
class WhisperPrompt:
    """Whisper's own tokens between `<|startoftranscript|>` and the text: a language, a task, `<|notimestamps|>`.

    languages: ids by tag; empty for a checkpoint that is English alone, which has neither languages nor tasks
    tasks:     ids by name
    language: where none is asked for
    """

    languages: Mapping[str, int]
    tasks: Mapping[str, int]
    last: Sequence[int]
    language: str | None = None

    @classmethod
    def of_generation(cls, generation: Any) -> "WhisperPrompt":
        """The prompt as the generation config of a checkpoint describes it, in which stock Whisper looks for it."""
        last = getattr(generation, "no_timestamps_token_id", None)
        languages, tasks = (getattr(generation, name, None) or {} for name in ("lang_to_id", "task_to_id"))
        return cls(languages, tasks, [] if last is None else [last], getattr(generation, "language", None))

    @property
    def number(self) -> int:
        return (2 if self.languages else 0) + len(self.last)

    def of(self, language: str | None, task: str) -> list[int]:
        """Raises UserError where nothing names a language that the checkpoint has a token for."""
        if not self.languages and language in (None, "en"):
            return list(self.last)
        language = language or self.language
        if language is None or tag(language) not in self.languages:
            known = ", ".join(sorted(each.strip("<|>") for each in self.languages)) or "en"
            asked = f"no language {language!r}" if language else "several languages, and nothing names that of the text"
            write, python = f"write data.language=ONE_OF {known}", f"write language=ONE_OF {known}"
            raise UserError("data.language", language, f"the checkpoint has {asked}", write, python)
        return [self.languages[tag(language)], self.tasks[task], *self.last]

    def known(self) -> list[str]:
        return list(self.languages)


def fault_of_prompt(generation: Any, vocab_size: int) -> str:
    """The first setting of a generation config that describes no prompt of Whisper; "" for none."""
    for name, needed in (("lang_to_id", set()), ("task_to_id", {*TASK_OF.values()}), ("no_timestamps_token_id", set())):
        value = getattr(generation, name, None)
        given = value if isinstance(value, dict) else {} if value is None else {"": value}
        is_id = [type(id) is int and 0 <= id < vocab_size for id in given.values()]
        is_kind = name.startswith("no_") != isinstance(value, dict)
        if value is not None and not (is_kind and all(is_id) and needed <= given.keys()):
            return f"{name}={str(value)[:100]}, which names no tokens of the model"
    if getattr(generation, "lang_to_id", None) and not getattr(generation, "task_to_id", None):
        return "lang_to_id without task_to_id"
    return ""


def tag(name: str) -> str:
    return f"<|{name}|>"


def add_tags(tokenizer: PreTrainedTokenizerBase, learnt: Iterable[tuple[str | None, str]]) -> Tags:
    """Adds the tags of pairs of language and task to a tokenizer, as tokens that no text becomes."""
    pairs = sorted((language, task) for language, task in learnt if language is not None)
    tokens = dict.fromkeys(tag(name) for pair in pairs for name in pair)
    tokenizer.add_special_tokens({"extra_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
    ids: dict[str, dict[str, list[int]]] = {}
    for language, task in pairs:
        ids.setdefault(task, {})[language] = tokenizer.convert_tokens_to_ids([tag(language), tag(task)])
    return Tags(ids)
