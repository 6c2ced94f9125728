"""The options that evaluation and transcription take from the run whose model they use."""

from __future__ import annotations

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from sedtrain.run_dir import config_of

INHERITED = ("encoder", "decoder", "adapter", "data", "target", "normalizer", "decoding")
FROM_ROOT = {"target": "target", "seed": "seed", "folder": "run_dir"}  # options of data, and their names in the root
OLD_NAMES = {"normaliser": "normalizer", "training_normaliser": "training_normalizer"}


def renamed(override: str) -> str:
    """An override by today's name of its option."""
    name, equals, value = override.partition("=")
    bare = name.lstrip("+~")
    return f"{name.removesuffix(bare)}{OLD_NAMES.get(bare, bare)}{equals}{value}"


def inherit_run(config: DictConfig, overrides: list[str]) -> None:
    """Takes from a run's `config.yaml` what its model was trained on and how it is scored, unless the command line decides.

    Concerns the tasks that take `checkpoint=RUN`; overrides are those of the command line.
    """
    stored = config_of(str(config.checkpoint))
    if config.task == "train" or not stored.is_file():
        return
    of_run = OmegaConf.load(stored)
    assert isinstance(of_run, DictConfig)
    parsed = OverridesParser.create().parse_overrides(overrides)
    chosen = {override.key_or_group for override in parsed}
    for old in of_run.keys() & OLD_NAMES.keys():
        of_run[OLD_NAMES[str(old)]] = of_run[old]
    for key in INHERITED:
        if key in of_run and key not in chosen and "experiment" not in chosen:
            config[key] = of_run[key]
    config.data.update({name: config[in_root] for name, in_root in FROM_ROOT.items() if name in config.data})
    for override in parsed:
        if override.key_or_group.split(".")[0] in INHERITED and "." in override.key_or_group:
            OmegaConf.update(config, override.key_or_group, override.value(), force_add=True)
