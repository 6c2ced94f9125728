"""Metrics that a user brings: any function, and those of Hugging Face `evaluate`."""

from collections.abc import Callable
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

from sedtrain.errors import UserError
from sedtrain.evaluation.metrics import OwnMetric

TRIAL = ["two words"]


def of_function(name: str, function: Callable[..., Any], signature: str, higher_is_better: bool | None) -> OwnMetric:
    """A metric by a function of references and hypotheses. Raises UserError where it fails on a pair of texts."""
    metric = OwnMetric(name, function, signature, higher_is_better)
    metric.value(TRIAL, TRIAL)
    return metric


def of_evaluate(name: str, evaluate: str, higher_is_better: bool | None, key: str | None, **options: Any) -> OwnMetric:
    """A metric of the package `evaluate`, whose code is run.

    evaluate: a folder, or a name on the Hub, which the command line has allowed
    key: which of several numbers that it returns; options: of its `compute`
    Raises UserError where it cannot be loaded, or gives no number.
    """
    import evaluate as package

    folder = Path(evaluate).expanduser()
    try:
        loaded = package.load(str(folder) if folder.exists() else evaluate, keep_in_memory=True)
    except Exception as error:
        wrong = f"it cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        write = "write the folder of a metric, whose script has the same name"
        raise UserError(f"metrics.{name}.evaluate", evaluate, wrong, write) from error

    def value(references: list[str], hypotheses: list[str]) -> float:
        found = loaded.compute(predictions=hypotheses, references=references, **options) or {}
        numbers = {each: number for each, number in found.items() if isinstance(number, Real)}
        only = list(numbers) if len(numbers) == 1 else []
        chosen = next((each for each in ([key] if key else [name, loaded.name, *only]) if each in numbers), None)
        if chosen is None:
            raise ValueError(f"it returns {sorted(found)}: write +metrics.{name}.key=NAME of a number among them")
        return float(numbers[chosen])

    return of_function(name, value, f"evaluate {version('evaluate')}: {evaluate}", higher_is_better)
