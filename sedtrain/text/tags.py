"""Special tokens before a target text that name its language and its task, as in Whisper (arXiv 2212.04356)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from sedtrain.batch import IGNORE_INDEX
from sedtrain.errors import UserError

TASK_OF = {"transcription": "transcribe", "translation": "translate"}  # by target


@dataclass(frozen=True)
class Tags:
    """The languages and tasks that a model has learnt; `ids` holds their tokens, by task and language."""

    ids: Mapping[str, Mapping[str, Sequence[int]]]
    number = 2  # tokens before a text

    def of(self, language: str | None, task: str) -> list[int]:
        """The tokens of a language and task; None stands for the task's only language. Raises UserError for unlearnt ones."""
        languages = self.ids.get(task, {})
        if language is None and len(languages) == 1:
            [language] = languages
        if language is None or language not in languages:
            wanted = f"in {language!r}" if language else "without a language"
            pairs = [(target, known) for target, task_of in TASK_OF.items() for known in self.ids.get(task_of, ())]
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
class WholePrompt:
    """A whole speech model's own tokens between its start token and a text.

    ids:      by task and language; empty for an English-only checkpoint
    last:     the prompt of a checkpoint without languages
    language: default language
    spaced:   True if a text starts with a space, in scripts that have spaces
    detects:  True if the model detects the language when none is given
    """

    ids: Mapping[str, Mapping[str, Sequence[int]]]
    last: Sequence[int] = ()
    language: str | None = None
    spaced: bool = False
    detects: bool = False

    @property
    def languages(self) -> list[str]:
        return sorted({language for languages in self.ids.values() for language in languages})

    @property
    def number(self) -> int:
        return max((len(ids) for languages in self.ids.values() for ids in languages.values()), default=len(self.last))

    def of(self, language: str | None, task: str) -> list[int]:
        """The prompt; IGNORE_INDEX stands for a language to detect. Raises UserError for an unknown language or task."""
        if not self.ids and language in (None, "en"):
            return list(self.last)
        known, language = self.ids.get(task, {}), language or self.language
        if self.ids and not known:
            wrong = f"the checkpoint does not {task}"
            raise UserError("target", task, wrong, "write target=transcription", "write target='transcription'")
        if language is None and self.detects:
            return [IGNORE_INDEX, *next(iter(known.values()))[1:]]
        if language is None or language not in known:
            asked = f"no language {language!r}" if language else "several languages, and none is chosen for the text"
            asked += f" to {task} into" if language in self.languages else ""
            listed = ", ".join(sorted(known)) or "en"
            write, python = f"write data.language=ONE_OF {listed}", f"write language=ONE_OF {listed}"
            raise UserError("data.language", language, f"the checkpoint has {asked}", write, python)
        return list(known[language])

    def known(self) -> list[str]:
        return self.languages


def tag(name: str) -> str:
    return f"<|{name}|>"


def add_tags(tokenizer: PreTrainedTokenizerBase, learnt: Iterable[tuple[str | None, str]]) -> Tags:
    """Adds the tags of (language, task) pairs to a tokenizer, as special tokens, which no text is encoded as."""
    pairs = sorted((language, task) for language, task in learnt if language is not None)
    tokens = dict.fromkeys(tag(name) for pair in pairs for name in pair)
    tokenizer.add_special_tokens({"extra_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
    ids: dict[str, dict[str, list[int]]] = {}
    for language, task in pairs:
        ids.setdefault(task, {})[language] = tokenizer.convert_tokens_to_ids([tag(language), tag(task)])
    return Tags(ids)
