"""Facts about training and data for a model card, from a run's options and scores, and the metadata that the Hub reads.

The options may be a stranger's.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from sedtrain.data.paths import is_here, public_name
from sedtrain.evaluation.metrics import METRICS, title_of
from sedtrain.evaluation.results import Results
from sedtrain.run_dir import write_whole
from sedtrain.text.tags import Tags, WholePrompt

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_DATA = re.compile(rf"hf://datasets/({HUB_ID.pattern})[@/].+|({HUB_ID.pattern})(?:@.+)?")
"""A dataset of the Hub as `data.path` names it: a URL of its files, or an id; both may name a revision."""
NO_NAME = re.compile(r"[^\w.-]+")
LANGUAGE = re.compile(r"[a-z]{2,3}(-\w+)*")
SHOWN: dict[str, tuple[str, ...] | None] = {
    **dict.fromkeys(("seed", "size", "training_normalizer", "adapter", "finetune", "loss", "optimizer", "scheduler")),
    "augment": None,
    "data": ("batch_seconds", "batch_tokens", "max_seconds"),
    "trainer": ("max_steps", "max_epochs", "precision", "accumulate_grad_batches", "gradient_clip_val"),
}
"""Options that a card shows, by group; None: all options of the group."""
PIPELINE_TAG = "automatic-speech-recognition"
"""Also for translation, since the Hub's task `translation` takes text; such models have the tag `speech-translation`."""
TASK_NAMES = {"transcription": "Speech recognition", "translation": "Speech translation"}
TAGS = {"transcription": ["sedtrain"], "translation": ["sedtrain", "speech-translation"]}


@dataclass(frozen=True)
class CardFacts:
    """Facts about a model's training for its card.

    data:        names of the training data; empty if unknown
    datasets, base_models: Hub ids
    languages:   language codes of the texts
    settings:    options of the training, without paths of a machine
    """

    data: str
    datasets: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    license: str | None = None


def card_facts_of(
    settings: Mapping[str, Any], language: str | None, license: str | None, tags: Tags | WholePrompt | None
) -> CardFacts:
    """Facts about the training of a model, for its card.

    settings: its run's configuration as plain values; empty if there is none
    language: language of the texts, in addition to those that the model's tags name
    """
    paths = list(data_paths(settings))
    languages = [language] if language else []
    languages += [each for of_task in tags.ids.values() for each in of_task] if isinstance(tags, Tags) else []
    return CardFacts(
        data=" + ".join(dict.fromkeys(map(public_name, paths))),
        datasets=tuple(dict.fromkeys(filter(None, map(hub_dataset, paths)))),
        base_models=tuple(dict.fromkeys(filter(is_on_hub, checkpoints(settings)))),
        languages=tuple(dict.fromkeys(each for each in languages if LANGUAGE.fullmatch(each))),
        settings=dict(shown(settings)),
        license=license,
    )


def is_on_hub(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not is_here(name)


def hub_dataset(path: str) -> str | None:
    """The id of a dataset of the Hub; None for files of this machine or of other servers."""
    found = HUB_DATA.fullmatch(path)
    if not found or (found[2] and is_here(found[2])):
        return None
    return found[1] or found[2]


def hub_data(described: str) -> tuple[str, str | None] | None:
    """Id and configuration from `Corpus.described`, for one split of one dataset of the Hub; None for other data."""
    path, *rest = described.split(", ")
    found = HUB_DATA.fullmatch(path)
    if not found or "+" in described or len(rest) not in (1, 2):
        return None
    return found[1] or found[2], rest[0] if len(rest) == 2 else None


def table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def data_paths(settings: Mapping[str, Any]) -> Iterator[str]:
    data = table(settings.get("data"))
    for source in [*table(data.get("mix")).values()] or [{}]:
        path = {**data, **table(source)}.get("path")
        yield from [path] if isinstance(path, str) else []


def checkpoints(settings: Mapping[str, Any]) -> Iterator[str]:
    """Names of the pretrained models that training started from."""
    size, pretrained = settings.get("size"), settings.get("pretrained")
    for part in (settings, table(settings.get("encoder")), table(settings.get("decoder"))):
        name = part.get("checkpoint") or (part.get(str(size)) if pretrained and size != "tiny" else None)
        yield from [name] if isinstance(name, str) else []


def shown(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, keys in SHOWN.items():
        value = settings.get(name)
        if keys is not None:
            value = {key: table(value)[key] for key in keys if key in table(value)}
        if value not in (None, {}):
            yield name, without_places(value)


def without_places(value: Any) -> Any:
    """The value with paths shortened to their last names."""
    if isinstance(value, dict):
        return {str(key): without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_places(each) for each in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~", ".")) else value


def write_eval_results(folder: Path, results: Results) -> None:
    """Writes the first metric to .eval_results/sedtrain.yaml if the data are a dataset of the Hub.

    The Hub shows it if that dataset is a benchmark with a task named like the dataset's configuration.
    """
    known = [(name, each) for name, each in results.metrics.items() if name in METRICS and not isnan(each.value)]
    of_hub = hub_data(results.data)
    if not (of_hub and known):
        return
    name, interval = known[0]
    scored_as = "; ".join(results.scored_as())
    notes = f"{METRICS[name].title} in percent, 95 % interval {interval.ends}, of {results.data}; {scored_as}"
    entry = EvalResultEntry(of_hub[0], of_hub[1] or "default", round(100 * interval.value, 2), notes=notes)
    (folder / ".eval_results").mkdir(exist_ok=True)
    listed = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
    write_whole(folder / ".eval_results/sedtrain.yaml", listed)


def model_index(results: Results) -> Iterator[EvalResult]:
    """The metrics in the form of the Hub, in percent and with their intervals; metrics without a value are left out."""
    dataset, configuration = hub_data(results.data) or (NO_NAME.sub("_", results.data.rpartition(", ")[0]), None)
    for name, each in results.metrics.items():
        factor = 100 if name in METRICS else 1
        ends = [] if isnan(each.low + each.high) else [round(factor * end, 2) for end in (each.low, each.high)]
        if not isnan(each.value):
            yield EvalResult(
                task_type=PIPELINE_TAG,
                task_name=TASK_NAMES[results.task],
                dataset_type=dataset,
                dataset_name=results.data,
                dataset_config=configuration,
                dataset_split=results.split,
                metric_type=name,
                metric_name=title_of(name) if name in METRICS else name,
                metric_value=round(factor * each.value, 2),
                metric_args={"interval_95_percent": ends, "resampled": results.resampled} if ends else None,
            )


def metadata(title: str, task: str, results: Results | None, facts: CardFacts, library: str) -> str:
    """The YAML on top of the card; library: the one that loads the model."""
    codes = [code.partition("-")[0] for code in facts.languages]
    return ModelCardData(
        model_name=title,
        language=list(dict.fromkeys(codes)) or None,
        language_bcp47=[code for code in facts.languages if "-" in code] or None,
        license=facts.license,
        library_name=library,
        pipeline_tag=PIPELINE_TAG,
        tags=["speech-encoder-decoder", *TAGS[task]],
        base_model=list(facts.base_models) or None,
        datasets=list(facts.datasets) or None,
        eval_results=(list(model_index(results)) if results else None) or None,
    ).to_yaml()
