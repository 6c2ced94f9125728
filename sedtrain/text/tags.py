"""Special tokens in front of a target text that name its language and its task, as Whisper's do (arXiv 2212.04356)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from sedtrain.errors import UserError

TASK_OF = {"transcription": "transcribe", "translation": "translate"}
"""The task of each target."""
NUM_TAGS = 2


@dataclass(frozen=True)
class Tags:
    """What a model learnt to write.

    ids: by task and language, the tokens that ask for it
    """

    ids: Mapping[str, Mapping[str, Sequence[int]]]

    def of(self, language: str | None, task: str) -> list[int]:
        """The tokens of a language, by default the only one of the task. Raises UserError for what was never learnt."""
        known = self.ids.get(task, {})
        if language is None and len(known) == 1:
            [language] = known
        if language is None or language not in known:
            raise UserError(
                f"the model writes {' and '.join(map(str, self.known()))}, and is asked to {task} "
                f"{f'in {language!r}' if language else 'in a language that nothing names'}",
                ", or ".join(f"target={target} data.language={each}" for target, each in self.targets()),
            )
        return list(known[language])

    def known(self) -> list[str]:
        return [tag(language) + tag(task) for task, languages in self.ids.items() for language in languages]

    def targets(self) -> list[tuple[str, str]]:
        return [(target, language) for target, task in TASK_OF.items() for language in self.ids.get(task, {})]


def tag(name: str) -> str:
    return f"<|{name}|>"


def add_tags(tokenizer: PreTrainedTokenizerBase, learnt: Iterable[tuple[str, str]]) -> Tags:
    """Makes a tokenizer write the tags of these pairs of language and task, as tokens that text cannot become."""
    pairs = sorted(learnt)
    tokens = dict.fromkeys(tag(name) for pair in pairs for name in pair)
    tokenizer.add_special_tokens({"extra_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
    ids: dict[str, dict[str, list[int]]] = {}
    for language, task in pairs:
        ids.setdefault(task, {})[language] = tokenizer.convert_tokens_to_ids([tag(language), tag(task)])
    return Tags(ids)
