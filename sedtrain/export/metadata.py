"""Writes what the Hugging Face Hub reads about a model: the metadata of its card, and its score on a dataset."""

from collections.abc import Iterator
from math import isnan
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from sedtrain.evaluation.metrics import METRICS, title_of
from sedtrain.evaluation.results import Results
from sedtrain.export.origin import NO_NAME, Origin, hub_data
from sedtrain.run_dir import write_whole

PIPELINE_TAG = "automatic-speech-recognition"
"""Also for translation, since the Hub's task `translation` takes text; such models have the tag `speech-translation`."""
TASK_NAMES = {"transcription": "Speech recognition", "translation": "Speech translation"}
TAGS = {"transcription": ["sedtrain"], "translation": ["sedtrain", "speech-translation"]}


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


def metadata(title: str, task: str, results: Results | None, origin: Origin, library: str) -> str:
    """The YAML on top of the card; library: the one that loads the model."""
    codes = [code.partition("-")[0] for code in origin.languages]
    return ModelCardData(
        model_name=title,
        language=list(dict.fromkeys(codes)) or None,
        language_bcp47=[code for code in origin.languages if "-" in code] or None,
        license=origin.license,
        library_name=library,
        pipeline_tag=PIPELINE_TAG,
        tags=["speech-encoder-decoder", *TAGS[task]],
        base_model=list(origin.base_models) or None,
        datasets=list(origin.datasets) or None,
        eval_results=(list(model_index(results)) if results else None) or None,
    ).to_yaml()
