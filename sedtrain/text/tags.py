"""Special tokens before a target text that name its language and its task, as in Whisper (arXiv 2212.04356)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from sedtrain.errors import UserError

TASK_OF = {"transcription": "transcribe", "translation": "translate"}  # by target
NUM_TAGS = 2  # before a text


@dataclass(frozen=True)
class Tags:
    """The languages and tasks that a model learnt; `ids` holds their tokens, by task and language."""

    ids: Mapping[str, Mapping[str, Sequence[int]]]

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


def tag(name: str) -> str:
    return f"<|{name}|>"


def add_tags(tokenizer: PreTrainedTokenizerBase, learnt: Iterable[tuple[str, str]]) -> Tags:
    """Adds the tags of pairs of language and task to a tokenizer, as tokens that no text becomes."""
    pairs = sorted(learnt)
    tokens = dict.fromkeys(tag(name) for pair in pairs for name in pair)
    tokenizer.add_special_tokens({"extra_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
    ids: dict[str, dict[str, list[int]]] = {}
    for language, task in pairs:
        ids.setdefault(task, {})[language] = tokenizer.convert_tokens_to_ids([tag(language), tag(task)])
    return Tags(ids)
