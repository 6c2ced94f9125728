"""Rules of the group `metrics`: it names metrics of the package, and functions of texts that are a user's metrics."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sedtrain.annotations import misfits, suggest
from sedtrain.errors import UNSET, UserError
from sedtrain.ranges import BLEU_TOKENIZERS

TARGETS = ("transcription", "translation")
OF_METRICS = ("higher_is_better", "evaluate", "trust_remote_code", "key")
"""Options of a user's metric that are not its function's."""


def metric_rules(metrics: object, named: list[str], target: object) -> Iterator[UserError]:
    """Mistakes in the group `metrics`.

    named: metrics of the package
    """
    if not isinstance(metrics, dict):
        if metrics not in (None, UNSET):
            yield UserError("metrics", metrics, "expected metrics by name", f"write metrics=[{','.join(named)}]")
        return
    nodes = {str(name): node for name, node in metrics.items() if node is not None}
    for name, node in nodes.items():
        yield from package_rules(name, node) if name in named else own_rules(name, node, named)
    applied = [name for name, node in nodes.items() if name not in named or target_of(node) in (None, target)]
    if not {*applied} & {*named}:
        wrong = f"target={target} needs one of {', '.join(named)}, since other metrics have no intervals"
        yield UserError("metrics", list(nodes), wrong, "write metrics=auto, or add one of them")
    elif applied[0] not in named and "higher_is_better" not in nodes[applied[0]]:
        option = f"metrics.{applied[0]}.higher_is_better"
        wrong = "the first metric chooses the best weights, so it must say which values are better"
        yield UserError(option, UNSET, wrong, f"write +{option}=true, or false for errors")


def target_of(node: object) -> object:
    return node.get("target") if isinstance(node, dict) else None


def package_rules(name: str, node: object) -> Iterator[UserError]:
    path, known = f"metrics.{name}", ["target", *["tokenize"] * (name == "bleu")]
    if not isinstance(node, dict):
        yield UserError(path, node, "expected options by name", f"leave it out, or write metrics=[{name}]")
        return
    for option in node.keys() - {*known}:
        yield UserError(f"{path}.{option}", node[option], f"{name} has no such option", suggest(str(option), known))
    tokenizers = ("auto", *BLEU_TOKENIZERS)
    if node.get("tokenize", UNSET) not in (*tokenizers, UNSET):
        wrong = "sacrebleu has no such tokenizer, or would download it"
        yield UserError(f"{path}.tokenize", node["tokenize"], wrong, suggest(str(node["tokenize"]), tokenizers))
    if target_of(node) not in (None, UNSET, *TARGETS):
        yield UserError(
            f"{path}.target", node["target"], "there is no such target", suggest(str(node["target"]), TARGETS)
        )


def own_rules(name: str, node: Any, named: list[str]) -> Iterator[UserError]:
    """A user's metric is a function or a folder of Hugging Face `evaluate`; with the user's consent, code of the Hub."""
    path, options = f"metrics.{name}", node if isinstance(node, dict) else {}
    if not options.keys() & {"_target_", "evaluate"}:
        write = f"{suggest(name, named)}; yours is +metrics.NAME._target_=package.module.function"
        yield UserError(path, node, f"there is no metric {name!r}", write)
    place = options.get("evaluate", UNSET)
    may_download = options.get("trust_remote_code") is True and isinstance(place, str)
    if not may_download and place != UNSET and not Path(str(place)).expanduser().exists():
        wrong = "there is no such folder, and code of that name would be downloaded from the Hub and run"
        yield UserError(
            f"{path}.evaluate", place, wrong, f"write a folder, or allow it by +{path}.trust_remote_code=true"
        )
    yield from misfits(f"{path}.higher_is_better", options.get("higher_is_better", UNSET), "bool")
